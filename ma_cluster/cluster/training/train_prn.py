"""Training of the refinement network on a cluster: each epoch draws its negatives from the loss ledger.

    ledger -> negatives' ids of an epoch -> streamed triplets -> step -> the negatives' losses -.
      ^                                                                                          |
      `---- a share of the pool, streamed and scored by the Train workers themselves <-----------'

Within an epoch the ledger does not change: losses go back at its end, in the order of steps, so that its state is a
function of the weights alone, whatever the number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import ray
import torch
from jaxtyping import Float32, Int64
from numpy import ndarray
from torch import nn

from ma_cluster.cluster.training.context import TrainContext
from ma_cluster.cluster.training.launch import RunContext, TrainResult, run
from ma_cluster.cluster.training.ledger import LossLedger
from ma_cluster.cluster.training.patch_stream import (
    HealthySource,
    Photographs,
    TripletSource,
    Work,
    open_streams,
    read_stream,
    share,
)
from ma_cluster.cluster.training.reporting import Reporter
from ma_cluster.config import PrnConfig
from ma_cluster.errors import UsageError
from ma_cluster.evaluation.scoring import PixelCounts, average_precision
from ma_cluster.networks.optimising import build_optimizer, descend, learning_rate
from ma_cluster.networks.tensors import channels_first
from ma_cluster.refinement.sampling import TripletCuts, triplet_batch, validation_patches
from ma_cluster.refinement.step import build_prn, prn_losses, prn_probability
from ma_cluster.training.progress import Meter, Progress
from ma_cluster.training.request import TrainRequest

SCORE_ROWS = 512
"""Patches that the team scores at a time."""
AFFORDABLE = 200_000
"""Pools up to this size are scored whole at the end of the first epoch; of larger ones never-scored patches keep the
loss they began with, 1, and are drawn until their turn comes."""
Losses = tuple[Int64[ndarray, "_"], Float32[ndarray, "_"]]
"""Ids of patches and their losses, as many."""


def train_prn(request: TrainRequest, on_progress: Callable[[Progress], None] | None = None) -> TrainResult:
    """Train `prn` or `cls`; a run that was cut short goes on where it was, if `request.resume`.

    The validation figure is the average precision of patches, as many of each photograph: the network has no regions
    of interest before the hypothesis networks are there.

    Raises:
        UsageError: the request or the data are of no use, or a run is there that is not to be resumed.
        RunConflictError: the run to be resumed trains something else.
        StoreError: a store does not answer.
    """
    if not isinstance(request.config, PrnConfig):
        raise UsageError(f"{request.network} is no refinement network; train_hgn trains it")
    return run(request, _job, _loop, on_progress)


@dataclass(frozen=True, slots=True)
class Pool:
    """The healthy patches, without augmentation."""

    source: HealthySource
    size: int


@dataclass(frozen=True, slots=True)
class _Job:
    """All that a worker needs."""

    ground: RunContext
    config: PrnConfig
    source: TripletSource
    pool: Pool


def _job(ground: RunContext) -> _Job:
    config, photographs = ground.request.config, ground.training
    assert isinstance(config, PrnConfig)
    cuts = ray.remote(_cuts).options(num_cpus=1).remote(photographs, config, ground.request.seed)
    size = ray.get(ray.remote(_pool_size).options(num_cpus=0).remote(cuts))
    pool = Pool(HealthySource(photographs, cuts, config.cut_px), size)
    return _Job(ground, config, TripletSource(photographs, cuts, config.cut_px), pool)


def _loop(given: dict[str, _Job]) -> None:
    """What each worker runs: build, restore, loop over epochs, report. The first worker owns the ledger."""
    job = given["job"]
    ground, config, request = job.ground, job.config, job.ground.request
    team = TrainContext.join(request.threads)
    torch.manual_seed(request.seed)
    model = team.place(build_prn(config), request.batch_norm)
    optimizer = build_optimizer(model, config)
    done = ground.begin(model, optimizer)
    ledger = _ledger(job, done) if team.first else None
    parallel = team.parallel(model)
    reporter = Reporter(request.network, ground.queue if team.first else None)
    while done < config.steps:
        steps = range(done, min(done + request.epoch, config.steps))
        meter = Meter(steps, config.steps, 3 * config.triplets)
        rows = share(config.triplets, team.rank, team.workers)
        stream = team.streams(partial(_open_triplets, job, ledger, steps))
        seen = []
        for step, columns in zip(steps, reporter.waiting(read_stream(stream, rows)), strict=True):
            batch = triplet_batch(columns["anchor"], columns["positive"], columns["negative"])
            losses = prn_losses(parallel, batch, config, team.reduce)
            descend(model, optimizer, losses.total, learning_rate(step, config))
            seen.append((columns["id"], 1 - np.exp(-losses.negatives.cpu().numpy())))
            meter.add(losses.values())
            reporter.step(meter, 3 * len(rows))
        progress, done = meter.progress(), steps.stop
        team.agree(model)
        fresh = in_order(team.gather(seen)), _score(job, model, team, done)
        counts = team.merge(_validate(model, job, team))
        if team.first:
            assert ledger is not None
            for ids, values in fresh:
                ledger.update(ids, values)
            ledger.snapshot(ground.folder.ledger(done, request.epoch))
            epoch = meter.epoch(progress, average_precision(counts), team.workers, ledger.loss_mean())
            ground.folder.save(model, optimizer, done, epoch)
            reporter.epoch(replace(progress, epoch=epoch))


def _ledger(job: _Job, done: int) -> LossLedger:
    """The losses of the pool as of a step. The ledger ends with this worker: whoever starts again makes another."""
    ledger = LossLedger.create(job.pool.size, shards=job.ground.request.ledger_shards)
    if done:
        ledger.restore(job.ground.folder.ledger(done, job.ground.request.epoch))
    return ledger


def _open_triplets(job: _Job, ledger: LossLedger | None, steps: range, workers: int) -> Sequence[ray.data.DataIterator]:
    """The streams of an epoch, its negatives drawn by their losses, or uniformly."""
    assert ledger is not None
    count, epoch, seed = len(steps) * job.config.triplets, steps.start, job.ground.request.seed
    if job.ground.request.selective:
        negatives = ledger.draw(count, epoch, seed)
    else:
        negatives = np.random.default_rng([seed, epoch, 2]).integers(job.pool.size, size=count)
    ids = negatives.reshape(len(steps), -1)
    work = [Work(step, drawn) for step, drawn in zip(steps, ids, strict=True)]
    return open_streams(job.source, work, job.config.triplets, workers)


def _score(job: _Job, model: nn.Module, team: TrainContext, done: int) -> Losses:
    """Losses of a share of the pool with the newest weights; of nothing after the last step."""
    if done == job.config.steps:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    whole = done <= job.ground.request.epoch and job.pool.size <= AFFORDABLE
    ids = refreshed(job.pool.size, 1.0 if whole else job.config.refresh_share, done // job.ground.request.epoch)
    # the last batch is filled up with patches of the first
    batches = np.resize(ids, (-(-len(ids) // SCORE_ROWS), SCORE_ROWS))
    work = [Work(number, batch) for number, batch in enumerate(batches)]
    stream = team.streams(partial(open_streams, job.pool.source, work, SCORE_ROWS))
    model.eval()
    scored = [
        (columns["id"], prn_probability(model, channels_first(columns["patch"])).numpy())
        for columns in read_stream(stream, share(SCORE_ROWS, team.rank, team.workers))
    ]
    return in_order(team.gather(scored))


def refreshed(size: int, share_of_pool: float, epoch: int) -> Int64[ndarray, "n"]:
    """The patches to score again: every k-th id, from another one each epoch, so that each has its turn in k epochs.

    An id's place is hashed from it, so these are as good as drawn at random.
    """
    stride = max(1, round(1 / share_of_pool)) if share_of_pool > 0 else size
    return np.arange(epoch % stride, size, stride)


def in_order(gathered: Sequence[Sequence[Losses]]) -> Losses:
    """What each worker has seen, step by step -> all of it, in the order of the mini-batches' rows."""
    parts = [part for step in zip(*gathered, strict=True) for part in step]
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([values for _, values in parts])


def _validate(model: nn.Module, job: _Job, team: TrainContext) -> list[PixelCounts]:
    """Counts of patches of this worker's share of the validation photographs."""
    model.eval()
    counts = []
    for number in range(team.rank, len(job.ground.validation), team.workers):
        photograph = job.ground.validation.fetch([number])[number]
        patches, truth = validation_patches(photograph, job.config, job.ground.request.seed)
        edges = [*range(0, len(patches), SCORE_ROWS), len(patches)]
        parts = [prn_probability(model, channels_first(patches[a:b])).numpy() for a, b in pairwise(edges)]
        counts.append(PixelCounts.of(np.concatenate(parts), truth))
    return counts


def _cuts(photographs: Photographs, config: PrnConfig, seed: int) -> TripletCuts:
    return TripletCuts(photographs.marks(), config, seed)


def _pool_size(cuts: TripletCuts) -> int:
    return cuts.healthy
