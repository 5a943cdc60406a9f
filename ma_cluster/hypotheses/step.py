"""One training step of a hypothesis network, and what it needs. Knows nothing of ranks, epochs or checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from ma_cluster.config import HgnConfig
from ma_cluster.hypotheses.frrn import Frrn
from ma_cluster.hypotheses.loss import soft_dice, weighted_cross_entropy
from ma_cluster.networks.optimising import descend, learning_rate
from ma_cluster.networks.reduction import Reduce, local
from ma_cluster.networks.tensors import normalise, probability


@dataclass(frozen=True, slots=True)
class HgnBatch:
    """A mini-batch: enhanced RGB patches and their lesion masks."""

    patches: UInt8[Tensor, "n 3 h w"]
    lesion: Bool[Tensor, "n h w"]


@dataclass(frozen=True, slots=True)
class HgnLosses:
    """The terms of a mini-batch's loss and their weighted sum, which carries the gradient."""

    cross_entropy: Float[Tensor, ""]
    dice: Float[Tensor, ""]
    total: Float[Tensor, ""]

    def values(self) -> dict[str, float]:
        """The terms as numbers."""
        return {"cross_entropy": self.cross_entropy.item(), "dice": self.dice.item(), "total": self.total.item()}


def build_hgn(config: HgnConfig) -> Frrn:
    """The network of a recipe, freshly initialised."""
    return Frrn(config.width)


def hgn_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: HgnBatch, step: int, config: HgnConfig
) -> dict[str, float]:
    """One optimiser step.

    Returns:
        The terms `cross_entropy` and `dice`, and their weighted sum `total`.
    """
    losses = hgn_losses(model, batch, config)
    descend(model, optimizer, losses.total, learning_rate(step, config))
    return losses.values()


def hgn_losses(
    model: nn.Module, batch: HgnBatch, config: HgnConfig, reduce: Reduce = local, dtype: torch.dtype = torch.bfloat16
) -> HgnLosses:
    """The first half of a step: forward in autocast, losses in float32.

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
    return HgnLosses(cross_entropy, dice, cross_entropy + config.dice_weight * dice)


@torch.inference_mode()
def hgn_probability(model: nn.Module, patches: UInt8[Tensor, "n 3 h w"]) -> Tensor:
    """Lesion probability (n h w, float32, on the CPU) of patches; the model is in eval mode."""
    device = next(model.parameters()).device
    logits = model(normalise(patches.to(device))).float()
    return probability(logits[:, 1] - logits[:, 0]).cpu()
