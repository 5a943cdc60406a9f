"""Patches as they are cut -> the tensor that every network takes."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor


def channels_first(patches: UInt8[ndarray, "n s s 3"]) -> UInt8[Tensor, "n 3 s s"]:
    """Patches as they are cut, in the layout that the network takes."""
    return torch.from_numpy(patches).permute(0, 3, 1, 2)


def probability(logit: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Sigmoid of a difference of logits; NaN also where that is infinite, or an overflow would pass as certainty."""
    return torch.where(logit.isfinite(), torch.sigmoid(logit), torch.nan)


def normalise(patches: UInt8[Tensor, "n 3 h w"]) -> Tensor:
    """0..255 -> about -1..1, mid-grey (no local contrast, outside the FOV) -> 0. Every network's input."""
    return (patches.float() - 128.0) / 128.0
