"""Training on Ray, from the side of whoever starts it: photographs, Train workers, progress.

samples -> photographs, pools (object store) -> Train workers: the loop of training/loop.py -> checkpoints
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue

from ma_cluster.cluster.connection import check_gpus, connected
from ma_cluster.cluster.training.context import RayContext
from ma_cluster.cluster.training.patch_stream import prepare_photographs
from ma_cluster.cluster.training.reporting import Reporter, listening
from ma_cluster.errors import MaClusterError
from ma_cluster.training.loop import TrainRun, train
from ma_cluster.training.progress import Progress
from ma_cluster.training.request import TrainRequest
from ma_cluster.training.start import Start, TrainResult


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
        return ray.get(self.ref)


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
