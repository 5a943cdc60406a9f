"""Training on Ray: who starts it, its Train workers, and what they tell of it.

samples -> photographs, pools (object store) -> Train workers: the loop of training/loop.py -> checkpoints
"""

from __future__ import annotations

import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import torch
import torch.distributed as dist
from jaxtyping import Float
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError, get_context
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ma_cluster import metrics
from ma_cluster.cluster import recording
from ma_cluster.cluster.connection import answer, check_gpus, connected
from ma_cluster.cluster.training.ledger import LossLedger
from ma_cluster.cluster.training.patch_stream import open_streams, prepare_photographs, read_stream
from ma_cluster.errors import MaClusterError
from ma_cluster.machine import cores
from ma_cluster.training.context import Columns, Cutter, Work, share
from ma_cluster.training.ledger import Ledger
from ma_cluster.training.loop import Listener, Meter, Progress, TrainRun, train
from ma_cluster.training.run import TrainRequest
from ma_cluster.training.start import Start, TrainResult

T = TypeVar("T")


def train_on_ray(request: TrainRequest, on_progress: Callable[[Progress], None] | None = None) -> TrainResult:
    """Train a network from its first step, or the one after its last checkpoint, to its last.

    Args:
        request: what is to be trained.
        on_progress: told how far the run is.

    Raises:
        UsageError: the request or the data are of no use, this machine lacks the GPUs where no cluster is given, or a
            run is there that is not to be resumed.
        RunConflictError: the run to be resumed trains something else.
        StoreError: a store does not answer.
        MaClusterError: what the loop raised on purpose; or workers died too often.
    """
    check_gpus(request.address, request.fewest_and_most[0] * request.gpus_per_worker)
    start = Start.of(request)
    if not start.finished:
        waiting = -(-request.fewest_and_most[1] * request.cpus_per_worker // 1)  # so that patches are cut beside them
        ray_up = connected(request.address, waiting_cpus=int(waiting), object_store_bytes=request.object_store_bytes)
        with ray_up, listening(on_progress) as queue:
            image, (training, validation) = request.recipe.image, start.proposals()
            photographs = prepare_photographs(start.training, request.scale, image, training, request.kinds)
            unseen = prepare_photographs(start.validation, request.scale, image, validation)
            _run_workers(start.run(photographs, unseen, _stored), queue)
    return start.result


@dataclass(frozen=True, slots=True)
class _Stored:
    """A value in the object store."""

    ref: ray.ObjectRef[Any]

    def __call__(self) -> Any:
        return answer(self.ref)


def _stored(function: Callable[..., Any], *arguments: object) -> _Stored:
    return _Stored(ray.remote(function).options(num_cpus=1).remote(*arguments))


def _worker(given: dict[str, Any]) -> None:
    """What each Train worker runs."""
    run: TrainRun = given["run"]
    context = RayContext.join(run.request.threads)
    queue: Queue | None = given["queue"] if context.rank == 0 else None
    train(run, context, Reporter(run.request.network, queue))


def _run_workers(run: TrainRun, queue: Queue | None) -> None:
    """Run the loop in the Train workers to its end; when a worker dies, all start again from the last checkpoint."""
    request = run.request
    resources = {"CPU": request.cpus_per_worker} | ({"GPU": request.gpus_per_worker} if request.gpus_per_worker else {})
    workers: Any = request.workers  # Ray's types know a number only
    scaling = ScalingConfig(num_workers=workers, use_gpu=request.gpus_per_worker > 0, resources_per_worker=resources)
    with tempfile.TemporaryDirectory(prefix="ma-cluster-train-") as scratch:  # checkpoints go to the run's own place
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"run": run, "queue": queue},
            torch_config=TorchConfig(backend="nccl" if request.gpus_per_worker else "gloo"),
            scaling_config=scaling,
            run_config=RunConfig(storage_path=scratch, failure_config=FailureConfig(max_failures=request.max_failures)),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise _cause(error) from error


def _cause(error: TrainingFailedError) -> MaClusterError:
    """What a worker raised on purpose, or a word on what became of them."""
    failures = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []
    for failure in failures:
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, MaClusterError):
                return cause
            cause = getattr(cause, "_base_exc", None) or getattr(cause, "cause", None) or cause.__cause__
    return MaClusterError(f"training stopped: {error}; resume goes on from the last checkpoint")


@dataclass(frozen=True, slots=True)
class RayContext:
    """One worker's view; see `TrainContext`."""

    rank: int
    workers: int
    device: torch.device

    @classmethod
    def join(cls, threads: int | None) -> RayContext:
        """To be called first, in a Train worker; `threads` of torch, by default this worker's part of the node."""
        context = get_context()
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


class Reporter(Listener):
    """Tells of a run: each worker of its patches, the first one of all else, through a queue and the metrics."""

    def __init__(self, stage: str, queue: Queue | None) -> None:
        """`stage` labels the metrics; without a `queue` nobody is told but them."""
        super().__init__(None if queue is None else queue.put)
        self._stage = stage
        for counter in metrics.TRAIN_COUNTERS:
            recording.begin(counter, stage=stage)

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches as they come; the time until each is here counts as waited."""
        began = time.monotonic()
        for batch in batches:
            recording.record(metrics.TRAIN_WAIT, time.monotonic() - began, stage=self._stage)
            yield batch
            began = time.monotonic()

    def step(self, meter: Meter, patches: int) -> None:
        recording.record(metrics.TRAIN_PATCHES, patches, stage=self._stage)
        super().step(meter, patches)

    def epoch(self, progress: Progress) -> None:
        assert progress.epoch is not None
        recording.record(metrics.VALIDATION_AUPR, progress.epoch.average_precision, stage=self._stage)
        super().epoch(progress)

    def tell(self, progress: Progress) -> None:
        for term, value in progress.losses.items():
            recording.record(metrics.TRAIN_LOSS, value, stage=self._stage, term=term)
            if not math.isfinite(value):
                recording.record(metrics.TRAIN_NOT_FINITE, 1, stage=self._stage, term=term)
        super().tell(progress)


@contextmanager
def listening(on_progress: Callable[[Progress], None] | None) -> Iterator[Queue | None]:
    """A queue whose messages are handed on, in a thread of this process, until the block ends."""
    if on_progress is None:
        yield None
        return
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # others may be lost
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    thread = threading.Thread(target=_hand_on, args=(queue, on_progress), name="training-progress", daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        queue.put(None)
        thread.join()
        queue.shutdown()


def _hand_on(queue: Queue, on_progress: Callable[[Progress], None]) -> None:
    while (progress := queue.get()) is not None:
        on_progress(progress)
