"""The loss of a hypothesis network on a mini-batch: weighted cross entropy + soft Dice (Sarhan et al., section 2.2).

Of each kind of lesion apart, on its logit against the background's: with one kind that is the softmax of two classes.
Knows nothing of ranks, epochs or checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray
from torch import Tensor, nn

from ma_cluster.config import HgnConfig
from ma_cluster.networks.optimising import Losses, Reduce, local
from ma_cluster.networks.tensors import channels_first, normalise


@dataclass(frozen=True, slots=True)
class HgnBatch:
    """A mini-batch: enhanced RGB patches and the masks of each kind of lesion."""

    patches: UInt8[Tensor, "n 3 h w"]
    truth: Bool[Tensor, "n k h w"]


def hgn_batch(patches: UInt8[ndarray, "n s s 3"], lesions: UInt8[ndarray, "n s s"], kinds: int) -> HgnBatch:
    """Patches as they are cut, in the layout that the network takes; bit k of a pixel's lesions is kind k."""
    bits = torch.from_numpy(lesions)[:, None] >> torch.arange(kinds, dtype=torch.uint8)[:, None, None]
    return HgnBatch(channels_first(patches), (bits & 1).bool())


def hgn_losses(
    model: nn.Module, batch: HgnBatch, config: HgnConfig, reduce: Reduce = local, dtype: torch.dtype = torch.bfloat16
) -> Losses:
    """Forward in autocast, losses in float32.

    Args:
        model: is put into training mode.
        batch: the mini-batch, or this worker's part of it.
        config: of the network.
        reduce: makes the sums of a part those of the whole mini-batch.
        dtype: of the convolutions.
    """
    model.train()
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = model(normalise(batch.patches.to(device)))
    logit, truth = kind_logits(logits.float()), batch.truth.to(device)
    weight = {"MA": 1.0, "HE": config.haemorrhage_weight, "EX": config.exudate_weight, "SE": config.exudate_weight}
    weights = logit.new_tensor([weight[kind] for kind in config.kinds])
    positive = logit.new_tensor([config.lesion_weight, *[config.other_lesion_weight] * (len(config.kinds) - 1)])
    cross_entropy = (weights * weighted_cross_entropy(logit, truth, positive, reduce)).sum()
    dice = (weights * soft_dice(logit, truth, reduce)).sum()
    total = config.cross_entropy_weight * cross_entropy + config.dice_weight * dice
    return Losses({"cross_entropy": cross_entropy, "dice": dice}, total)


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
