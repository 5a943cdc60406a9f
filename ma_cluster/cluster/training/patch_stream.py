"""Patches for training as Ray Data streams, cut from photographs that were prepared once and lie in the object store.

    samples -> Photographs (prepared once, may spill) ------.
    step numbers -> blocks (a few steps of one worker) -> cut in Ray Data tasks -> streaming_split -> Train workers

Until a task cuts them, patches exist as numbers only. The rows of a step are a pure function of its number and its ids,
whatever the number of workers: worker w of W takes the rows of `share(rows, w, W)`.

That the right rows reach the right worker rests on how Ray Data's equal split works: it hands each block to the worker
with the fewest rows so far, the first of them where they are equal. Blocks of one size, in order (`preserve_order`), so
go round the workers in turn. To make them of one size where the rows do not divide by the workers, shares are padded
with rows that the reader drops. Each row carries its number, and `read_stream` refuses to go on with another worker's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from jaxtyping import Int64
from numpy import ndarray
from ray.data import DataIterator, ExecutionResources
from ray.exceptions import RayTaskError

from ma_cluster.config import ImageConfig, Scale
from ma_cluster.errors import ImageError, MaClusterError, UsageError
from ma_cluster.hypotheses.proposals import Proposals
from ma_cluster.hypotheses.sampling import HgnCuts
from ma_cluster.images.annotated import Annotated, Cuts, Marks, cut, load_annotated
from ma_cluster.images.datasets import Sample
from ma_cluster.refinement.sampling import TripletCuts

Columns = dict[str, ndarray]
Rows = Int64[ndarray, "n"]
_BLOCK_BYTES = 16 * 2**20  # far below Ray Data's target block size, at which it would split a block
_PREFETCH_BLOCKS = 2
_AHEAD_BYTES = 512 * 2**20  # of the object store: as much as a stream may cut ahead of its readers


@dataclass(frozen=True, slots=True)
class Photographs:
    """Prepared photographs in the object store, by their number. The process that prepared them keeps them there."""

    refs: tuple[ray.ObjectRef[Annotated], ...]
    lesion_px: tuple[int, ...]
    """Lesion pixels of each."""

    def __len__(self) -> int:
        return len(self.refs)

    def fetch(self, numbers: Iterable[int]) -> dict[int, Annotated]:
        """Some of them; their arrays are views into the object store, to be read only."""
        wanted = sorted(set(numbers))
        return dict(zip(wanted, ray.get([self.refs[number] for number in wanted]), strict=True))

    def marks(self) -> list[Marks]:
        """The masks of all. One photograph after the other: together they may not fit the object store."""
        return [ray.get(ref).marks() for ref in self.refs]


def prepare_photographs(
    samples: Sequence[Sample], scale: Scale, config: ImageConfig, proposals: Proposals | None = None
) -> Photographs:
    """Fetch, decode, scale and enhance each sample in a task of its own, and have lesions proposed there.

    Raises:
        UsageError: a photograph cannot be used.
        StoreError: a photograph or mask cannot be read.
    """
    task: Any = ray.remote(_prepare).options(num_cpus=1, num_returns=2)
    propose = ray.put(proposals)
    prepared = [task.remote(sample, scale, config, propose) for sample in samples]
    lesion_px = []
    for number, (_, pixels) in enumerate(prepared, 1):
        try:
            lesion_px.append(ray.get(pixels))
        except RayTaskError as error:
            if isinstance(error.cause, ImageError):
                text = f"photograph {number} of {len(prepared)} in the order of their names is of no use: {error.cause}"
                raise UsageError(text) from None
            if isinstance(error.cause, MaClusterError):
                raise error.cause from None
            raise
    return Photographs(tuple(photograph for photograph, _ in prepared), tuple(lesion_px))


@dataclass(frozen=True, slots=True)
class Work:
    """A step to be cut: its number, and the pool ids that it is made of where its number alone does not say."""

    step: int
    ids: Rows | None = None


Source = Callable[[Work, Rows], Columns]
"""Cuts some rows of a step. Runs in Ray Data tasks."""


@dataclass(frozen=True, slots=True)
class HgnSource:
    """Rows: an augmented patch and its lesion mask."""

    photographs: Photographs
    cuts: ray.ObjectRef[HgnCuts]
    patch_px: int

    def __call__(self, work: Work, rows: Rows) -> Columns:
        cuts = ray.get(self.cuts).of_step(work.step)
        patch, lesion = _cut(self.photographs, cuts, rows, self.patch_px)
        return {"patch": patch, "lesion": lesion}


@dataclass(frozen=True, slots=True)
class TripletSource:
    """Rows: an augmented anchor, positive and negative, and the negative's id. A step's ids are its negatives'."""

    photographs: Photographs
    cuts: ray.ObjectRef[TripletCuts]
    patch_px: int

    def __call__(self, work: Work, rows: Rows) -> Columns:
        assert work.ids is not None
        cuts, ids = ray.get(self.cuts).of_step(work.step, work.ids)
        parts = {"anchor": rows, "positive": rows + len(ids), "negative": rows + 2 * len(ids)}
        patches = {name: _cut(self.photographs, cuts, part, self.patch_px)[0] for name, part in parts.items()}
        return patches | {"id": ids[rows]}


@dataclass(frozen=True, slots=True)
class HealthySource:
    """Rows: a healthy patch of the pool as it is, and its id."""

    photographs: Photographs
    cuts: ray.ObjectRef[TripletCuts]
    patch_px: int

    def __call__(self, work: Work, rows: Rows) -> Columns:
        assert work.ids is not None
        cuts = ray.get(self.cuts).plain(work.ids)
        return {"patch": _cut(self.photographs, cuts, rows, self.patch_px)[0], "id": work.ids[rows]}


def share(rows: int, worker: int, workers: int) -> range:
    """The rows of a step that a worker gets: one after the other, sizes differ by one at most.

    rows 10, workers 4:    0 1 | 2 3 4 | 5 6 | 7 8 9
    """
    return range(rows * worker // workers, rows * (worker + 1) // workers)


def open_streams(source: Source, work: Sequence[Work], rows: int, workers: int) -> list[DataIterator]:
    """A stream for each worker, to be read by `read_stream`; they advance together.

    Args:
        source: cuts the patches.
        work: the steps, in order.
        rows: of each step.
        workers: number of streams; none has no rows.
    """
    steps = _steps_in_block(source, work[0], -(-rows // workers))
    blocks = [
        _block(work[start : start + steps], share(rows, worker, workers))
        for start in range(0, len(work), steps)
        for worker in range(workers)
    ]
    padded = -(-rows // workers)
    dataset = ray.data.from_blocks(blocks)
    options = dataset.context.execution_options
    options.preserve_order = True
    options.resource_limits = ExecutionResources(object_store_memory=_AHEAD_BYTES)
    dataset.context.enable_progress_bars = False
    cutter = partial(_cut_block, source=source, padded=padded)
    return dataset.map_batches(cutter, batch_size=None, batch_format="pyarrow", num_cpus=1).streaming_split(
        workers, equal=True
    )


def read_stream(stream: DataIterator, rows: range) -> Iterator[Columns]:
    """The rows of each step in turn, `rows` of them, as arrays that may be written to.

    Raises:
        RuntimeError: they are another worker's.
    """
    wanted = np.asarray(rows)
    whole: Any = None  # a block at a time
    for block in stream.iter_batches(batch_size=whole, batch_format="numpy", prefetch_batches=_PREFETCH_BLOCKS):
        starts = np.flatnonzero(np.diff(block["step"], prepend=-1))
        for start in starts.tolist():
            mine = slice(start, start + len(rows))  # the rest of the step is filler
            if not np.array_equal(block["row"][mine], wanted):
                step = block["step"][start]
                raise RuntimeError(f"Ray Data sent this worker rows {block['row'][mine]} of step {step}, not {rows}")
            yield {name: values[mine].copy() for name, values in block.items()}


def _block(work: Sequence[Work], rows: range) -> pa.Table:
    columns: dict[str, Any] = {
        "step": [item.step for item in work],
        "first": [rows.start] * len(work),
        "stop": [rows.stop] * len(work),
    }
    if work[0].ids is not None:
        columns["ids"] = pa.array([item.ids for item in work], pa.list_(pa.int64()))
    return pa.table(columns)


def _cut_block(block: pa.Table, *, source: Source, padded: int) -> Columns:
    """Every row of a block of steps, each step padded to the same number of rows."""
    parts = []
    for item in block.to_pylist():
        work = Work(item["step"], None if item.get("ids") is None else np.asarray(item["ids"], np.int64))
        rows = np.arange(item["first"], item["stop"])
        filler = np.repeat(rows[-1:], padded - len(rows))
        columns = source(work, np.concatenate([rows, filler]))
        numbers = np.concatenate([rows, np.full(len(filler), -1)])
        parts.append(columns | {"row": numbers, "step": np.full(padded, work.step)})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _steps_in_block(source: Source, work: Work, rows: int) -> int:
    """How many steps fit a block, by the size of one row of the first."""
    row = sum(values.nbytes for values in source(work, np.zeros(1, np.int64)).values())
    return max(1, _BLOCK_BYTES // (row * rows))


def _cut(photographs: Photographs, cuts: Cuts, rows: Rows, patch_px: int) -> tuple[ndarray, ndarray]:
    mine = cuts[rows]
    return cut(photographs.fetch(mine.centres[:, 0].tolist()), mine, patch_px)


def _prepare(sample: Sample, scale: Scale, config: ImageConfig, propose: Proposals | None) -> tuple[Annotated, int]:
    """The photograph, and apart from it, so that nobody need fetch it to know, how many lesion pixels it has."""
    photograph = load_annotated(sample, scale, config, propose)
    return photograph, int(photograph.lesion.sum())
