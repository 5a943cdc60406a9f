"""One training step of the patch refinement network, and what it needs. Knows nothing of ranks, epochs or ledgers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from ma_cluster.config import PrnConfig
from ma_cluster.networks.optimising import descend, learning_rate
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


@dataclass(frozen=True, slots=True)
class PrnLosses:
    """The terms of a mini-batch's loss, their weighted sum, which carries the gradient, and each negative's own."""

    cross_entropy: Float[Tensor, ""]
    triplet: Float[Tensor, ""]
    total: Float[Tensor, ""]
    negatives: Float32[Tensor, "n"]

    def values(self) -> dict[str, float]:
        """The terms as numbers."""
        return {"cross_entropy": self.cross_entropy.item(), "triplet": self.triplet.item(), "total": self.total.item()}


def build_prn(config: PrnConfig) -> Prn:
    """The network of a recipe, freshly initialised."""
    return Prn(config.width, context=config.context_px // STRIDE)


def prn_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: TripletBatch, step: int, config: PrnConfig
) -> PrnLosses:
    """One optimiser step."""
    losses = prn_losses(model, batch, config)
    descend(model, optimizer, losses.total, learning_rate(step, config))
    return losses


def prn_losses(model: nn.Module, batch: TripletBatch, config: PrnConfig, reduce: Reduce = local) -> PrnLosses:
    """The first half of a step. The three branches share weights: one forward pass over all 3 n patches.

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
        return PrnLosses(cross_entropy, torch.zeros(()), cross_entropy, negatives)
    triplet = triplet_loss(embedding[0], embedding[2], embedding[1], config.margin, reduce)
    return PrnLosses(cross_entropy, triplet, cross_entropy + config.triplet_weight * triplet, negatives)


@torch.inference_mode()
def prn_probability(model: nn.Module, patches: UInt8[Tensor, "n 3 s s"]) -> Float32[Tensor, "n"]:
    """Probability that the centre pixel of each patch is a lesion; the model is in eval mode."""
    device = next(model.parameters()).device
    _, logits = model(normalise(patches.to(device)))
    return probability((logits[:, 1] - logits[:, 0]).float()).cpu()
