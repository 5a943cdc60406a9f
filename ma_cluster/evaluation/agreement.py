"""How far two agree: masks of one photograph, counted by pixels and lesions, and grades beyond chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from ma_cluster.evaluation.scoring import label


@dataclass(frozen=True, slots=True)
class Agreement:
    """Counts over photographs; they add up. Lesions are 8-connected components of the masks."""

    photographs: int = 0
    unscored: int = 0
    """Photographs of the data set without a mask in the run: every reference lesion of theirs is missed."""
    reference_px: int = 0
    called_px: int = 0
    both_px: int = 0
    reference_lesions: int = 0
    found_lesions: int = 0
    """Reference lesions that at least one called pixel overlaps."""
    called_lesions: int = 0
    false_lesions: int = 0
    """Called lesions that no reference pixel overlaps."""

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def precision(self) -> float:
        """Share of the called pixels that are lesion; 1 where nothing is called."""
        return self.both_px / self.called_px if self.called_px else 1.0

    @property
    def recall(self) -> float:
        """Share of the lesion pixels that are called; 0 without any."""
        return self.both_px / self.reference_px if self.reference_px else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall over the pooled pixels."""
        total = self.called_px + self.reference_px
        return 2 * self.both_px / total if total else 0.0

    @property
    def sensitivity(self) -> float:
        """Share of the reference lesions that are found; 0 without any."""
        return self.found_lesions / self.reference_lesions if self.reference_lesions else 0.0

    @property
    def lesion_f1(self) -> float:
        """Of lesions, as of pixels: the same whichever of the two masks is called the reference; 1 without any."""
        right = self.called_lesions - self.false_lesions
        if self.reference_lesions + self.called_lesions == 0:
            return 1.0
        precision = right / self.called_lesions if self.called_lesions else 0.0
        total = precision + self.sensitivity
        return 2 * precision * self.sensitivity / total if total else 0.0


def agree(called: Bool[ndarray, "h w"], reference: Bool[ndarray, "h w"]) -> Agreement:
    """The counts of one photograph, from what was called on it and its reference mask."""
    both = called & reference
    reference_lesions, found = _components(reference, both)
    called_lesions, confirmed = _components(called, both)
    return Agreement(
        photographs=1,
        reference_px=int(reference.sum()),
        called_px=int(called.sum()),
        both_px=int(both.sum()),
        reference_lesions=reference_lesions,
        found_lesions=found,
        called_lesions=called_lesions,
        false_lesions=called_lesions - confirmed,
    )


def _components(mask: Bool[ndarray, "h w"], marked: Bool[ndarray, "h w"]) -> tuple[int, int]:
    """The number of components of `mask`, and of those that hold a pixel of `marked`, which lies within `mask`."""
    labels = label(mask)
    return int(labels.max()), len(np.unique(labels[marked]))


def kappa(one: Sequence[int], other: Sequence[int], grades: int, *, quadratic: bool) -> float | None:
    """Cohen's kappa of two who graded the same photographs 0 .. grades - 1; None where chance alone would agree.

    Args:
        one: grades by the one.
        other: by the other, in the same order.
        grades: how many there are.
        quadratic: whether a disagreement counts by the square of its steps, else all count alike.
    """
    seen = np.zeros((grades, grades))
    np.add.at(seen, (np.asarray(one, np.int64), np.asarray(other, np.int64)), 1)
    rows, cols = np.indices((grades, grades))
    weight = (rows - cols) ** 2 if quadratic else (rows != cols).astype(np.int64)
    expected = np.outer(seen.sum(axis=1), seen.sum(axis=0)) / max(seen.sum(), 1)
    by_chance = float((weight * expected).sum())
    return 1 - float((weight * seen).sum()) / by_chance if by_chance else None
