"""An archive run from plan to summary: Ray Data streams shards of keys through workers that ask the scoring fleet.

    plan -> pending shards -> [ShardScorer -> Reader -> Segmenter -> mask, overlay -> commit] -> summary -> retry

Image bytes never enter Ray Data: it retries a row that kills its worker for ever, a Serve request fails alone.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import ray

from ma_cluster.archive.outcomes import config_digest
from ma_cluster.archive.plan import Shard
from ma_cluster.archive.retry import begin_retry
from ma_cluster.archive.run import Run, begin_run, pending
from ma_cluster.archive.shard_scorer import Scorer, ShardScorer
from ma_cluster.archive.summary import Summary, finish_run
from ma_cluster.bundle import DETECTING, Bundle, load_bundle, location
from ma_cluster.cluster import recording
from ma_cluster.cluster.connection import connected, quieten
from ma_cluster.cluster.fleet.breaker import Breaker, SharedCount
from ma_cluster.cluster.fleet.replicas import Model
from ma_cluster.cluster.fleet.scoring_app import Fleet, ScoringApp
from ma_cluster.errors import FleetBrokenError, StoreError
from ma_cluster.storage.manifest import Source, open_source
from ma_cluster.storage.store import Store, open_store

log = logging.getLogger(__name__)
_WORKER_IN_FLIGHT = 8
"""Photographs that one worker process may have under way."""
_WORKER_CPUS = 0.1
"""A worker waits for the fleet and the store, it computes nothing."""
_FAULTS = {"store": StoreError, "fleet": FleetBrokenError}
_ANSWER = pa.schema({"images": pa.int64(), "fault": pa.string(), "error": pa.string()})


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. The rate is of this driver, without what an earlier one has done."""

    done: int
    total: int
    images_per_second: float | None
    eta_seconds: float | None


OnProgress = Callable[[Progress], None]


def score_archive(
    source: str, dest: str, fleet: Fleet | None = None, *, model: str = "lite", on_progress: OnProgress | None = None
) -> Summary:
    """Score every photograph of `source` into `dest`; a run that was cut short goes on where it was.

    SIGTERM ends it cleanly by SystemExit(143): what is committed stays, what was begun is stopped.

    Args:
        source: URL of the photographs, or of a manifest that names them.
        dest: URL of the run.
        fleet: what to score on; a local Ray with a Segmenter for each core by default.
        model: name of a shipped model, URL of a bundle, which each node fetches, or its folder, which each node must
            see under the same path.
        on_progress: called after each shard.

    Raises:
        BundleError: the model is damaged or not there.
        RunConflictError: `dest` holds another run.
        StoreError: a store does not answer, or refuses writes.
        FleetBrokenError: the fleet does not start, or fails whatever it is given.
    """
    driver, run = _begin(open_source(source), open_store(dest), fleet or Fleet(), model)
    driver.complete(driver.root, run, on_progress)
    return finish_run(driver.root, run)


def retry_archive(
    source: str, dest: str, fleet: Fleet | None = None, *, model: str = "lite", on_progress: OnProgress | None = None
) -> Summary:
    """Score as `score_archive` does, then go once more over the photographs that failed (not those refused).

    A retry that was cut short goes on where it was. Arguments and errors are those of `score_archive`.

    Returns:
        the summary of the whole run, each photograph counted where it was last.
    """
    score_archive(source, dest, fleet, model=model, on_progress=on_progress)
    archive = open_source(source)
    driver, run = _begin(archive, open_store(dest), fleet or Fleet(), model)
    retry = begin_retry(archive, driver.root, run)
    if retry is not None:
        driver.complete(*retry, on_progress)
        finish_run(*retry)
    return finish_run(driver.root, run)


def _begin(archive: Source, root: Store, fleet: Fleet, model: str) -> tuple[_Driver, Run]:
    bundle = load_bundle(model, networks=DETECTING)
    run = begin_run(archive, root, bundle.digest, config_digest(bundle.recipe, fleet.sandbox.decoder))
    return _Driver(root, model_of(model, bundle), fleet), run


def model_of(model: str, bundle: Bundle) -> Model:
    """What the Segmenters need to know of a bundle that was loaded by its name, folder or URL."""
    return Model(location(model), bundle.digest, bundle.recipe.image)


@dataclass(frozen=True, slots=True)
class _Driver:
    """Brings up a fleet for a run, or for a retry of it, and streams its shards through."""

    root: Store
    """Of the run; masks and overlays of its retries go there, too."""
    model: Model
    fleet: Fleet

    def complete(self, parts: Store, run: Run, on_progress: OnProgress | None) -> None:
        """Score and commit what is pending; `parts` holds the plan and takes the outcomes."""
        todo = list(pending(parts, run))
        if not todo:
            return
        waiting_cpus = self.fleet.readers + 1  # Readers and workers mostly wait
        with _sigterm_exits(), connected(self.fleet.address, waiting_cpus=waiting_cpus):
            fleet = self.fleet.sized(sum(shard.images for shard in todo))
            with _fleet_up(run, self.model, fleet) as app, closing(SharedCount()) as count:
                workers, in_flight = _workers(todo, fleet)
                scorer = partial(_breaking_scorer, app.name, fleet, run.source, count)
                score_shards(todo, WorkerSpec(scorer, parts.url, self.root.url, run, in_flight), workers, on_progress)


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """All that a worker process needs to know; it opens its own stores and handles."""

    scorer: Callable[[], Scorer]
    dest: str
    artefacts: str
    run: Run
    in_flight: int


class _Worker:
    """The Ray Data actor around a `ShardScorer`: a block of one shard in, the number of its photographs out. It is
    called from several threads.

    What ends the run comes out as a row too: Ray Data would wrap the exception until nobody can tell what it was.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        dest, artefacts = open_store(spec.dest), open_store(spec.artefacts)
        threads = ThreadPoolExecutor(spec.in_flight)
        self._shards = ShardScorer(spec.scorer(), dest, artefacts, spec.run, threads, recording.Recorder())

    def __call__(self, block: pa.Table) -> pa.Table:
        (row,) = block.to_pylist()
        try:
            images, fault, error = self._shards.score(Shard(**row)), None, None
        except StoreError as failure:
            images, fault, error = 0, "store", str(failure)
        except FleetBrokenError as failure:
            images, fault, error = 0, "fleet", str(failure)
        return pa.table([[images], [fault], [error]], schema=_ANSWER)


def _breaking_scorer(app: str, fleet: Fleet, source: str, count: SharedCount) -> Scorer:
    return Breaker(ScoringApp(app, fleet, source), count, fleet.crashes_in_a_row)


def score_shards(todo: Sequence[Shard], spec: WorkerSpec, workers: int, on_progress: OnProgress | None) -> None:
    """Stream shards through worker processes of the Ray that is up; each shard is a block of its own, built by hand.

    Raises:
        StoreError, FleetBrokenError: as a worker met it.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    quieten()
    context.issue_detectors_config.detectors = []  # a worker holds the encoded masks of its photographs, no more
    blocks = [pa.Table.from_pylist([dataclasses.asdict(shard)]) for shard in todo]
    at_a_time = 1 + -(-spec.in_flight // max(shard.images for shard in todo))  # one more: a shard's end idles nobody
    scored = ray.data.from_blocks(blocks).map_batches(
        _Worker,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=(spec,),
        compute=ray.data.ActorPoolStrategy(
            size=workers,
            max_tasks_in_flight_per_actor=at_a_time,
            max_concurrent_calls_per_actor=at_a_time,
            enable_true_multi_threading=True,
        ),
        num_cpus=_WORKER_CPUS,
    )
    total, done = spec.run.plan.images, spec.run.plan.images - sum(shard.images for shard in todo)
    started, before = time.monotonic(), done
    for row in scored.iter_rows():
        if row["fault"] is not None:
            raise _FAULTS[row["fault"]](row["error"])
        done += row["images"]
        if on_progress is not None:
            rate = (done - before) / (time.monotonic() - started)
            on_progress(Progress(done, total, rate, (total - done) / rate))


def _workers(todo: Sequence[Shard], fleet: Fleet) -> tuple[int, int]:
    """Worker processes, and photographs in flight in each: no replica waits, and memory holds them all."""
    workers = min(len(todo), -(-fleet.in_flight // _WORKER_IN_FLIGHT))
    return workers, min(_WORKER_IN_FLIGHT, -(-fleet.in_flight // workers))


@contextmanager
def _fleet_up(run: Run, model: Model, fleet: Fleet) -> Iterator[ScoringApp]:
    """The fleet of a run, stopped at the end, or the warm one that it names. That of a run has the run's name, so that
    a driver that was killed leaves one behind only until the run is resumed.
    """
    quieten()
    if fleet.name is not None:
        yield ScoringApp.join(fleet.name, run.source, model, fleet)
        return
    app = ScoringApp.deploy(f"ma-cluster-{run.id}", run.source, model, fleet)
    try:
        yield app
    finally:
        app.delete()


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
