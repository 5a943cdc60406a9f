"""Pixel-level figures: exact average precision, the challenge's 33-threshold area, F1 at a threshold.

Scores of 10^9 pixels are counted in histograms that add up over photographs and machines; nothing is sorted. With 2^16
bins the average precision equals that of sorting to about 1e-5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64, UInt16
from numpy import ndarray

BINS = 2**16


def _bin_starts() -> Int64[ndarray, "b"]:
    """First fine bin of each coarse one; the two ends are kept as they are, saturated networks fill them."""
    odds = np.exp(np.linspace(-11, 11, 2049))
    inner = (odds / (1 + odds) * (BINS - 1)).astype(np.int64)
    return np.unique(np.concatenate([[0, 1], inner, [BINS - 2, BINS - 1]]))


_STARTS = _bin_starts()


@dataclass(frozen=True, slots=True)
class PixelCounts:
    """Pixels by score bin, lesion and background apart. Adds up; a probability p falls in bin floor(p * 65535)."""

    lesion: Int64[ndarray, "bins"]
    background: Int64[ndarray, "bins"]

    @classmethod
    def of(cls, probability: Float32[ndarray, "*s"], truth: Bool[ndarray, "*s"]) -> PixelCounts:
        """Counts of one probability map against its reference mask."""
        bins = score_bins(probability)
        lesion = np.bincount(bins[truth], minlength=BINS)
        return cls(lesion, np.bincount(bins.ravel(), minlength=BINS) - lesion)

    def __add__(self, other: PixelCounts) -> PixelCounts:
        return PixelCounts(self.lesion + other.lesion, self.background + other.background)


def coarse(counts: PixelCounts) -> Int64[ndarray, "2 b"]:
    """Pixels by coarse score bin: of lesions, of background.

    Some two thousand bins, even in log odds, so that a thousand resamples of thousands of photographs are one matrix
    product; the average precision moves by less than 1e-3.
    """
    return np.add.reduceat(np.stack([counts.lesion, counts.background]), _STARTS, axis=1)


def score_bins(probability: Float32[ndarray, "*s"]) -> UInt16[ndarray, "*s"]:
    """The bin of each pixel."""
    return (probability * np.float32(BINS - 1)).astype(np.uint16)


@dataclass(frozen=True, slots=True)
class Operating:
    """Precision, recall and F1 of calling each pixel with probability >= threshold a lesion."""

    threshold: float
    precision: float
    recall: float
    f1: float


def average_precision(counts: PixelCounts) -> float:
    """Sum over all thresholds of (recall step) x precision, as scikit-learn defines it; 0 without lesions."""
    true, called = _at_or_above(counts)
    if true[0] == 0:
        return 0.0
    steps = counts.lesion / true[0]
    return float((steps * true / np.maximum(called, 1)).sum())


def auc_pr_33(counts: PixelCounts) -> float:
    """Area under precision against recall at thresholds 0, 1/32, ..., 1, trapezoid (the IDRiD challenge's measure).

    Conventions: a pixel is called where p >= threshold, so recall is 1 at 0; precision is 1 where nothing is called;
    no point is added at either end.
    """
    points = [_operating(counts, step / 32) for step in range(33)]
    recall = np.array([point.recall for point in points])
    precision = np.array([point.precision for point in points])
    return float(np.trapezoid(precision[::-1], recall[::-1]))


def at_threshold(counts: PixelCounts, threshold: float) -> Operating:
    """Precision, recall and F1 at one threshold, to the width of a bin (1.5e-5)."""
    return _operating(counts, threshold)


def best_f1(counts: PixelCounts) -> Operating:
    """The threshold of the largest F1."""
    true, called = _at_or_above(counts)
    f1 = 2 * true / np.maximum(called + true[0], 1)
    return _operating(counts, int(f1.argmax()) / (BINS - 1))


def precision_recall(counts: PixelCounts) -> tuple[Float[ndarray, "bins"], Float[ndarray, "bins"]]:
    """Precision and recall at every threshold, from the highest down; recall never falls."""
    true, called = _at_or_above(counts)
    precision = np.divide(true, called, out=np.ones_like(true), where=called > 0)
    return precision[::-1], (true / max(true[0], 1))[::-1]


def threshold_keeping(counts: PixelCounts, recall: float) -> float:
    """The largest threshold whose region keeps at least `recall` of the lesion pixels."""
    true, _ = _at_or_above(counts)
    kept = np.flatnonzero(true >= recall * true[0])
    return float(kept.max() / (BINS - 1))


def _operating(counts: PixelCounts, threshold: float) -> Operating:
    first = int(threshold * (BINS - 1) + 1e-9)  # as `of` bins, so a score equal to the threshold is called
    true, background = counts.lesion[first:].sum(), counts.background[first:].sum()
    positives = counts.lesion.sum()
    precision = true / (true + background) if true + background else 1.0
    recall = true / positives if positives else 0.0
    f1 = 2 * true / (true + background + positives) if true + background + positives else 0.0
    return Operating(threshold, float(precision), float(recall), float(f1))


def _at_or_above(counts: PixelCounts) -> tuple[Float[ndarray, "bins"], Float[ndarray, "bins"]]:
    """Lesion pixels, and all pixels, at or above each bin."""
    true = np.cumsum(counts.lesion[::-1])[::-1].astype(float)
    return true, true + np.cumsum(counts.background[::-1])[::-1]
