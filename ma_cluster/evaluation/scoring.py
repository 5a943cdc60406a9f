"""Figures of pixels and of lesions, from counts that add up over photographs and machines; nothing is sorted.

Pixels: exact average precision, the challenge's 33-threshold area, F1 at a threshold, from histograms of 2^16 score
bins; the average precision equals that of sorting to about 1e-5.

Lesions: FROC, the share of them found against false ones a photograph, at each of `THRESHOLDS`. A reference lesion is
an 8-connected component of the reference mask; it is found where at least one called pixel overlaps it. A false lesion
is an 8-connected component of the called pixels that overlaps no reference pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, Int64, UInt16
from numpy import ndarray

BINS = 2**16
THRESHOLDS: Float32[ndarray, "t"] = (1 / (1 + np.exp(-np.linspace(-4, 9, 105)))).astype(np.float32)
"""Evenly spaced in log odds, 0.018 to 0.99988: networks saturate, and figures change most close to 1."""
RATES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
"""False lesions a photograph at which sensitivities are read, as in the challenges of this field."""


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


def fine(counts: Int64[ndarray, "2 b"]) -> PixelCounts:
    """Coarse counts as `PixelCounts`, each bin's pixels at its lowest score."""
    spread = np.zeros((2, BINS), np.int64)
    spread[:, _STARTS] = counts
    return PixelCounts(*spread)


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
    points = [at_threshold(counts, step / 32) for step in range(33)]
    recall = np.array([point.recall for point in points])
    precision = np.array([point.precision for point in points])
    return float(np.trapezoid(precision[::-1], recall[::-1]))


def best_f1(counts: PixelCounts) -> Operating:
    """The threshold of the largest F1."""
    true, called = _at_or_above(counts)
    f1 = 2 * true / np.maximum(called + true[0], 1)
    return at_threshold(counts, int(f1.argmax()) / (BINS - 1))


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


def at_threshold(counts: PixelCounts, threshold: float) -> Operating:
    """Precision, recall and F1 at one threshold, to the width of a bin (1.5e-5)."""
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


@dataclass(frozen=True, slots=True)
class LesionCounts:
    """Lesions of photographs at each of THRESHOLDS, called where p >= threshold. Adds up."""

    photographs: int
    lesions: int
    found: Int64[ndarray, "t"]
    false: Int64[ndarray, "t"]

    @classmethod
    def of(cls, probability: Float32[ndarray, "h w"], labels: Int32[ndarray, "h w"]) -> LesionCounts:
        """Counts of one map against the numbered components of its reference mask, as `label` gives them."""
        truth = labels > 0
        best = np.zeros(int(labels.max()) + 1, np.float32)
        np.maximum.at(best, labels[truth], probability[truth])
        found = (best[1:, None] >= THRESHOLDS).sum(axis=0)
        scores, packed_truth = _pack(probability, truth)
        false = [_false_components(scores >= threshold, packed_truth) for threshold in THRESHOLDS]
        return cls(1, len(best) - 1, found, np.array(false, np.int64))

    def __add__(self, other: LesionCounts) -> LesionCounts:
        return LesionCounts(
            self.photographs + other.photographs,
            self.lesions + other.lesions,
            self.found + other.found,
            self.false + other.false,
        )

    @property
    def sensitivity(self) -> Float[ndarray, "t"]:
        """Share of the lesions found at each threshold; 0 without lesions."""
        return self.found / max(self.lesions, 1)

    @property
    def false_per_photograph(self) -> Float[ndarray, "t"]:
        """At each threshold the most false lesions at it or any higher one.

        The plain count falls again at low thresholds, where components run together: no gain in precision.
        """
        return np.maximum.accumulate(self.false[::-1])[::-1] / max(self.photographs, 1)


def label(mask: Bool[ndarray, "h w"]) -> Int32[ndarray, "h w"]:
    """The 8-connected components of a mask, numbered from 1; 0 is background."""
    return cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[1]


def found_and_false(called: Bool[ndarray, "h w"], labels: Int32[ndarray, "h w"]) -> tuple[int, int]:
    """How many reference lesions, numbered, what is called overlaps; and how many called lesions overlap none."""
    found = len(np.unique(labels[called & (labels > 0)]))
    return found, _false_components(called, labels > 0)


def sensitivity_at(counts: LesionCounts, rate: float) -> float:
    """The largest sensitivity with at most `rate` false lesions a photograph; 0 where every threshold gives more."""
    allowed = counts.false_per_photograph <= rate
    return float(counts.sensitivity[allowed].max(initial=0.0))


def _false_components(called: Bool[ndarray, "h w"], truth: Bool[ndarray, "h w"]) -> int:
    labels = label(called)
    return int(labels.max()) - len(np.unique(labels[called & truth]))


def _pack(
    probability: Float32[ndarray, "h w"], truth: Bool[ndarray, "h w"]
) -> tuple[Float32[ndarray, "ph pw"], Bool[ndarray, "ph pw"]]:
    """The components at the lowest threshold side by side on a small canvas, each with the truth it covers.

    No component at a higher threshold reaches beyond one of them, so counts stay the same, and a photograph whose
    lesions fill a thousandth of it costs a hundredth.

        1 1 . . . . .        1 1 . 3 .
        . 1 . . . . .        . 1 . 3 .        rows of boxes, tallest first, a pixel apart
        . . . . . . 3   ->   . . . . .
        . 2 2 . . . 3        2 2 . . .
    """
    above = (probability >= THRESHOLDS[0]).astype(np.uint8)
    _, labels, boxes, _ = cv2.connectedComponentsWithStats(above, connectivity=8)
    boxes = boxes[1:, :4]  # left, top, width, height; the first is the background
    width = max(int(boxes[:, 2].max(initial=0)), int(np.sqrt(((boxes[:, 2] + 1) * (boxes[:, 3] + 1)).sum()))) + 1
    order = np.argsort(-boxes[:, 3], kind="stable")
    places, height = _shelves(boxes[order, 2:], width)
    scores, covered = np.zeros((height, width), np.float32), np.zeros((height, width), bool)
    for number, (row, col) in zip(order.tolist(), places, strict=True):
        left, top, w, h = boxes[number].tolist()
        source, target = np.s_[top : top + h, left : left + w], np.s_[row : row + h, col : col + w]
        own = labels[source] == number + 1
        scores[target], covered[target] = probability[source] * own, truth[source] & own
    return scores, covered


def _shelves(sizes: Int32[ndarray, "n 2"], width: int) -> tuple[list[tuple[int, int]], int]:
    """(row, col) of boxes (width, height; tallest first) set in rows, a pixel apart, and the height of it all."""
    places = []
    row = col = shelf = 0
    for w, h in sizes.tolist():
        if col + w >= width:
            row, col, shelf = row + shelf, 0, 0
        places.append((row, col))
        col, shelf = col + w + 1, max(shelf, h + 1)
    return places, row + shelf + 1
