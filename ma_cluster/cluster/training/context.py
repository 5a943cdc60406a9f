"""The Train workers of Ray as a `TrainContext`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import torch
import torch.distributed as dist
from jaxtyping import Float
from ray import train
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ma_cluster.cluster.training.ledger import LossLedger
from ma_cluster.cluster.training.patch_stream import open_streams, read_stream
from ma_cluster.machine import cores
from ma_cluster.training.batches import Columns, Cutter, Work, share
from ma_cluster.training.ledger import Ledger

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RayContext:
    """One worker's view; see `TrainContext`."""

    rank: int
    workers: int
    device: torch.device

    @classmethod
    def join(cls, threads: int | None) -> RayContext:
        """To be called first, in a Train worker; `threads` of torch, by default this worker's part of the node."""
        context = train.get_context()
        beside = context.get_local_world_size()
        torch.set_num_threads(threads or max(1, cores() // beside))
        device = get_device()
        assert isinstance(device, torch.device)
        return cls(context.get_world_rank(), context.get_world_size(), device)

    def parallel(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model) if self.workers > 1 else model

    def reduce(self, sums: Float[Tensor, "k"]) -> Float[Tensor, "k"]:
        pooled: Tensor = sums if self.workers == 1 else _PoolSums.apply(sums, self.workers)  # type: ignore[no-untyped-call]
        return pooled

    def agree(self, model: nn.Module) -> None:
        if self.workers > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def gather(self, mine: T) -> list[T]:
        if self.workers == 1:
            return [mine]
        theirs: list[Any] = [None] * self.workers
        dist.all_gather_object(theirs, mine)
        return theirs

    def batches(self, cutter: Cutter, work: Callable[[], Sequence[Work]], rows: int) -> Iterator[Columns]:
        # by reference, since a broadcast is meant for less than a kilobyte
        opened = [ray.put(open_streams(cutter, work(), rows, self.workers))] if self.rank == 0 else None
        told = broadcast_from_rank_zero(opened)
        assert told is not None
        return read_stream(ray.get(told[0])[self.rank], share(rows, self.rank, self.workers))

    def ledger(self, size: int, shards: int, initial: float) -> Ledger:
        return LossLedger.create(size, shards=shards, initial=initial)


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
