"""The Train workers of a run as one of them sees them: who it is, and the few things that they do together.

A mini-batch is shared out, and the sums behind each loss are pooled (`TrainContext.reduce`), so the loss and the
gradient are those of the whole mini-batch and W workers take the step that one would take. Batch norm is the exception:
see `BatchNorm`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from ray import train
from ray.data import DataIterator
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ma_cluster.evaluation.scoring import PixelCounts
from ma_cluster.machine import cores
from ma_cluster.training.request import BatchNorm

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TrainContext:
    """One worker's view. All methods are to be called by all workers, in the same order."""

    rank: int
    workers: int
    device: torch.device

    @classmethod
    def join(cls, threads: int | None) -> TrainContext:
        """To be called first, in a Train worker; `threads` of torch, by default this worker's part of the node."""
        context = train.get_context()
        beside = context.get_local_world_size()
        torch.set_num_threads(threads or max(1, cores() // beside))
        device = get_device()
        assert isinstance(device, torch.device)
        return cls(context.get_world_rank(), context.get_world_size(), device)

    @property
    def first(self) -> bool:
        """Whether this is the worker that speaks and writes for all."""
        return self.rank == 0

    def place(self, model: nn.Module, batch_norm: BatchNorm) -> nn.Module:
        """The model on this worker's device, channels last, with the batch norm wanted; its state keeps its names."""
        if batch_norm == "frozen":
            model = _frozen(model)
        elif self.device.type == "cuda" and self.workers > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are those of all workers; it shares its weights with the one given."""
        return DistributedDataParallel(model) if self.workers > 1 else model

    def reduce(self, sums: Float[Tensor, "k"]) -> Float[Tensor, "k"]:
        """Sums over all workers, with the gradient that makes DDP's mean over workers the whole mini-batch's."""
        pooled: Tensor = sums if self.workers == 1 else _PoolSums.apply(sums, self.workers)  # type: ignore[no-untyped-call]
        return pooled

    def agree(self, model: nn.Module) -> None:
        """Give all workers the first one's running statistics."""
        if self.workers > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def gather(self, mine: T) -> list[T]:
        """What each worker has, by rank, on every worker."""
        if self.workers == 1:
            return [mine]
        theirs: list[Any] = [None] * self.workers
        dist.all_gather_object(theirs, mine)
        return theirs

    def streams(self, open_all: Callable[[int], Sequence[DataIterator]]) -> DataIterator:
        """This worker's stream of those that the first worker opens for all."""
        # by reference, since a broadcast is meant for less than a kilobyte
        opened = [ray.put(list(open_all(self.workers)))] if self.first else None
        told = broadcast_from_rank_zero(opened)
        assert told is not None
        return ray.get(told[0])[self.rank]

    def merge(self, counts: Sequence[PixelCounts]) -> PixelCounts:
        """The pixel counts of all photographs of all workers."""
        parts = [part for theirs in self.gather(list(counts)) for part in theirs]
        return sum(parts[1:], parts[0])


class _PoolSums(torch.autograd.Function):
    """Sums over all workers; the gradient is scaled by their number, since DDP will divide it by that.

    two workers, L = s1 + s2:    DDP takes the mean of 2 ds1 and 2 ds2: ds1 + ds2, as it should be
    """

    @staticmethod
    def forward(ctx: Any, sums: Tensor, workers: int) -> Tensor:
        ctx.workers = workers
        total = sums.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.workers, None


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
