"""An archive run from plan to summary: Ray Data streams shards of keys through workers that ask the scoring fleet.

    plan -> pending shards -> [ShardScorer -> Reader -> Segmenter -> mask, overlay -> commit] -> summary

Image bytes never enter Ray Data: it retries a row that kills its worker for ever, a Serve request fails alone.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import ray

from ma_cluster.bundle import load_bundle
from ma_cluster.cluster import metrics
from ma_cluster.cluster.archive import Run, Shard, begin_run, committed, shards
from ma_cluster.cluster.connection import connected
from ma_cluster.cluster.outcomes import config_digest
from ma_cluster.cluster.scoring_app import Fleet, Model, ScoringApp
from ma_cluster.cluster.shard_scorer import ShardScorer
from ma_cluster.cluster.summary import Summary, finish_run
from ma_cluster.errors import StoreError
from ma_cluster.images.store import open_store

log = logging.getLogger(__name__)
_WORKER_IN_FLIGHT = 8
"""Photographs that one worker process may have under way."""
_WORKER_CPUS = 0.1
"""A worker waits for the fleet and the store, it computes nothing."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. The rate is of this driver, without what an earlier one has done."""

    done: int
    total: int
    images_per_second: float | None
    eta_seconds: float | None


def score_archive(
    source: str,
    dest: str,
    fleet: Fleet | None = None,
    *,
    model: str = "lite",
    on_progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Score every photograph under `source` into `dest`; a run that was cut short goes on where it was.

    SIGTERM ends it cleanly by SystemExit(143): what is committed stays, what was begun is stopped.

    Args:
        source: URL of the photographs.
        dest: URL of the run.
        fleet: what to score on; a local Ray with a Segmenter for each core by default.
        model: name of a shipped model, or a bundle's folder, which each node must see under the same path.
        on_progress: called at the start and after each shard.

    Raises:
        BundleError: the model is damaged or not there.
        RunConflictError: `dest` holds another run.
        StoreError: a store does not answer, or refuses writes.
    """
    fleet = fleet or Fleet()
    bundle = load_bundle(model)
    dest_store = open_store(dest)
    run = begin_run(open_store(source), dest_store, bundle.digest, config_digest(bundle.recipe))
    done = committed(dest_store)
    pending = [shard for shard in shards(run.plan.images) if shard.number not in done]
    if pending:
        spec = Model(_location(model), bundle.digest, bundle.recipe.image)
        with _sigterm_exits(), connected(fleet.address, waiting_cpus=fleet.readers + 1):
            fleet = fleet.sized(sum(shard.images for shard in pending))
            with _fleet_up(run, spec, fleet) as app:
                _score_shards(pending, _WorkerSpec(app.name, dest_store.url, run), fleet, on_progress)
    return finish_run(dest_store, run)


@dataclass(frozen=True, slots=True)
class _WorkerSpec:
    """All that a worker process needs to know; it opens its own stores and handles."""

    app: str
    dest: str
    run: Run


class _Worker:
    """The Ray Data actor around a `ShardScorer`: a block of one shard in, the number of its photographs out.

    A store that fails comes out as a row too: Ray Data would wrap the exception until nobody can tell what it was.
    """

    def __init__(self, spec: _WorkerSpec, in_flight: int) -> None:
        scorer = ScoringApp(spec.app)
        self._shards = ShardScorer(scorer, open_store(spec.dest), spec.run, in_flight, metrics.Recorder())

    def __call__(self, block: pa.Table) -> pa.Table:
        (row,) = block.to_pylist()
        try:
            images, error = self._shards.score(Shard(**row)), None
        except StoreError as failure:
            images, error = 0, str(failure)
        return pa.table({"images": [images], "error": pa.array([error], pa.string())})


def _score_shards(
    pending: Sequence[Shard], spec: _WorkerSpec, fleet: Fleet, on_progress: Callable[[Progress], None] | None
) -> None:
    """Stream the shards through the workers; each shard is a block of its own, built by hand."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    _quieten()
    context.issue_detectors_config.detectors = []  # a worker holds the encoded masks of its photographs, no more
    workers, in_flight = _workers(pending, fleet)
    blocks = [pa.Table.from_pylist([dataclasses.asdict(shard)]) for shard in pending]
    scored = ray.data.from_blocks(blocks).map_batches(
        _Worker,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=(spec, in_flight),
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        num_cpus=_WORKER_CPUS,
    )
    total, done = spec.run.plan.images, spec.run.plan.images - sum(shard.images for shard in pending)
    started, before = time.monotonic(), done
    for row in scored.iter_rows():
        if row["error"] is not None:
            raise StoreError(row["error"])
        done += row["images"]
        if on_progress is not None:
            rate = (done - before) / (time.monotonic() - started)
            on_progress(Progress(done, total, rate, (total - done) / rate))


def _workers(pending: Sequence[Shard], fleet: Fleet) -> tuple[int, int]:
    """Worker processes, and photographs in flight in each: no replica waits, and memory holds them all."""
    assert fleet.segmenters is not None
    wanted = 2 * fleet.segmenters + fleet.readers
    each = min(_WORKER_IN_FLIGHT, max(shard.images for shard in pending))
    workers = min(len(pending), -(-wanted // each))
    return workers, min(each, -(-wanted // workers))


@contextmanager
def _fleet_up(run: Run, model: Model, fleet: Fleet) -> Iterator[ScoringApp]:
    """The fleet of a run, stopped at the end. Its name is the run's, so that a driver that was killed leaves one behind
    only until the run is resumed.
    """
    _quieten()
    app = ScoringApp.deploy(f"ma-cluster-{run.id}", run.source, model, fleet)
    try:
        yield app
    finally:
        app.delete()


def _quieten() -> None:
    """Keep Ray's libraries from writing into the caller's progress bar; their log files hold it all."""
    for name in ("ray.data", "ray.serve"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.ERROR)


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """SIGTERM raises SystemExit(143) where the driver stands, so that everything is closed on the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _location(model: str) -> str:
    """A shipped model by its name, which each node resolves in its own installation; a folder by its absolute path."""
    folder = Path(model)
    return str(folder.absolute()) if (folder / "bundle.json").is_file() else model
