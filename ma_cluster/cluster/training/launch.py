"""What both kinds of training share on the side of whoever starts them: data, Ray, the Train workers, the result.

samples -> photographs, pools (object store) -> Train workers: a loop of train_hgn or train_prn -> checkpoints
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue
from safetensors.torch import save
from torch import Tensor, nn

from ma_cluster import __version__
from ma_cluster.bundle import load_bundle, load_weights
from ma_cluster.checkpoint import BEST, LAST, checkpoint_weights, read_checkpoint
from ma_cluster.cluster.connection import connected
from ma_cluster.cluster.training.patch_stream import Photographs, prepare_photographs
from ma_cluster.cluster.training.reporting import listening
from ma_cluster.config import PrnConfig, digest, to_dict
from ma_cluster.errors import MaClusterError, UsageError
from ma_cluster.hypotheses.proposals import Proposals
from ma_cluster.images.datasets import Sample, Split, read_dataset
from ma_cluster.lesions.detector import build_network
from ma_cluster.training.progress import Progress
from ma_cluster.training.request import TrainRequest
from ma_cluster.training.run_folder import Epoch, TrainFolder

Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Where a run's checkpoints are, and the records of its epochs."""

    last: str
    best: str
    epochs: tuple[Epoch, ...]


@dataclass(frozen=True, slots=True)
class RunContext:
    """What every worker of a run stands on."""

    request: TrainRequest
    folder: TrainFolder
    training: Photographs
    validation: Photographs
    queue: Queue | None
    first_weights: Weights | None

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Weights and optimiser as of the run's last checkpoint, or the first weights; returns the steps done.

        Raises:
            BundleError: they are damaged, or of another network.
        """
        done = self.folder.restore(model, optimizer)
        if done is None and self.first_weights is not None:
            load_weights(model, self.first_weights, "the network that training is to begin with")
        return done or 0


def run(
    request: TrainRequest,
    job_of: Callable[[RunContext], object],
    loop: Callable[[dict[str, Any]], None],
    on_progress: Callable[[Progress], None] | None,
) -> TrainResult:
    """Train a network from its first step, or the one after its last checkpoint, to its last.

    Args:
        request: what is to be trained.
        job_of: all that a worker needs, made once Ray is up and the photographs are prepared; it may hold references
            to objects of this process in the object store.
        loop: what each worker runs; gets {"job": the job}.
        on_progress: told how far the run is.

    Raises:
        UsageError: the request or the data are of no use, or a run is there that is not to be resumed.
        RunConflictError: the run to be resumed trains something else.
        StoreError: a store does not answer.
        MaClusterError: what the loop raised on purpose; or workers died too often.
    """
    training, validation = _read_split(request, "training"), _read_split(request, "validation")
    first_weights = _first_weights(request)
    folder = _begin(request, [*training, *validation], first_weights)
    if not _finished(request, folder):
        proposals = Proposals(request.hgn_half, request.recipe) if request.hgn_half else None
        image = request.recipe.image
        waiting = -(-request.fewest_and_most[1] * request.cpus_per_worker // 1)  # so that patches are cut beside them
        ray_up = connected(request.address, waiting_cpus=int(waiting), object_store_bytes=request.object_store_bytes)
        with ray_up, listening(on_progress) as queue:
            photographs = prepare_photographs(training, request.scale, image, proposals)
            asked = proposals if isinstance(request.config, PrnConfig) else None  # an HGN validates everywhere
            unseen = prepare_photographs(validation, request.scale, image, asked)
            _run_workers(loop, job_of(RunContext(request, folder, photographs, unseen, queue, first_weights)), request)
    return TrainResult(f"{folder.url}/{LAST}", f"{folder.url}/{BEST}", folder.epochs)


def _read_split(request: TrainRequest, split: Split) -> list[Sample]:
    """Photographs of a split whose microaneurysms are all known: they have a mask, or none is to be seen.

    Raises:
        UsageError: none of them has a mask.
    """
    samples = read_dataset(request.data, request.recipe.split, request.healthy)
    known = [sample for sample in samples if sample.split == split and (sample.mask or sample.label == "healthy")]
    if not any(sample.mask for sample in known):
        raise UsageError(f"no photograph of the {split} split has a mask of microaneurysms; check data and split")
    return known


def _first_weights(request: TrainRequest) -> Weights | None:
    """Of `request.init`.

    Raises:
        UsageError: there is no such checkpoint, or the model lacks the network.
        BundleError: there is no such model, it is damaged, or its network is another.
    """
    if request.init is None:
        return None
    if request.init.endswith(".safetensors"):
        weights = checkpoint_weights(read_checkpoint(request.init), "the file that training is to begin with")
    else:
        networks = load_bundle(request.init).weights
        if request.network not in networks:
            raise UsageError(f"model {request.init} has no network {request.network} to begin with")
        weights = networks[request.network]
    network = build_network(request.network, request.recipe)
    load_weights(network, weights, "the network that training is to begin with")  # does it fit?
    return weights


def _begin(request: TrainRequest, samples: Sequence[Sample], first_weights: Weights | None) -> TrainFolder:
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
        "recipe": to_dict(request.recipe),
        "version": __version__,
    }
    if request.hgn_half:
        what["hgn_half"] = hashlib.sha256(read_checkpoint(request.hgn_half)).hexdigest()
    if first_weights is not None:
        what["init"] = hashlib.sha256(save(first_weights)).hexdigest()
    return TrainFolder.begin(request.out, what, resume=request.resume)


def _finished(request: TrainRequest, folder: TrainFolder) -> bool:
    """Whether nothing is left to do."""
    epochs = folder.epochs
    return bool(epochs) and epochs[-1].step >= request.config.steps


def _run_workers(loop: Callable[[dict[str, Any]], None], job: object, request: TrainRequest) -> None:
    """Run a loop in the Train workers to its end; when a worker dies, all start again from the last checkpoint."""
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
