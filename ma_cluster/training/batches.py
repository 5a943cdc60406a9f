"""Mini-batches as numbers, and how their rows become patches: the same in one process and in tasks of a cluster.

    Work (a step and the pool ids it is made of) -> a cutter: the rows asked for -> columns of arrays

The rows of a step are a pure function of its number and its ids: whoever cuts them gets the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Int64
from numpy import ndarray

from ma_cluster.hypotheses.sampling import HgnCuts
from ma_cluster.images.annotated import Annotated, Cuts, Marks, cut
from ma_cluster.refinement.sampling import TripletCuts

Columns = dict[str, ndarray]
Rows = Int64[ndarray, "n"]


@runtime_checkable
class Photographs(Protocol):
    """Prepared photographs by their number."""

    def __len__(self) -> int: ...

    def fetch(self, numbers: Iterable[int]) -> Mapping[int, Annotated]:
        """Some of them; their arrays are to be read only."""

    def marks(self) -> Sequence[Annotated | Marks]:
        """The masks of all."""


@dataclass(frozen=True, slots=True)
class LocalPhotographs:
    """Photographs in the memory of this process."""

    photographs: tuple[Annotated, ...]

    def __len__(self) -> int:
        return len(self.photographs)

    def fetch(self, numbers: Iterable[int]) -> dict[int, Annotated]:
        return {number: self.photographs[number] for number in numbers}

    def marks(self) -> Sequence[Annotated]:
        return self.photographs


@dataclass(frozen=True, slots=True)
class Work:
    """A step to be cut: its number, and the pool ids that it is made of where its number alone does not say."""

    step: int
    ids: Rows | None = None


Cutter = Callable[[Work, Rows], Columns]
"""Cuts some rows of a step."""


@dataclass(frozen=True, slots=True)
class HgnCutter:
    """Rows: an augmented patch and the lesions in it, as `cut` has them. A step's ids are its hard places'."""

    photographs: Photographs
    cuts: Callable[[], HgnCuts]
    patch_px: int

    def __call__(self, work: Work, rows: Rows) -> Columns:
        patch, lesion = _cut(self.photographs, self.cuts().of_step(work.step, work.ids), rows, self.patch_px)
        return {"patch": patch, "lesion": lesion}


@dataclass(frozen=True, slots=True)
class TripletCutter:
    """Rows: an augmented anchor, positive and negative, and the negative's id. A step's ids are its negatives'."""

    photographs: Photographs
    cuts: Callable[[], TripletCuts]
    patch_px: int

    def __call__(self, work: Work, rows: Rows) -> Columns:
        assert work.ids is not None
        cuts = self.cuts().of_step(work.step, work.ids)
        parts = {"anchor": rows, "positive": rows + len(work.ids), "negative": rows + 2 * len(work.ids)}
        patches = {name: _cut(self.photographs, cuts, part, self.patch_px)[0] for name, part in parts.items()}
        return patches | {"id": work.ids[rows]}


@dataclass(frozen=True, slots=True)
class HealthyCutter:
    """Rows: a healthy patch of the pool as it is, and its id."""

    photographs: Photographs
    cuts: Callable[[], TripletCuts]
    patch_px: int

    def __call__(self, work: Work, rows: Rows) -> Columns:
        assert work.ids is not None
        cuts = self.cuts().plain(work.ids)
        return {"patch": _cut(self.photographs, cuts, rows, self.patch_px)[0], "id": work.ids[rows]}


def share(rows: int, worker: int, workers: int) -> range:
    """The rows of a step that a worker gets: one after the other, sizes differ by one at most.

    rows 10, workers 4:    0 1 | 2 3 4 | 5 6 | 7 8 9
    """
    return range(rows * worker // workers, rows * (worker + 1) // workers)


def _cut(photographs: Photographs, cuts: Cuts, rows: Rows, patch_px: int) -> tuple[ndarray, ndarray]:
    mine = cuts[rows]
    return cut(photographs.fetch(mine.centres[:, 0].tolist()), mine, patch_px)
