"""Lesion-level figures: FROC, the share of lesions found against false lesions a photograph, over all thresholds.

A reference lesion is an 8-connected component of the reference mask; it is found where at least one called pixel
overlaps it. A false lesion is an 8-connected component of the called pixels that overlaps no reference pixel. Both are
counted at each of `THRESHOLDS`, in small arrays that add up over photographs and machines.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, Int64
from numpy import ndarray

THRESHOLDS: Float32[ndarray, "t"] = (1 / (1 + np.exp(-np.linspace(-4, 9, 105)))).astype(np.float32)
"""Evenly spaced in log odds, 0.018 to 0.99988: networks saturate, and figures change most close to 1."""
RATES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
"""False lesions a photograph at which sensitivities are read, as in the challenges of this field."""


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
