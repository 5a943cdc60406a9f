"""What is to be trained, on what, with how much: the one argument of every training run. No Ray in here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ma_cluster.config import HgnConfig, PrnConfig, Recipe, Scale
from ma_cluster.errors import UsageError

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
    """URL of a folder of photographs without retinopathy, used beside the data set's lesion-free regions."""
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
    learning_rate: float | None = None
    """Peak rate, instead of the recipe's: a network that has learnt already wants a lower one."""
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
