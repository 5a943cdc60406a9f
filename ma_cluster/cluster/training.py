"""What both kinds of training share on the side of whoever starts them: the request, its checks, Ray Train, the result.

samples -> photographs, pools (object store) -> Train workers: a loop of train_hgn or train_prn -> checkpoints
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from ma_cluster.cluster.train_folder import BEST, LAST, Epoch, TrainFolder
from ma_cluster.cluster.train_team import BatchNorm
from ma_cluster.config import HgnConfig, PrnConfig, Recipe, Scale, digest, to_dict
from ma_cluster.errors import MaClusterError, UsageError
from ma_cluster.images.datasets import Sample, Split, read_dataset

Network = Literal["hgn_1x", "hgn_half", "prn", "cls"]
HGN_EPOCH_STEPS = 1000
"""The paper's epoch, mini-batches [T]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRequest:
    """A training run: of which network, on what, with how much."""

    network: Network
    """`cls` is the refinement network without its triplet term."""
    data: str
    """URL of the data set: IDRiD's layout, or a manifest."""
    out: str
    """URL of the run: checkpoints and log."""
    recipe: Recipe
    """Of the whole model; the network's own part says how it trains."""
    healthy: str | None = None
    """URL of a folder of photographs without retinopathy, used beside the data set's lesion-free regions."""
    workers: int | tuple[int, int] = 1
    """Train workers; (fewest, most) for as many as the cluster has room for, also after it has shrunk or grown."""
    gpus_per_worker: float = 0.0
    """0 trains on the CPU."""
    cpus_per_worker: float = 0.5
    """What Ray reserves for a worker. Whole ones could leave none for the tasks that cut its patches."""
    threads: int | None = None
    """Of torch in each worker; by default the node's cores, shared by its workers."""
    resume: bool = False
    """Take up the run at `out`, where there is one."""
    address: str | None = None
    """Of a Ray cluster; None for the one that is up in this process, else RAY_ADDRESS's, else a local one."""
    seed: int = 1
    """Of the first weights, the draws and the ledger."""
    steps: int | None = None
    """Optimiser steps in all, instead of the recipe's."""
    epoch_steps: int | None = None
    """Steps between two checkpoints with validation; for the refinement also between two refreshes and draws, by
    default the recipe's `refresh_steps`."""
    selective: bool = True
    """Negatives by their loss; False draws them uniformly (the ablation). The HGNs have none."""
    batch_norm: BatchNorm = "batch"
    """Whose statistics batch norm uses."""
    ledger_shards: int = 1
    """Actors that hold the losses of the healthy pool; one holds 10^8 patches in 430 MB."""
    max_failures: int = 3
    """Workers that may die before the run is given up."""

    def __post_init__(self) -> None:
        fewest, most = self.fewest_and_most
        rows = self.config.triplets if isinstance(self.config, PrnConfig) else self.config.batch_patches
        if not 1 <= fewest <= most <= rows:
            unit = "triplets" if isinstance(self.config, PrnConfig) else "patches"
            raise UsageError(f"a mini-batch of {rows} {unit} can be shared by 1 to {rows} workers, not {self.workers}")
        if self.epoch < 1 or self.config.steps < 1:
            raise UsageError("steps and epoch_steps must be at least 1")

    @property
    def fewest_and_most(self) -> tuple[int, int]:
        """Workers."""
        return (self.workers, self.workers) if isinstance(self.workers, int) else self.workers

    @property
    def config(self) -> HgnConfig | PrnConfig:
        """The network's part of the recipe, with this run's steps and, for `cls`, no triplet term."""
        recipe = self.recipe
        own: dict[str, HgnConfig | PrnConfig] = {"hgn_1x": recipe.hgn_1x, "hgn_half": recipe.hgn_half}
        config = own.get(self.network, recipe.prn)
        if isinstance(config, PrnConfig) and self.network == "cls":
            config = replace(config, triplet_weight=0.0)
        return config if self.steps is None else replace(config, steps=self.steps)

    @property
    def epoch(self) -> int:
        """Steps of an epoch."""
        refresh = self.config.refresh_steps if isinstance(self.config, PrnConfig) else HGN_EPOCH_STEPS
        return refresh if self.epoch_steps is None else self.epoch_steps

    @property
    def scale(self) -> Scale:
        """Of the grid that patches are cut from."""
        if isinstance(self.config, PrnConfig):
            return self.config.scale
        return "1x" if self.network == "hgn_1x" else "0.5x"


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Where a run's checkpoints are, and the records of its epochs."""

    last: str
    best: str
    epochs: tuple[Epoch, ...]


def read_split(request: TrainRequest, split: Split) -> list[Sample]:
    """Photographs of a split whose microaneurysms are all known: they have a mask, or none is to be seen.

    Raises:
        UsageError: none of them has a mask.
    """
    samples = read_dataset(request.data, request.recipe.split, request.healthy)
    known = [sample for sample in samples if sample.split == split and (sample.mask or sample.label == "healthy")]
    if not any(sample.mask for sample in known):
        raise UsageError(f"no photograph of the {split} split has a mask of microaneurysms; check data and split")
    return known


def begin(request: TrainRequest, samples: Sequence[Sample]) -> TrainFolder:
    """The place of a run; see `TrainFolder.begin` for what is raised."""
    what = {
        "network": request.network,
        "image": to_dict(request.recipe.image),
        "training": to_dict(request.config),
        "epoch_steps": request.epoch,
        "seed": request.seed,
        "selective": request.selective,
        "batch_norm": request.batch_norm,
        "photographs": digest([[sample.name, sample.split] for sample in samples]),
    }
    return TrainFolder.begin(request.out, what, resume=request.resume)


def result(folder: TrainFolder) -> TrainResult:
    """Of a run that has ended."""
    return TrainResult(f"{folder.url}/{LAST}", f"{folder.url}/{BEST}", folder.epochs)


def finished(request: TrainRequest, folder: TrainFolder) -> bool:
    """Whether nothing is left to do."""
    epochs = folder.epochs
    return bool(epochs) and epochs[-1].step >= request.config.steps


def run_workers(loop: Callable[[dict[str, Any]], None], job: object, request: TrainRequest) -> None:
    """Run a loop in the Train workers to its end; when a worker dies, all start again from the last checkpoint.

    Args:
        loop: gets {"job": job} in each worker.
        job: all it needs; may hold references to objects that this process keeps in the object store.
        request: how many workers, with what.

    Raises:
        MaClusterError: what the loop raised on purpose; or it failed too often.
    """
    resources = {"CPU": request.cpus_per_worker} | ({"GPU": request.gpus_per_worker} if request.gpus_per_worker else {})
    workers: Any = request.workers  # Ray's types know a number only
    scaling = ScalingConfig(num_workers=workers, use_gpu=request.gpus_per_worker > 0, resources_per_worker=resources)
    with tempfile.TemporaryDirectory(prefix="ma-cluster-train-") as scratch:  # checkpoints go to the run's own place
        trainer = TorchTrainer(
            loop,
            train_loop_config={"job": job},
            torch_config=TorchConfig(backend="nccl" if request.gpus_per_worker else "gloo"),
            scaling_config=scaling,
            run_config=RunConfig(storage_path=scratch, failure_config=FailureConfig(max_failures=request.max_failures)),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise _cause(error) from error


@contextmanager
def ray_for(request: TrainRequest) -> Iterator[None]:
    """Ray as the request wants it: the one that is up in this process, the cluster at an address (of the request, or
    of RAY_ADDRESS, which a submitted job finds set), or a local one."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    on_sigterm = signal.getsignal(signal.SIGTERM)  # ray.init installs its own, which exits with 15
    address = request.address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, **quiet)
    else:
        # logical CPUs for the workers on top of the cores, so that patches are cut beside them
        cpus = (os.cpu_count() or 1) + -(-request.fewest_and_most[1] * request.cpus_per_worker // 1)
        ray.init(address="local", _node_ip_address="127.0.0.1", num_cpus=int(cpus), include_dashboard=False, **quiet)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        ray.shutdown()


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
