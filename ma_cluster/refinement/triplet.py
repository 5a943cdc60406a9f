"""The loss of the patch refinement network: embedding triplets + cross entropy (Sarhan et al., section 2.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ma_cluster.hypotheses.losses import Pool, alone, pooled_mean


def triplet_loss(
    anchor: Float[Tensor, "n d"],
    positive: Float[Tensor, "n d"],
    negative: Float[Tensor, "n d"],
    margin: float,
    pool: Pool = alone,
) -> Float[Tensor, ""]:
    """(1/n) sum max(0, d(a, p) - d(a, n) + margin), d(u, v) = 1 - cos(u, v) (FaceNet, Schroff et al. 2015).

    The mean is over all triplets, also those that already hold their margin.
    """
    near = 1 - F.cosine_similarity(anchor, positive, dim=1)
    far = 1 - F.cosine_similarity(anchor, negative, dim=1)
    return pooled_mean(F.relu(near - far + margin), pool)


def classification_loss(
    anchor: Float[Tensor, "m 2"], negative: Float[Tensor, "n 2"], pool: Pool = alone
) -> tuple[Float[Tensor, ""], Float[Tensor, "n"]]:
    """Cross entropy of anchors (class 1) and negatives (class 0), and each negative's own: what the ledger keeps."""
    positives = F.cross_entropy(
        anchor, torch.ones(len(anchor), dtype=torch.long, device=anchor.device), reduction="none"
    )
    negatives = F.cross_entropy(
        negative, torch.zeros(len(negative), dtype=torch.long, device=negative.device), reduction="none"
    )
    return (pooled_mean(positives, pool) + pooled_mean(negatives, pool)) / 2, negatives.detach()
