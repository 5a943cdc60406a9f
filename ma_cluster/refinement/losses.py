"""The loss of the refinement network on a mini-batch: embedding triplets + cross entropy (Sarhan et al., 2.3).

Knows nothing of ranks, epochs or ledgers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor, nn

from ma_cluster.config import PrnConfig
from ma_cluster.networks.optimising import Losses, Reduce, local, reduced_mean
from ma_cluster.networks.tensors import channels_first, normalise


@dataclass(frozen=True, slots=True)
class TripletBatch:
    """Enhanced RGB patches: anchors and positives centred on lesion pixels, negatives on healthy ones."""

    anchor: UInt8[Tensor, "n 3 s s"]
    positive: UInt8[Tensor, "n 3 s s"]
    negative: UInt8[Tensor, "n 3 s s"]


def triplet_batch(
    anchor: UInt8[ndarray, "n s s 3"], positive: UInt8[ndarray, "n s s 3"], negative: UInt8[ndarray, "n s s 3"]
) -> TripletBatch:
    """Patches as they are cut, in the layout that the network takes."""
    return TripletBatch(channels_first(anchor), channels_first(positive), channels_first(negative))


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


def triplet_loss(
    anchor: Float[Tensor, "n d"],
    positive: Float[Tensor, "n d"],
    negative: Float[Tensor, "n d"],
    margin: float,
    reduce: Reduce = local,
) -> Float[Tensor, ""]:
    """(1/n) sum max(0, d(a, p) - d(a, n) + margin), d(u, v) = 1 - cos(u, v) (FaceNet, Schroff et al. 2015).

    The mean is over all triplets, also those that already hold their margin.
    """
    near = 1 - F.cosine_similarity(anchor, positive, dim=1)
    far = 1 - F.cosine_similarity(anchor, negative, dim=1)
    return reduced_mean(F.relu(near - far + margin), reduce)


def classification_loss(
    anchor: Float[Tensor, "m 2"], negative: Float[Tensor, "n 2"], reduce: Reduce = local
) -> tuple[Float[Tensor, ""], Float[Tensor, "n"]]:
    """Cross entropy of anchors (class 1) and negatives (class 0), and each negative's own: what the ledger keeps."""
    positives = F.cross_entropy(
        anchor, torch.ones(len(anchor), dtype=torch.long, device=anchor.device), reduction="none"
    )
    negatives = F.cross_entropy(
        negative, torch.zeros(len(negative), dtype=torch.long, device=negative.device), reduction="none"
    )
    return (reduced_mean(positives, reduce) + reduced_mean(negatives, reduce)) / 2, negatives.detach()
