"""The loss of the patch refinement network on a mini-batch. Knows nothing of ranks, epochs or ledgers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor, nn

from ma_cluster.config import PrnConfig
from ma_cluster.networks.optimising import Losses
from ma_cluster.networks.reduction import Reduce, local
from ma_cluster.networks.tensors import normalise, probability
from ma_cluster.refinement.resnet import STRIDE, Prn
from ma_cluster.refinement.triplet import classification_loss, triplet_loss


@dataclass(frozen=True, slots=True)
class TripletBatch:
    """Enhanced RGB patches: anchors and positives centred on lesion pixels, negatives on healthy ones."""

    anchor: UInt8[Tensor, "n 3 s s"]
    positive: UInt8[Tensor, "n 3 s s"]
    negative: UInt8[Tensor, "n 3 s s"]


def build_prn(config: PrnConfig) -> Prn:
    """The network of a recipe, freshly initialised."""
    return Prn(config.width, context=config.context_px // STRIDE)


def prn_losses(model: nn.Module, batch: TripletBatch, config: PrnConfig, reduce: Reduce = local) -> Losses:
    """The three branches share weights: one forward pass over all 3 n patches.

    Without the triplet term (`triplet_weight` 0, the `cls` ablation) the positives are not computed.

    Args:
        model: is put into training mode.
        batch: the mini-batch, or this worker's part of it.
        config: of the network.
        reduce: makes the sums of a part those of the whole mini-batch.
    """
    model.train()
    device = next(model.parameters()).device
    parts = [batch.anchor, batch.negative] + ([batch.positive] if config.triplet_weight else [])
    with torch.autocast(device.type, torch.bfloat16):
        embeddings, logits = model(normalise(torch.cat(parts).to(device)))
    embedding, logit = embeddings.float().chunk(len(parts)), logits.float().chunk(len(parts))
    cross_entropy, negatives = classification_loss(logit[0], logit[1], reduce)
    if not config.triplet_weight:
        return Losses({"cross_entropy": cross_entropy, "triplet": torch.zeros(())}, cross_entropy, negatives)
    triplet = triplet_loss(embedding[0], embedding[2], embedding[1], config.margin, reduce)
    total = cross_entropy + config.triplet_weight * triplet
    return Losses({"cross_entropy": cross_entropy, "triplet": triplet}, total, negatives)


@torch.inference_mode()
def prn_probability(model: nn.Module, patches: UInt8[Tensor, "n 3 s s"]) -> Float32[Tensor, "n"]:
    """Probability that the centre pixel of each patch is a lesion; the model is in eval mode."""
    device = next(model.parameters()).device
    _, logits = model(normalise(patches.to(device)))
    return probability((logits[:, 1] - logits[:, 0]).float()).cpu()
