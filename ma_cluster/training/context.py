"""What a training loop asks of where it runs: photographs, mini-batches, and the few things all workers do together.

    Work (a step and the pool ids it is made of) -> a cutter: the rows asked for -> columns of arrays

The rows of a step are a pure function of its number and its ids: whoever cuts them gets the same. A mini-batch is
shared out, and the sums behind each loss are pooled (`TrainContext.reduce`), so the loss and the gradient are those of
the whole mini-batch and W workers take the step that one would take. Batch norm is the exception: see `BatchNorm`.
`InProcess` is the one worker of a process; cluster/training/launch.py has the workers of Ray.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor, nn

from ma_cluster.hypotheses.hgn_training import HgnCuts
from ma_cluster.images.annotated import Annotated, Cuts, Marks, cut
from ma_cluster.images.device_patches import DevicePatches
from ma_cluster.refinement.prn_training import TripletCuts
from ma_cluster.training.ledger import Ledger, LocalLedger
from ma_cluster.training.run import BatchNorm

T = TypeVar("T")
_AHEAD = 4  # mini-batches cut before they are asked for
_CUTTERS = 2  # threads: OpenCV and numpy let others run
Columns = dict[str, Any]
"""Arrays of as many rows: of numpy, or tensors where patches are cut on a device."""
Rows = Int64[ndarray, "n"]


@runtime_checkable
class Photographs(Protocol):
    """Prepared photographs by their number."""

    def __len__(self) -> int: ...

    def fetch(self, numbers: Iterable[int]) -> Mapping[int, Annotated]:
        """Some of them; their arrays are to be read only."""

    def marks(self) -> Sequence[Annotated | Marks]:
        """The masks of all."""

    def cut(self, cuts: Cuts, patch_px: int) -> tuple[Any, Any]:
        """Patches and the lesions in them, as `annotated.cut` has them."""


@dataclass(frozen=True, slots=True)
class LocalPhotographs:
    """Photographs in the memory of this process, and, for patches, in that of the device that trains."""

    photographs: tuple[Annotated, ...]
    on_device: DevicePatches | None = None

    def __len__(self) -> int:
        return len(self.photographs)

    def fetch(self, numbers: Iterable[int]) -> dict[int, Annotated]:
        return {number: self.photographs[number] for number in numbers}

    def marks(self) -> Sequence[Annotated]:
        return self.photographs

    def cut(self, cuts: Cuts, patch_px: int) -> tuple[Any, Any]:
        return cut(self.photographs, cuts, patch_px) if self.on_device is None else self.on_device.cut(cuts, patch_px)


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
        patch, lesion = self.photographs.cut(self.cuts().of_step(work.step, work.ids)[rows], self.patch_px)
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
        patches = {name: self.photographs.cut(cuts[part], self.patch_px)[0] for name, part in parts.items()}
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
        return {"patch": self.photographs.cut(cuts[rows], self.patch_px)[0], "id": work.ids[rows]}


def share(rows: int, worker: int, workers: int) -> range:
    """The rows of a step that a worker gets: one after the other, sizes differ by one at most.

    rows 10, workers 4:    0 1 | 2 3 4 | 5 6 | 7 8 9
    """
    return range(rows * worker // workers, rows * (worker + 1) // workers)


@runtime_checkable
class TrainContext(Protocol):
    """One worker's view. All methods are to be called by all workers, in the same order."""

    @property
    def rank(self) -> int:
        """Number of this worker; 0 speaks and writes for all."""

    @property
    def workers(self) -> int:
        """Number of workers."""

    @property
    def device(self) -> torch.device:
        """Where this worker computes."""

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are those of all workers; it shares its weights with the one given."""

    def reduce(self, sums: Float[Tensor, "k"]) -> Float[Tensor, "k"]:
        """Sums over all workers, with the gradient of the whole mini-batch."""

    def agree(self, model: nn.Module) -> None:
        """Give all workers the first one's running statistics."""

    def gather(self, mine: T) -> list[T]:
        """What each worker has, by rank, on every worker."""

    def batches(self, cutter: Cutter, work: Callable[[], Sequence[Work]], rows: int) -> Iterator[Columns]:
        """This worker's share of the `rows` of each step in turn; `work`, the steps, is asked of the first worker."""

    def ledger(self, size: int, shards: int, initial: float) -> Ledger:
        """A new ledger of a pool, of the first worker alone."""


@dataclass(frozen=True, slots=True)
class InProcess:
    """The only worker: its part is the whole."""

    device: torch.device
    rank: int = 0
    workers: int = 1

    def parallel(self, model: nn.Module) -> nn.Module:
        return model

    def reduce(self, sums: Float[Tensor, "k"]) -> Float[Tensor, "k"]:
        return sums

    def agree(self, model: nn.Module) -> None:
        pass

    def gather(self, mine: T) -> list[T]:
        return [mine]

    def batches(self, cutter: Cutter, work: Callable[[], Sequence[Work]], rows: int) -> Iterator[Columns]:
        with ThreadPoolExecutor(_CUTTERS, thread_name_prefix="cutter") as pool:
            waiting: deque[Future[Columns]] = deque()
            for item in work():
                waiting.append(pool.submit(cutter, item, np.arange(rows)))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def ledger(self, size: int, shards: int, initial: float) -> Ledger:
        return LocalLedger(size, initial)


def place(model: nn.Module, context: TrainContext, batch_norm: BatchNorm) -> nn.Module:
    """The model on this worker's device, channels last, with the batch norm wanted; its state keeps its names."""
    if batch_norm == "frozen":
        model = _frozen(model)
    elif context.device.type == "cuda" and context.workers > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


class _FrozenBatchNorm(nn.BatchNorm2d):
    """Batch norm that uses its running statistics in training too, and leaves them as they are."""

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def _frozen(model: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                frozen = _FrozenBatchNorm(child.num_features, eps=child.eps)
                frozen.load_state_dict(child.state_dict())
                setattr(parent, name, frozen)
    return model
