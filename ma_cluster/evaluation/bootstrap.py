"""How sure the figures are: the average precision over photographs drawn again with replacement.

Each photograph keeps its pixel counts in about two thousand bins instead of 65,536, so that a thousand draws over
thousands of photographs are one matrix product. Bins are even in log odds; the average precision moves by less than
1e-3 by them. All rows are drawn with the same photographs: differences between rows are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64
from numpy import ndarray

from ma_cluster.evaluation.scoring import BINS, PixelCounts

RESAMPLES = 2000
SEED = 0
COVERAGE = 0.95
FEWEST = 5
"""Photographs that a verdict needs: so few resamples differ below that their interval means little."""


def _bin_starts() -> Int64[ndarray, "b"]:
    """First fine bin of each coarse one; the two ends are kept as they are, saturated networks fill them."""
    odds = np.exp(np.linspace(-11, 11, 2049))
    inner = (odds / (1 + odds) * (BINS - 1)).astype(np.int64)
    return np.unique(np.concatenate([[0, 1], inner, [BINS - 2, BINS - 1]]))


_STARTS = _bin_starts()


@dataclass(frozen=True, slots=True)
class Interval:
    """Bounds of the middle 95 % of the resamples, and the share of them above 0."""

    low: float
    high: float
    above_zero: float


def coarse(counts: PixelCounts) -> Int64[ndarray, "2 b"]:
    """Pixels by coarse score bin: of lesions, of background."""
    return np.add.reduceat(np.stack([counts.lesion, counts.background]), _STARTS, axis=1)


def draw_weights(photographs: int, resamples: int = RESAMPLES, seed: int = SEED) -> Int64[ndarray, "r n"]:
    """How often each photograph is in each resample."""
    return np.random.default_rng(seed).multinomial(photographs, np.full(photographs, 1 / photographs), resamples)


def resampled_precision(
    photographs: Sequence[Int64[ndarray, "2 b"]], weights: Int64[ndarray, "r n"]
) -> Float[ndarray, "r"]:
    """The average precision of each resample; NaN where it drew no lesion."""
    stacked = np.stack(photographs).astype(float)
    lesion, background = (weights @ stacked[:, kind, ::-1] for kind in (0, 1))
    true, called = np.cumsum(lesion, axis=1), np.cumsum(lesion + background, axis=1)
    positives = true[:, -1]
    total = (lesion * true / np.maximum(called, 1)).sum(axis=1)
    return np.divide(total, positives, out=np.full(len(weights), np.nan), where=positives > 0)


def interval(values: Float[ndarray, "r"]) -> Interval:
    """Percentile interval of a resampled figure, without the resamples that have none."""
    known = values[~np.isnan(values)]
    low, high = np.quantile(known, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Interval(float(low), float(high), float((known > 0).mean()))


def verdict(difference: Interval, photographs: int) -> str:
    """What the interval of a difference over so many photographs says of "the first is better"."""
    if photographs < FEWEST:
        return "cannot be told"
    if difference.low > 0:
        return "holds"
    return "does not" if difference.high < 0 else "cannot be told"
