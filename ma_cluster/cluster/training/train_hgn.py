"""Training of a hypothesis network on a cluster: epochs of streamed patches, validation on whole photographs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import ray
import torch
from torch import nn

from ma_cluster.cluster.training.context import TrainContext
from ma_cluster.cluster.training.launch import RunContext, TrainResult, run
from ma_cluster.cluster.training.patch_stream import (
    HgnSource,
    Photographs,
    Work,
    open_streams,
    read_stream,
    share,
)
from ma_cluster.cluster.training.reporting import Reporter
from ma_cluster.config import DetectorConfig, HgnConfig
from ma_cluster.errors import UsageError
from ma_cluster.evaluation.scoring import PixelCounts, average_precision
from ma_cluster.hypotheses.probability import probability_map
from ma_cluster.hypotheses.sampling import HgnCuts, hgn_batch
from ma_cluster.hypotheses.step import build_hgn, hgn_losses
from ma_cluster.images.patches import Tiling
from ma_cluster.networks.optimising import build_optimizer, descend, learning_rate
from ma_cluster.training.progress import Meter, Progress
from ma_cluster.training.request import TrainRequest


def train_hgn(request: TrainRequest, on_progress: Callable[[Progress], None] | None = None) -> TrainResult:
    """Train `hgn_1x` or `hgn_half`; a run that was cut short goes on where it was, if `request.resume`.

    Raises:
        UsageError: the request or the data are of no use, or a run is there that is not to be resumed.
        RunConflictError: the run to be resumed trains something else.
        StoreError: a store does not answer.
    """
    if not isinstance(request.config, HgnConfig):
        raise UsageError(f"{request.network} is no hypothesis network; train_prn trains it")
    return run(request, _job, _loop, on_progress)


@dataclass(frozen=True, slots=True)
class _Job:
    """All that a worker needs."""

    ground: RunContext
    config: HgnConfig
    source: HgnSource


def _job(ground: RunContext) -> _Job:
    config = ground.request.config
    assert isinstance(config, HgnConfig)
    cuts = ray.remote(_cuts).options(num_cpus=1).remote(ground.training, config, ground.request.seed)
    return _Job(ground, config, HgnSource(ground.training, cuts, config.patch_px))


def _loop(given: dict[str, _Job]) -> None:
    """What each worker runs: build, restore, loop over epochs, report."""
    job = given["job"]
    ground, config, request = job.ground, job.config, job.ground.request
    team = TrainContext.join(request.threads)
    torch.manual_seed(request.seed)
    model = team.place(build_hgn(config), request.batch_norm)
    optimizer = build_optimizer(model, config)
    done = ground.begin(model, optimizer)
    parallel = team.parallel(model)
    reporter = Reporter(request.network, ground.queue if team.first else None)
    rows = share(config.batch_patches, team.rank, team.workers)
    work = [Work(step) for step in range(done, config.steps)]
    stream = team.streams(partial(open_streams, job.source, work, config.batch_patches))
    patches = reporter.waiting(read_stream(stream, rows))
    while done < config.steps:
        steps = range(done, min(done + request.epoch, config.steps))
        meter = Meter(steps, config.steps, config.batch_patches)
        for step in steps:
            columns = next(patches)  # of one stream for all epochs: to open one takes seconds
            batch = hgn_batch(columns["patch"], columns["lesion"])
            losses = hgn_losses(parallel, batch, config, team.reduce)
            descend(model, optimizer, losses.total, learning_rate(step, config))
            meter.add(losses.values())
            reporter.step(meter, len(rows))
        progress, done = meter.progress(), steps.stop
        team.agree(model)
        counts = team.merge(_validate(model, ground.validation, team, request.recipe.detector))
        if team.first:
            epoch = meter.epoch(progress, average_precision(counts), team.workers)
            ground.folder.save(model, optimizer, done, epoch)
            reporter.epoch(replace(progress, epoch=epoch))


def _validate(
    model: nn.Module, photographs: Photographs, team: TrainContext, config: DetectorConfig
) -> list[PixelCounts]:
    """Pixel counts of this worker's share of the validation photographs."""
    model.eval()
    counts = []
    for number in range(team.rank, len(photographs), team.workers):
        photograph = photographs.fetch([number])[number]
        height, width = photograph.fov.shape
        tiling = Tiling(height, width, config.tile_px, config.halo_px)
        probability = probability_map(model, photograph.enhanced, photograph.fov, tiling)
        counts.append(PixelCounts.of(probability, photograph.lesion))
    return counts


def _cuts(photographs: Photographs, config: HgnConfig, seed: int) -> HgnCuts:
    return HgnCuts(photographs.marks(), config, seed)
