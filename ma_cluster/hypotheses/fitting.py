"""One training step of a hypothesis network, and what it needs. Knows nothing of ranks, epochs or checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor, nn

from ma_cluster.config import HgnConfig, PrnConfig
from ma_cluster.hypotheses.frrn import Frrn
from ma_cluster.hypotheses.losses import lesion_probability, soft_dice, weighted_cross_entropy


@dataclass(frozen=True, slots=True)
class HgnBatch:
    """A mini-batch: enhanced RGB patches and their lesion masks."""

    patches: UInt8[Tensor, "n 3 h w"]
    lesion: Bool[Tensor, "n h w"]


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
    """One optimiser step. Forward and backward in bfloat16 autocast; losses in float32.

    Returns:
        The terms `cross_entropy` and `dice`, and their weighted sum `total`.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    model.train()
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16):
        logits = model(normalise(batch.patches.to(device)))
    logits, lesion = logits.float(), batch.lesion.to(device)
    cross_entropy = weighted_cross_entropy(logits, lesion, config.lesion_weight)
    dice = soft_dice(logits, lesion)
    total = cross_entropy + config.dice_weight * dice
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return {"cross_entropy": cross_entropy.item(), "dice": dice.item(), "total": total.item()}


@torch.inference_mode()
def hgn_probability(model: nn.Module, patches: UInt8[Tensor, "n 3 h w"]) -> Tensor:
    """Lesion probability (n h w, float32, on the CPU) of patches; the model is in eval mode."""
    device = next(model.parameters()).device
    return lesion_probability(model(normalise(patches.to(device))).float()).cpu()
