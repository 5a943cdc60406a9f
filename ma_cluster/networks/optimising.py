"""What the training of every network shares: a step's losses, their sums over workers, the optimiser, the descent."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from ma_cluster.config import HgnConfig, PrnConfig

Reduce = Callable[[Tensor], Tensor]
"""Sums (k) of this part of a mini-batch -> sums of the whole mini-batch, where several workers share one."""


def local(sums: Float[Tensor, "k"]) -> Float[Tensor, "k"]:
    """The reduce of a single worker: its part is the whole."""
    return sums


def reduced_mean(values: Float[Tensor, "..."], reduce: Reduce) -> Float[Tensor, ""]:
    """Mean over the whole mini-batch, however it is shared out."""
    total, count = reduce(torch.stack([values.sum(), values.new_tensor(values.numel())]))
    return total / count


@dataclass(frozen=True, slots=True)
class Losses:
    """The first half of a step: a mini-batch's loss."""

    terms: dict[str, Float[Tensor, ""]]
    total: Float[Tensor, ""]
    """Weighted sum of the terms; carries the gradient."""
    negatives: Float32[Tensor, "n"] | None = None
    """Cross entropy of each negative of this worker's part, where the ledger is to hear of them."""

    def values(self) -> dict[str, float]:
        """The terms and their sum as numbers."""
        return {name: term.item() for name, term in self.terms.items()} | {"total": self.total.item()}


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


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, total: Float[Tensor, ""], rate: float) -> None:
    """The second half of any network's step: gradient, clipped to norm 1, and the optimiser at a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


class WeightAverage:
    """The exponential moving average of a network's weights and running statistics, as a network of its own."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """With a decay of 0 it is the network itself."""
        self.network = copy.deepcopy(model) if decay else model
        self._decay = decay
        ours, theirs = self.network.state_dict(), model.state_dict()
        pairs = [(ours[name], theirs[name]) for name in ours]
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counts = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the step of this number; at first it follows closely, or it would keep the first weights for long."""
        if not self._decay:
            return
        ours, theirs = map(list, zip(*self._averaged, strict=True))
        torch._foreach_lerp_(ours, theirs, 1 - min(self._decay, (1 + step) / (10 + step)))
        for own, other in self._counts:
            own.copy_(other)
