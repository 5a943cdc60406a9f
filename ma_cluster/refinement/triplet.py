"""The loss of the patch refinement network: embedding triplets + cross entropy (Sarhan et al., section 2.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ma_cluster.networks.reduction import Reduce, local, reduced_mean


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
