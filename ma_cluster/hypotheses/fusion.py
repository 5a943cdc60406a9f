"""Probability maps of several scales and stages -> one (Sarhan et al., section 2.4 and Figure 1)."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Bool, Float32
from numpy import ndarray

from ma_cluster.config import Fusion

_ROUNDING = 1e-5  # far more than means of a few float32 probabilities are off by


def upsample_half(probability: Float32[ndarray, "hh hw"], shape: tuple[int, int]) -> Float32[ndarray, "h w"]:
    """The 0.5x map on the 1x grid of `shape`, bilinear, pixel centres aligned as `Grid` has them."""
    return cv2.resize(probability, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)


def fuse(maps: Sequence[Float32[ndarray, "h w"]], how: Fusion) -> Float32[ndarray, "h w"]:
    """Pixelwise mean of equal weights: (p1 + .. + pk) / k, or (p1 .. pk)^(1/k), which is 0 where any map is."""
    total = maps[0].copy()
    for probability in maps[1:]:
        np.add(total, probability, out=total) if how == "arithmetic" else np.multiply(total, probability, out=total)
    return total / np.float32(len(maps)) if how == "arithmetic" else np.power(total, np.float32(1 / len(maps)))


def scale_odds(probability: Float32[ndarray, "h w"], factor: float) -> Float32[ndarray, "h w"]:
    """The probability whose odds p / (1 - p) are `factor` times as large; 0 and 1 stay, and so does the order."""
    return probability * np.float32(factor) / (1 + np.float32(factor - 1) * probability)


def can_reach(
    threshold: float,
    maps: Sequence[Float32[ndarray, "h w"]],
    regions: Sequence[Bool[ndarray, "h w"]],
    how: Fusion,
) -> Bool[ndarray, "h w"]:
    """Pixels whose fused probability may yet be `threshold` or more, before the maps of the regions are known.

    Such a map is 0 outside its region and at best 1 inside, and neither mean falls where a map rises. So they are

        arithmetic:  p1 + p2 + [in region 1] + [in region 2] >= 4 threshold
        geometric:   p1 p2 >= threshold^4, within both regions
    """
    best = fuse([*maps, *(region.astype(np.float32) for region in regions)], how)
    return best >= threshold - _ROUNDING
