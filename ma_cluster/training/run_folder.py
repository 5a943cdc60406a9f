"""A training run in the object store. No Ray in here.

    run.json            what is trained: network, recipe, seed; create-only
    last.safetensors    weights, optimiser, step: where a run goes on
    best.safetensors    the same, at the epoch of the best validation figure
    log.json            a record of each epoch
    tensorboard/        the same for TensorBoard, an event file for each epoch; where tensorboardX is installed
    ledger-0, -1/       losses of the healthy pool (refinement only); `last` names one, the other is being written

`last.safetensors` is written after all that belongs to its step: a run cut short anywhere goes on from there.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ma_cluster.checkpoint import BEST, LAST, checkpoint_bytes, restore_checkpoint
from ma_cluster.errors import ObjectMissingError, RunConflictError, UsageError
from ma_cluster.storage.store import open_store

_RUN, _LOG = "run.json", "log.json"
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
    def epochs(self) -> tuple[Epoch, ...]:
        """The records of all epochs that `last` has seen."""
        try:
            records = json.loads(open_store(self.url).get(_LOG))
        except ObjectMissingError:
            return ()
        return tuple(Epoch(**record) for record in records)

    def ledger(self, step: int, epoch_steps: int) -> str:
        """URL of the snapshot that belongs to a step; consecutive epochs take turns."""
        return f"{self.url}/ledger-{-(-step // epoch_steps) % 2}"

    def restore(self, networks: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> int | None:
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

    def save(
        self, networks: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, step: int, epoch: Epoch | None = None
    ) -> None:
        """Make a step the one to go on from; `best` too, where its epoch is better than all before.

        Of the networks `model` is the one that ships; where that is an average, another is the one that is trained.
        """
        store = open_store(self.url)
        data = checkpoint_bytes(networks, optimizer, {"step": step}, self.about)
        if epoch is not None:
            before = [record for record in self.epochs if record.step < step]
            if all(epoch.average_precision > record.average_precision for record in before):
                store.put(BEST, data)
            records = [asdict(record) for record in (*before, epoch)]
            store.put(_LOG, (json.dumps(records, indent=2) + "\n").encode())
            if (events := _events(epoch)) is not None:
                store.put(f"tensorboard/events.out.tfevents.{step:010d}", events)
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
