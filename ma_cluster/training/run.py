"""A training run: what is to be trained, on what, with how much, and its place in the object store.

    run.json            what is trained: network, recipe, seed; create-only
    last.safetensors    weights, optimiser, step: where a run goes on
    best.safetensors    the same, at the epoch of the best validation figure
    log.json            a record of each epoch
    tensorboard/        the same for TensorBoard, an event file for each epoch; where tensorboardX is installed
    ledger-0, -1/       losses of the healthy pool, where it has one; `last` names one, the other is being written
    costliest.json      the patches of the highest losses among them, as pictures

`last.safetensors` is written after all that belongs to its step: a run cut short anywhere goes on from there.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ma_cluster.config import HgnConfig, PrnConfig, Recipe, Scale
from ma_cluster.errors import ObjectMissingError, RunConflictError, UsageError
from ma_cluster.storage.store import open_store
from ma_cluster.training.checkpoints import BEST, LAST, checkpoint_bytes, restore_checkpoint

Network = Literal["hgn_1x", "hgn_half", "prn", "cls"]
BatchNorm = Literal["batch", "frozen"]
"""Whose statistics batch norm uses. `batch`: the mini-batch's: of the whole on GPUs (SyncBatchNorm), of each worker's
part on CPUs, where torch has no other; the running ones are then those of the first worker. `frozen`: the running ones,
which are not updated."""
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
    """URL of photographs without retinopathy, a folder or a table of grades: a hypothesis network draws its healthy and
    hard shares from them, the refinement its negatives as its recipe says."""
    hgn_half: str | None = None
    """URL of a checkpoint of the 0.5x hypothesis network. Where it suspects lesions that are none, the refinement then
    takes its healthy patches, and a hypothesis network a share of its mini-batches; else from anywhere."""
    init: str | None = None
    """What training begins with instead of random weights: a model's name or folder, or the URL of a checkpoint
    (`.safetensors`) of the same network."""
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
    object_store_bytes: int | None = None
    """Memory of a local Ray's object store; photographs beyond it are spilled to disk. None: Ray's 30 % of memory. A
    cluster has its own."""
    address: str | None = None
    """Of a Ray cluster; None for the one that is up in this process, else RAY_ADDRESS's, else a local one."""
    seed: int = 1
    """Of the first weights, the draws and the ledger."""
    steps: int | None = None
    """Optimiser steps in all, instead of the recipe's; the warm-up then takes a tenth of them at most."""
    minutes: float | None = None
    """Time for the run, reading its photographs included: it ends when that is up, its learning rate follows the clock
    where the steps would last longer, and epochs take a minute, but for the first and the last. For a run in one
    process."""
    learning_rate: float | None = None
    """Peak rate, instead of the recipe's: a network that has learnt already wants a lower one."""
    epoch_steps: int | None = None
    """Steps between two checkpoints with validation; for the refinement also between two refreshes and draws, by
    default the recipe's `refresh_steps`."""
    selective: bool = True
    """The refinement's negatives by their loss; False draws them uniformly (the ablation). A hypothesis network's hard
    places are by their loss whatever this says."""
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
        if self.minutes is not None and (self.resume or self.minutes <= 0):
            raise UsageError(
                "a run by the clock has minutes above 0, and is not resumed: begin another with its weights"
            )
        if self.epoch < 1 or self.config.steps < 1:
            raise UsageError("steps and epoch_steps must be at least 1")

    @property
    def fewest_and_most(self) -> tuple[int, int]:
        """Workers."""
        return (self.workers, self.workers) if isinstance(self.workers, int) else self.workers

    @property
    def config(self) -> HgnConfig | PrnConfig:
        """The network's part of the recipe, with this run's steps and rate and, for `cls`, no triplet term."""
        recipe = self.recipe
        own: dict[str, HgnConfig | PrnConfig] = {"hgn_1x": recipe.hgn_1x, "hgn_half": recipe.hgn_half}
        config = own.get(self.network, recipe.prn)
        if isinstance(config, PrnConfig) and self.network == "cls":
            config = replace(config, triplet_weight=0.0)
        steps = config.steps if self.steps is None else self.steps
        rate = config.learning_rate if self.learning_rate is None else self.learning_rate
        warmup = config.warmup_steps if self.steps is None else min(config.warmup_steps, steps // 10)
        return replace(config, steps=steps, learning_rate=rate, warmup_steps=warmup)

    @property
    def epoch(self) -> int:
        """Steps of an epoch."""
        refresh = self.config.refresh_steps if isinstance(self.config, PrnConfig) else HGN_EPOCH_STEPS
        return refresh if self.epoch_steps is None else self.epoch_steps

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of lesions whose masks training asks for."""
        return self.config.kinds if isinstance(self.config, HgnConfig) else ()

    @property
    def scale(self) -> Scale:
        """Of the grid that patches are cut from."""
        if isinstance(self.config, PrnConfig):
            return self.config.scale
        return "1x" if self.network == "hgn_1x" else "0.5x"


_RUN, _LOG, _COSTLIEST = "run.json", "log.json", "costliest.json"
_TOLD = {"recipe", "version"}  # of run.json: for whoever packs a model; what decides a training stands beside them


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """What is recorded of an epoch."""

    step: int
    """Optimiser steps done at its end."""
    losses: dict[str, float]
    """Mean of each term over its steps."""
    average_precision: float
    """On the validation photographs."""
    workers: int
    patches_per_second: float = field(compare=False)
    """While training; validation and refresh are not counted."""
    seconds: float = field(compare=False)
    """Wall time of the whole epoch."""
    pool_loss: float | None = None
    """Mean loss of the healthy pool, where there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A patch of the healthy pool."""

    photograph: str
    """Its name in the data set."""
    row: int
    col: int
    """Its centre, pixels of the canonical grid that patches are cut from."""
    loss: float
    """As the ledger keeps it, 0..1."""
    jpeg: str
    """The patch as the network sees it, base64."""


@dataclass(frozen=True, slots=True)
class TrainFolder:
    """A run's place in a store."""

    url: str

    @classmethod
    def begin(cls, url: str, what: dict[str, Any], *, resume: bool) -> TrainFolder:
        """Claim a place for a new run, or take up the one that is there.

        Args:
            url: folder or prefix.
            what: is trained, as JSON values.
            resume: take up a run of the same; where there is none, begin one.

        Raises:
            UsageError: there is a run already, and `resume` is not asked for.
            RunConflictError: the run that is there trains something else.
        """
        store, text = open_store(url), json.dumps(what, indent=2) + "\n"
        if not store.create(_RUN, text.encode()):
            if not resume:
                raise UsageError(f"{url} holds a training run already; resume it, or name another place")
            there = json.loads(store.get(_RUN))
            mine = json.loads(text)
            names = (there.keys() | mine.keys()) - _TOLD
            changed = sorted(name for name in names if there.get(name) != mine.get(name))
            if changed:
                raise RunConflictError(f"{url} holds a run with another {', '.join(changed)}; name another place")
        return cls(url)

    @property
    def about(self) -> dict[str, Any]:
        """What is trained, as `begin` was told it; nothing where nobody has begun."""
        try:
            about: dict[str, Any] = json.loads(open_store(self.url).get(_RUN))
        except ObjectMissingError:
            return {}
        return about

    @property
    def step(self) -> int | None:
        """Of `last`, which a run goes on from; None where there is none yet."""
        return self.restore({})

    @property
    def epochs(self) -> tuple[Epoch, ...]:
        """The records of all epochs, as they are written before `last`: of a run cut short there, one more than it."""
        try:
            records = json.loads(open_store(self.url).get(_LOG))
        except ObjectMissingError:
            return ()
        return tuple(Epoch(**record) for record in records)

    def ledger(self, epochs: int) -> str:
        """URL of the snapshot after as many epochs; consecutive ones take turns."""
        return f"{self.url}/ledger-{epochs % 2}"

    @property
    def costliest(self) -> tuple[Example, ...]:
        """What `keep_costliest` was given last."""
        try:
            examples = json.loads(open_store(self.url).get(_COSTLIEST))
        except ObjectMissingError:
            return ()
        return tuple(Example(**example) for example in examples)

    def keep_costliest(self, examples: Sequence[Example]) -> None:
        """Keep examples, the costliest first, instead of those of the epoch before."""
        open_store(self.url).put(_COSTLIEST, json.dumps([asdict(example) for example in examples]).encode())

    def restore(self, networks: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer | None = None) -> int | None:
        """Weights of networks, by their names in `save`, and optimiser as of `last`, and its step; None where there is
        none yet.

        Raises:
            BundleError: it is damaged, or of another network.
        """
        try:
            data = open_store(self.url).get(LAST)
        except ObjectMissingError:
            return None
        return restore_checkpoint(data, LAST, networks, optimizer)["step"]

    def save(self, networks: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, epoch: Epoch) -> None:
        """Make the end of an epoch the one to go on from; `best` too, where it is better than all before.

        Of the networks `model` is the one that ships; where that is an average, another is the one that is trained.
        """
        store = open_store(self.url)
        data = checkpoint_bytes(networks, optimizer, {"step": epoch.step}, self.about)
        before = [record for record in self.epochs if record.step < epoch.step]
        if all(epoch.average_precision > record.average_precision for record in before):
            store.put(BEST, data)
        records = [asdict(record) for record in (*before, epoch)]
        store.put(_LOG, (json.dumps(records, indent=2) + "\n").encode())
        if (events := _events(epoch)) is not None:
            store.put(f"tensorboard/events.out.tfevents.{epoch.step:010d}", events)
        store.put(LAST, data)


def _events(epoch: Epoch) -> bytes | None:
    """The figures of an epoch as a TensorBoard event file; None where tensorboardX is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None

    figures = {f"loss/{term}": value for term, value in epoch.losses.items()}
    figures |= {"validation/average_precision": epoch.average_precision, "patches_per_second": epoch.patches_per_second}
    if epoch.pool_loss is not None:
        figures["ledger/mean_loss"] = epoch.pool_loss
    with tempfile.TemporaryDirectory() as scratch:
        with SummaryWriter(scratch) as writer:
            for name, value in figures.items():
                writer.add_scalar(name, value, epoch.step)
        (file,) = Path(scratch).iterdir()
        return file.read_bytes()
