"""One training step of a hypothesis network, and what it needs. Knows nothing of ranks, epochs or checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from ma_cluster.config import HgnConfig, PrnConfig
from ma_cluster.hypotheses.frrn import Frrn
from ma_cluster.hypotheses.losses import Pool, alone, lesion_probability, soft_dice, weighted_cross_entropy


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


def build_optimizer(model: nn.Module, config: HgnConfig | PrnConfig) -> torch.optim.AdamW:
    """Adam with decoupled weight decay on kernels only; biases and batch-norm scales are free."""
    kernels = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def learning_rate(step: int, config: HgnConfig | PrnConfig) -> float:
    """Rate at a step: linear from 0 over the warm-up, then a half cosine that ends at 0 after `config.steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def normalise(patches: UInt8[Tensor, "n 3 h w"]) -> Tensor:
    """0..255 -> about -1..1, mid-grey (no local contrast, outside the FOV) -> 0. Every network's input."""
    return (patches.float() - 128.0) / 128.0


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
    model: nn.Module, batch: HgnBatch, config: HgnConfig, pool: Pool = alone, dtype: torch.dtype = torch.bfloat16
) -> HgnLosses:
    """The first half of a step: forward in autocast, losses in float32.

    Args:
        model: is put into training mode.
        batch: the mini-batch, or this worker's part of it.
        config: of the network.
        pool: makes the sums of a part those of the whole mini-batch.
        dtype: of the convolutions.
    """
    model.train()
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = model(normalise(batch.patches.to(device)))
    logits, lesion = logits.float(), batch.lesion.to(device)
    cross_entropy = weighted_cross_entropy(logits, lesion, config.lesion_weight, pool)
    dice = soft_dice(logits, lesion, pool)
    return HgnLosses(cross_entropy, dice, cross_entropy + config.dice_weight * dice)


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, total: Float[Tensor, ""], rate: float) -> None:
    """The second half of any network's step: gradient, clipped to norm 1, and the optimiser at a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@torch.inference_mode()
def hgn_probability(model: nn.Module, patches: UInt8[Tensor, "n 3 h w"]) -> Tensor:
    """Lesion probability (n h w, float32, on the CPU) of patches; the model is in eval mode."""
    device = next(model.parameters()).device
    return lesion_probability(model(normalise(patches.to(device))).float()).cpu()
