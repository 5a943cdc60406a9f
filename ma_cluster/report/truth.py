"""The masks of an archive run against the reference masks of a data set: what was found, missed and invented."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from ma_cluster.archive.retry import latest_outcomes
from ma_cluster.archive.run import Run
from ma_cluster.archive.summary import open_run
from ma_cluster.config import SplitConfig
from ma_cluster.errors import UsageError
from ma_cluster.evaluation.scoring import label
from ma_cluster.images.datasets import Sample, decode_mask, read_dataset, read_object
from ma_cluster.storage.store import Store


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


def compare_run(dest_url: str, data_url: str) -> Agreement:
    """Pool the agreement over the data set's test split, photographs matched by the stem of their name.

    Raises:
        UsageError: there is no run, the data set has no test split, or a stem is not unique in the run.
        StoreError: a mask cannot be read.
    """
    samples = [sample for sample in read_dataset(data_url, SplitConfig()) if sample.split == "test"]
    if not samples:
        raise UsageError(f"{data_url} has no photographs in its test split to compare with")
    dest, run = open_run(dest_url)
    masks = _masks_by_stem(dest, run)
    return sum((_compare_sample(sample, masks.get(sample.name), dest) for sample in samples), Agreement())


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
        false_lesions=called_lesions - confirmed,
    )


def _compare_sample(sample: Sample, mask_key: str | None, dest: Store) -> Agreement:
    reference = None if sample.mask is None else decode_mask(read_object(sample.mask))
    called = None if mask_key is None else decode_mask(dest.get(mask_key))
    if reference is None and called is None:
        return Agreement(photographs=1, unscored=1)
    if called is None or reference is None:
        empty = np.zeros_like(called if reference is None else reference)
        reference = empty if reference is None else reference
        return agree(empty if called is None else called, reference) + Agreement(unscored=int(called is None))
    if called.shape != reference.shape:
        raise UsageError(
            f"the run's mask of {sample.name} is {called.shape[1]} x {called.shape[0]} pixels, the reference "
            f"{reference.shape[1]} x {reference.shape[0]}: these are not the photographs that were scored"
        )
    return agree(called, reference)


def _components(mask: Bool[ndarray, "h w"], marked: Bool[ndarray, "h w"]) -> tuple[int, int]:
    """The number of components of `mask`, and of those that hold a pixel of `marked`, which lies within `mask`."""
    labels = label(mask)
    return int(labels.max()), len(np.unique(labels[marked]))


def _masks_by_stem(dest: Store, run: Run) -> dict[str, str]:
    """Mask keys of the scored photographs."""
    masks: dict[str, str] = {}
    for outcomes in latest_outcomes(dest, run, ["mask_key"]):
        for row in outcomes.to_pylist():
            stem, mask_key = PurePosixPath(row["key"]).stem, row["mask_key"]
            if mask_key is not None and masks.setdefault(stem, mask_key) != mask_key:
                raise UsageError(f"the run holds two photographs named {stem}; they cannot be told apart")
    return masks
