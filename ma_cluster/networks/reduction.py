"""Sums of a mini-batch that several workers share out among them: a loss is then that of the whole mini-batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums (k) of this part of a mini-batch -> sums of the whole mini-batch, where several workers share one."""


def local(sums: Float[Tensor, "k"]) -> Float[Tensor, "k"]:
    """The reduce of a single worker: its part is the whole."""
    return sums


def reduced_mean(values: Float[Tensor, "..."], reduce: Reduce) -> Float[Tensor, ""]:
    """Mean over the whole mini-batch, however it is shared out."""
    total, count = reduce(torch.stack([values.sum(), values.new_tensor(values.numel())]))
    return total / count
