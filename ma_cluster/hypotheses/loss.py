"""The loss of the hypothesis networks: weighted cross entropy + soft Dice (Sarhan et al., section 2.2).

Of each kind of lesion apart, on its logit against the background's: with one kind that is the softmax of two classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ma_cluster.networks.reduction import Reduce, local


def kind_logits(logits: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k h w"]:
    """Logits of c classes, the background first -> of each of the k = c - 1 kinds against the background."""
    return logits[:, 1:] - logits[:, :1]


def weighted_cross_entropy(
    logit: Float[Tensor, "n k h w"],
    truth: Bool[Tensor, "n k h w"],
    positive_weight: Float[Tensor, "k"],
    reduce: Reduce = local,
) -> Float[Tensor, "k"]:
    """Mean over all pixels of w CE; a background pixel weighs 1. Not renormalised by the weights' sum."""
    per_pixel = F.binary_cross_entropy_with_logits(
        logit, truth.to(logit.dtype), pos_weight=positive_weight[:, None, None], reduction="none"
    )
    sums = per_pixel.sum(dim=(0, 2, 3))
    pooled = reduce(torch.cat([sums, sums.new_tensor([per_pixel[:, 0].numel()])]))
    return pooled[:-1] / pooled[-1]


def soft_dice(
    logit: Float[Tensor, "n k h w"], truth: Bool[Tensor, "n k h w"], reduce: Reduce = local
) -> Float[Tensor, "k"]:
    """1 - 2 sum(p g) / (sum p^2 + sum g^2 + 1e-5), over the whole mini-batch (V-Net, 2016)."""
    p, g = torch.sigmoid(logit), truth.to(logit.dtype)
    sums = [part.sum(dim=(0, 2, 3)) for part in (p * g, p.square(), g.square())]
    both, found, true = reduce(torch.cat(sums)).chunk(3)
    return 1 - 2 * both / (found + true + 1e-5)
