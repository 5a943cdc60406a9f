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


def fuse(
    maps: Sequence[Float32[ndarray, "h w"]], how: Fusion, weights: Sequence[float] | None = None
) -> Float32[ndarray, "h w"]:
    """Pixelwise mean: (w1 p1 + .. + wk pk) / W, or (p1^w1 .. pk^wk)^(1/W), which is 0 where any map is.

    W is w1 + .. + wk.

    Args:
        maps: of one shape, 0..1.
        how: which mean.
        weights: of each map, 1 where None. A map of weight 0 has no say.
    """
    used = [(m, np.float32(w)) for m, w in zip(maps, weights or [1.0] * len(maps), strict=True) if w > 0]
    arithmetic = how == "arithmetic"
    terms = (m if w == 1 else m * w if arithmetic else np.power(m, w) for m, w in used)
    total = next(terms).copy()
    for term in terms:
        np.add(total, term, out=total) if arithmetic else np.multiply(total, term, out=total)
    whole = np.float32(sum(w for _, w in used))
    return total / whole if arithmetic else np.power(total, 1 / whole)


def scale_odds(probability: Float32[ndarray, "h w"], factor: float) -> Float32[ndarray, "h w"]:
    """The probability whose odds p / (1 - p) are `factor` times as large; 0 and 1 stay, and so does the order."""
    return probability * np.float32(factor) / (1 + np.float32(factor - 1) * probability)


def can_reach(
    threshold: float,
    maps: Sequence[Float32[ndarray, "h w"]],
    regions: Sequence[Bool[ndarray, "h w"]],
    fusion: tuple[Fusion, Sequence[float]],
) -> Bool[ndarray, "h w"]:
    """Pixels whose fused probability may yet be `threshold` or more, before the maps of the regions are known.

    Such a map is 0 outside its region and at best 1 inside, and neither mean falls where a map rises. So they are

        arithmetic:  p1 + p2 + [in region 1] + [in region 2] >= 4 threshold
        geometric:   p1 p2 >= threshold^4, within both regions

    for equal weights. `fusion` is which mean, and the weights of the maps and then of the regions' maps.
    """
    best = fuse([*maps, *(region.astype(np.float32) for region in regions)], *fusion)
    return best >= threshold - _ROUNDING
