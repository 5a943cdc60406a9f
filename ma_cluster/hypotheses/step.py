"""The loss of a hypothesis network on a mini-batch. Knows nothing of ranks, epochs or checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor, nn

from ma_cluster.config import HgnConfig
from ma_cluster.hypotheses.frrn import Frrn
from ma_cluster.hypotheses.loss import soft_dice, weighted_cross_entropy
from ma_cluster.networks.optimising import Losses
from ma_cluster.networks.reduction import Reduce, local
from ma_cluster.networks.tensors import normalise, probability


@dataclass(frozen=True, slots=True)
class HgnBatch:
    """A mini-batch: enhanced RGB patches and their lesion masks."""

    patches: UInt8[Tensor, "n 3 h w"]
    lesion: Bool[Tensor, "n h w"]


def build_hgn(config: HgnConfig) -> Frrn:
    """The network of a recipe, freshly initialised."""
    return Frrn(config.width)


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
    logits, lesion = logits.float(), batch.lesion.to(device)
    cross_entropy = weighted_cross_entropy(logits, lesion, config.lesion_weight, reduce)
    dice = soft_dice(logits, lesion, reduce)
    return Losses({"cross_entropy": cross_entropy, "dice": dice}, cross_entropy + config.dice_weight * dice)


@torch.inference_mode()
def hgn_probability(model: nn.Module, patches: UInt8[Tensor, "n 3 h w"]) -> Tensor:
    """Lesion probability (n h w, float32, on the CPU) of patches; the model is in eval mode."""
    device = next(model.parameters()).device
    logits = model(normalise(patches.to(device))).float()
    return probability(logits[:, 1] - logits[:, 0]).cpu()
