"""How a run begins, wherever it runs: its data, its place, its first weights, its stage; and the run in this process.

request -> samples -> place (run.json) -> photographs -> stage -> loop -> checkpoints
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import nn

from ma_cluster import __version__
from ma_cluster.bundle import load_bundle, load_weights
from ma_cluster.config import HgnConfig, PrnConfig, digest, recipe_from_dict, to_dict
from ma_cluster.errors import UsageError
from ma_cluster.hypotheses.frrn import build_hgn, of_kinds
from ma_cluster.hypotheses.hgn_training import HgnCuts
from ma_cluster.images.annotated import Annotated, Marks, load_annotated
from ma_cluster.images.datasets import Sample, look_at_each, read_split
from ma_cluster.images.device_patches import DevicePatches
from ma_cluster.machine import cores
from ma_cluster.networks import checked_device
from ma_cluster.refinement.prn_training import TripletCuts
from ma_cluster.refinement.resnet import build_prn
from ma_cluster.training.checkpoints import BEST, LAST, Proposals, checkpoint_about, checkpoint_weights, read_checkpoint
from ma_cluster.training.context import InProcess, LocalPhotographs, Photographs
from ma_cluster.training.loop import Clock, Listener, Progress, TrainRun, Weights, train
from ma_cluster.training.run import Epoch, TrainFolder, TrainRequest
from ma_cluster.training.stages import HgnStage, PrnStage, Stage

log = logging.getLogger(__name__)
T = TypeVar("T")
_LOADERS = 16  # photographs read at a time: of 12 megapixels each takes 0.3 GB meanwhile
_PHOTOGRAPHS_SHARE = 1 / 3  # of a GPU's free memory


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Where a run's checkpoints are, and the records of its epochs."""

    last: str
    best: str
    epochs: tuple[Epoch, ...]


@dataclass(frozen=True, slots=True)
class Start:
    """A run that has its place, before any photograph is read."""

    request: TrainRequest
    folder: TrainFolder
    training: list[Sample]
    validation: list[Sample]
    first_weights: Weights | None

    @classmethod
    def of(cls, request: TrainRequest) -> Start:
        """Claim a run's place, or take up the run that is there.

        Raises:
            UsageError: the request or the data are of no use, or a run is there that is not to be resumed.
            RunConflictError: the run to be resumed trains something else.
            BundleError: the first weights are damaged or of another network.
            StoreError: a store does not answer.
        """
        data, split = request.data, request.recipe.split
        training, validation = (read_split(data, split, part, request.healthy) for part in ("training", "validation"))
        alone = sum(not sample.others_known for sample in training)
        if alone and len(request.kinds) > 1:
            log.warning(
                "on %d of %d photographs microaneurysms alone are outlined: of %s they teach nothing",
                *(alone, len(training), ", ".join(request.kinds[1:])),
            )
        first_weights = _first_weights(request)
        folder = _begin(request, [*training, *validation], first_weights)
        return cls(request, folder, training, validation, first_weights)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        step = self.folder.step
        return step is not None and step >= self.request.config.steps

    @property
    def result(self) -> TrainResult:
        """As of now."""
        return TrainResult(f"{self.folder.url}/{LAST}", f"{self.folder.url}/{BEST}", self.folder.epochs)

    def proposals(self) -> tuple[Proposals | None, Proposals | None]:
        """Who proposes lesions on photographs that train, and on those that validate."""
        request = self.request
        proposals = Proposals(request.hgn_half, request.recipe) if request.hgn_half else None
        return proposals, proposals if isinstance(request.config, PrnConfig) else None  # an HGN validates everywhere

    def run(self, photographs: Photographs, unseen: Photographs, keep: Callable[..., Callable[[], Any]]) -> TrainRun:
        """What the loop takes.

        Args:
            photographs: that train.
            unseen: that validate.
            keep: (function, arguments) -> how to get at what it returns, from any worker.
        """
        request, config = self.request, self.request.config
        stage: Stage
        if isinstance(config, HgnConfig):
            cuts = keep(_hgn_cuts, photographs, config, request.seed)
            stage = HgnStage(request, config, cuts, photographs, unseen, cuts().hard_pool)
        else:
            cuts = keep(_triplet_cuts, photographs, config, request.seed)
            stage = PrnStage(request, config, cuts, photographs, unseen, cuts().healthy)
        return TrainRun(request, stage, self.folder, self.first_weights, [sample.name for sample in self.training])


def train_local(
    request: TrainRequest, device: str = "cpu", on_progress: Callable[[Progress], None] | None = None
) -> TrainResult:
    """Train a network in this process, from its first step, or the one after its last checkpoint, to its last.

    Args:
        request: what is to be trained; its workers, GPUs, ledger shards and address are for a cluster.
        device: of torch.
        on_progress: told how far the run is.

    Raises:
        UsageError: a photograph or the device cannot be used; and see `Start.of` for this and more.
    """
    place, clock = checked_device(device), Clock(request.minutes)
    start = Start.of(request)
    if not start.finished:
        torch.set_num_threads(request.threads or cores())
        training, validation = start.proposals()
        photographs = _on_device(_load(request, start.training, training, request.kinds), place)
        run = start.run(photographs, _load(request, start.validation, validation), _kept)
        train(run, InProcess(place), Listener(on_progress), clock)
    return start.result


def _load(
    request: TrainRequest, samples: Sequence[Sample], propose: Proposals | None, kinds: Sequence[str] = ()
) -> LocalPhotographs:
    def load(sample: Sample) -> Annotated:
        return load_annotated(sample, request.scale, request.recipe.image, propose, kinds)

    with ThreadPoolExecutor(min(_LOADERS, request.threads or cores())) as pool:
        waiting = [pool.submit(load, sample) for sample in samples]
        try:
            return LocalPhotographs(tuple(look_at_each(waiting, lambda photograph: photograph.result())))
        finally:
            pool.shutdown(cancel_futures=True)


def _on_device(photographs: LocalPhotographs, device: torch.device) -> LocalPhotographs:
    """The photographs with their patches cut on a GPU, where it has room for them beside the network."""
    if device.type != "cuda":
        return photographs
    free, _ = torch.cuda.mem_get_info(device)
    if DevicePatches.bytes_of(photographs.photographs) > _PHOTOGRAPHS_SHARE * free:
        log.info("photographs take more than a third of the GPU's memory: patches are cut on the CPU, more slowly")
        return photographs
    return LocalPhotographs(photographs.photographs, DevicePatches(photographs.photographs, device))


def _kept(function: Callable[..., T], *arguments: object) -> Callable[[], T]:
    value = function(*arguments)
    return lambda: value


def _hgn_cuts(photographs: Photographs, config: HgnConfig, seed: int) -> HgnCuts:
    return HgnCuts(_with_lesions(photographs), config, seed)


def _triplet_cuts(photographs: Photographs, config: PrnConfig, seed: int) -> TripletCuts:
    return TripletCuts(_with_lesions(photographs), config, seed)


def _with_lesions(photographs: Photographs) -> Sequence[Annotated | Marks]:
    """What to cut is chosen by. Raises UsageError: no mask holds a lesion."""
    marks = photographs.marks()
    if not any(photograph.lesion.any() for photograph in marks):
        raise UsageError("the masks of the training photographs outline nothing to learn; check the data")
    return marks


def _first_weights(request: TrainRequest) -> Weights | None:
    """Of `request.init`.

    Raises:
        UsageError: there is no such checkpoint, or the model lacks the network.
        BundleError: there is no such model, it is damaged, or its network is another.
    """
    if request.init is None:
        return None
    name = "the file that training is to begin with"
    if request.init.endswith(".safetensors"):
        data = read_checkpoint(request.init)
        weights, said = checkpoint_weights(data, name), checkpoint_about(data, name).get("recipe")
        recipe = None if said is None else recipe_from_dict(said)
    else:
        bundle = load_bundle(request.init)
        if request.network not in bundle.weights:
            raise UsageError(f"model {request.init} has no network {request.network} to begin with")
        weights, recipe = bundle.weights[request.network], bundle.recipe
    config = request.config
    if recipe is not None and recipe.split.validation != request.recipe.split.validation:
        log.warning("the weights that training begins with are of another fold: photographs that validate trained them")
    if isinstance(config, HgnConfig):
        network: nn.Module = build_hgn(config, len(config.kinds))
        weights = of_kinds(weights, len(config.kinds))
    else:
        network = build_prn(config)
    load_weights(network, weights, "the network that training is to begin with")  # does it fit?
    return weights


def _begin(request: TrainRequest, samples: Sequence[Sample], first_weights: Weights | None) -> TrainFolder:
    """The place of a run; see `TrainFolder.begin` for what is raised."""
    what: dict[str, Any] = {
        "network": request.network,
        "image": to_dict(request.recipe.image),
        "training": to_dict(request.config),
        "epoch_steps": request.epoch,
        "seed": request.seed,
        "batch_norm": request.batch_norm,
        "photographs": digest([[sample.name, sample.split] for sample in samples]),
        "recipe": to_dict(request.recipe),
        "version": __version__,
    }
    if request.minutes is not None:
        what["minutes"] = request.minutes
    if isinstance(request.config, PrnConfig):
        what["selective"] = request.selective
    if request.hgn_half:
        what["hgn_half"] = hashlib.sha256(read_checkpoint(request.hgn_half)).hexdigest()
    if first_weights is not None:
        what["init"] = hashlib.sha256(save(first_weights)).hexdigest()
    return TrainFolder.begin(request.out, what, resume=request.resume)
