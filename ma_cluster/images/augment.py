"""Augmentation of training patches: the eight symmetries of the square, and gains of the channels."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Shaped, UInt8
from numpy import ndarray

from ma_cluster.images.contrast import MID_GREY

SYMMETRIES = 8


def turn(patch: Shaped[ndarray, "s s ..."], symmetry: int) -> Shaped[ndarray, "s s ..."]:
    """One of the eight flips and quarter turns, numbered 0 (none) to 7."""
    turned = np.rot90(patch, symmetry % 4)
    return turned[:, ::-1] if symmetry >= 4 else turned


def draw_gains(rng: np.random.Generator, largest: float) -> Float64[ndarray, "3"]:
    """A factor within 1 +- `largest` for each channel."""
    return 1 + largest * rng.uniform(-1, 1, size=3)


def scale_contrast(patch: UInt8[ndarray, "s s 3"], gains: Float64[ndarray, "3"]) -> UInt8[ndarray, "s s 3"]:
    """Each channel's distance from mid-grey times its gain, clipped to 0..255."""
    scaled = (patch.astype(np.float32) - MID_GREY) * gains.astype(np.float32) + MID_GREY
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
