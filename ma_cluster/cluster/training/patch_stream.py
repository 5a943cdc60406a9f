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

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy import ndarray
from ray.data import DataIterator, ExecutionResources

from ma_cluster.cluster.connection import answer
from ma_cluster.config import ImageConfig, Scale
from ma_cluster.images.annotated import Annotated, Cuts, Marks, cut, load_annotated
from ma_cluster.images.datasets import Sample, look_at_each
from ma_cluster.training.checkpoints import Proposals
from ma_cluster.training.context import Columns, Cutter, Work, share

_BLOCK_BYTES = 16 * 2**20  # far below Ray Data's target block size, at which it would split a block
_PREFETCH_BLOCKS = 2
_AHEAD_BYTES = 512 * 2**20  # of the object store: as much as a stream may cut ahead of its readers


@dataclass(frozen=True, slots=True)
class StoredPhotographs:
    """Prepared photographs in the object store, by their number. The process that prepared them keeps them there."""

    refs: tuple[ray.ObjectRef[Annotated], ...]

    def __len__(self) -> int:
        return len(self.refs)

    def fetch(self, numbers: Iterable[int]) -> dict[int, Annotated]:
        """Some of them; their arrays are views into the object store, to be read only."""
        wanted = sorted(set(numbers))
        return dict(zip(wanted, ray.get([self.refs[number] for number in wanted]), strict=True))

    def marks(self) -> list[Marks]:
        """The masks of all. One photograph after the other: together they may not fit the object store."""
        return [ray.get(ref).marks() for ref in self.refs]

    def cut(self, cuts: Cuts, patch_px: int) -> tuple[ndarray, ndarray]:
        """Patches and the lesions in them."""
        return cut(self.fetch(cuts.centres[:, 0].tolist()), cuts, patch_px)


def prepare_photographs(
    samples: Sequence[Sample],
    scale: Scale,
    config: ImageConfig,
    proposals: Proposals | None = None,
    kinds: Sequence[str] = (),
) -> StoredPhotographs:
    """Fetch, decode, scale and enhance each sample in a task of its own, and have lesions proposed there.

    Args: see `load_annotated`.

    Raises:
        UsageError: a photograph cannot be used.
        StoreError: a photograph or mask cannot be read.
    """
    task: Any = ray.remote(_prepare).options(num_cpus=1, num_returns=2)
    propose = ray.put(proposals)
    prepared = [task.remote(sample, scale, config, propose, kinds) for sample in samples]
    look_at_each(prepared, lambda pair: answer(pair[1]))
    return StoredPhotographs(tuple(photograph for photograph, _ in prepared))


def open_streams(cutter: Cutter, work: Sequence[Work], rows: int, workers: int) -> list[DataIterator]:
    """A stream for each worker, to be read by `read_stream`; they advance together.

    Args:
        cutter: cuts the patches, in Ray Data tasks.
        work: the steps, in order.
        rows: of each step.
        workers: number of streams; none has no rows.
    """
    steps = _steps_in_block(cutter, work[0], -(-rows // workers))
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
    task = partial(_cut_block, cutter=cutter, padded=padded)
    return dataset.map_batches(task, batch_size=None, batch_format="pyarrow", num_cpus=1).streaming_split(
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


def _cut_block(block: pa.Table, *, cutter: Cutter, padded: int) -> Columns:
    """Every row of a block of steps, each step padded to the same number of rows."""
    parts = []
    for item in block.to_pylist():
        work = Work(item["step"], None if item.get("ids") is None else np.asarray(item["ids"], np.int64))
        rows = np.arange(item["first"], item["stop"])
        filler = np.repeat(rows[-1:], padded - len(rows))
        columns = cutter(work, np.concatenate([rows, filler]))
        numbers = np.concatenate([rows, np.full(len(filler), -1)])
        parts.append(columns | {"row": numbers, "step": np.full(padded, work.step)})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _steps_in_block(cutter: Cutter, work: Work, rows: int) -> int:
    """How many steps fit a block, by the size of one row of the first."""
    row = sum(values.nbytes for values in cutter(work, np.zeros(1, np.int64)).values())
    return max(1, _BLOCK_BYTES // (row * rows))


def _prepare(
    sample: Sample, scale: Scale, config: ImageConfig, propose: Proposals | None, kinds: Sequence[str]
) -> tuple[Annotated, None]:
    """The photograph, and apart from it, so that nobody need fetch it to know, that it is there."""
    return load_annotated(sample, scale, config, propose, kinds), None
