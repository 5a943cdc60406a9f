"""The loss of the hypothesis networks: weighted cross entropy + soft Dice (Sarhan et al., section 2.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ma_cluster.networks.reduction import Reduce, local, reduced_mean


def weighted_cross_entropy(
    logits: Float[Tensor, "n 2 h w"], lesion: Bool[Tensor, "n h w"], lesion_weight: float, reduce: Reduce = local
) -> Float[Tensor, ""]:
    """Mean over all pixels of w_class * CE; a background pixel weighs 1. Not renormalised by the weights' sum."""
    weights = torch.tensor([1.0, lesion_weight], dtype=logits.dtype, device=logits.device)
    per_pixel = F.cross_entropy(logits, lesion.long(), weight=weights, reduction="none")
    return reduced_mean(per_pixel, reduce)


def soft_dice(
    logits: Float[Tensor, "n 2 h w"], lesion: Bool[Tensor, "n h w"], reduce: Reduce = local
) -> Float[Tensor, ""]:
    """1 - 2 sum(p g) / (sum p^2 + sum g^2 + 1e-5), lesion channel, over the whole mini-batch (V-Net, 2016)."""
    p = lesion_probability(logits)
    g = lesion.to(p.dtype)
    both, found, true = reduce(torch.stack([(p * g).sum(), p.square().sum(), g.square().sum()]))
    return 1 - 2 * both / (found + true + 1e-5)


def lesion_probability(logits: Float[Tensor, "n 2 h w"]) -> Float[Tensor, "n h w"]:
    """Softmax of two classes, the lesion's: sigmoid of the difference of logits."""
    return torch.sigmoid(logits[:, 1] - logits[:, 0])
