"""A network that looks at each tile under several flips: the mean of its answers errs less than one of them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

FLIPS: tuple[tuple[int, ...], ...] = ((), (3,), (2, 3), (2,))
"""Axes of n c h w that are flipped: none, left-right, both, up-down."""


class FlipAugmented(nn.Module):
    """The mean of a network's logits over the first `count` of `FLIPS`; each costs as much as the first."""

    def __init__(self, network: nn.Module, count: int) -> None:
        super().__init__()
        self.network = network
        self.flips = FLIPS[:count]

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n k h w"]:
        answers = [self.network(x.flip(axes)).flip(axes) if axes else self.network(x) for axes in self.flips]
        return torch.stack(answers).mean(dim=0) if len(answers) > 1 else answers[0]
