"""An archive run from plan to summary: shards of keys go through worker actors that ask the scoring fleet.

    plan -> pending shards -> [ShardScorer -> Reader -> Segmenter -> mask, overlay -> commit] -> summary -> retry

A worker touches no image bytes: what they break is a child process of a Reader, or one request of a Segmenter.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from ma_cluster.archive.outcomes import config_digest
from ma_cluster.archive.plan import Shard, largest_shard
from ma_cluster.archive.retry import begin_retry
from ma_cluster.archive.run import Run, begin_run, pending
from ma_cluster.archive.shard_scorer import Scorer, ShardScorer
from ma_cluster.archive.summary import RunStatus, finish_run
from ma_cluster.bundle import DETECTING, Bundle, load_bundle, location
from ma_cluster.cluster import recording
from ma_cluster.cluster.connection import connected, quieten, starts_own
from ma_cluster.cluster.fleet.breaker import Breaker, SharedCount
from ma_cluster.cluster.fleet.replicas import Fleet, Model
from ma_cluster.cluster.fleet.scoring_app import SAY_S, ScoringApp
from ma_cluster.errors import FleetBrokenError, MaClusterError, UsageError
from ma_cluster.storage.manifest import Photographs
from ma_cluster.storage.store import Store, open_store

log = logging.getLogger(__name__)
_WORKER_IN_FLIGHT = 8
"""Photographs that one worker process may have under way."""
_RESTARTS = 10
_WORKER: dict[str, Any] = {
    "num_cpus": 0.1,  # it waits for the fleet and the store, it computes nothing
    "max_restarts": _RESTARTS,  # those after a node's preemption are not counted
    "max_task_retries": _RESTARTS,
    "scheduling_strategy": "SPREAD",  # so that a lost node costs few shards
}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. The rate is of this driver, without what an earlier one has done."""

    done: int
    total: int
    images_per_second: float | None
    eta_seconds: float | None


OnProgress = Callable[[Progress], None]


def score_archive(
    source: str | Photographs,
    dest: str,
    fleet: Fleet | None = None,
    *,
    model: str = "lite",
    on_progress: OnProgress | None = None,
) -> RunStatus:
    """Score every photograph of `source` into `dest`; a run that was cut short goes on where it was.

    SIGTERM ends it cleanly by SystemExit(143): what is committed stays, what was begun is stopped.

    Args:
        source: URL of the photographs, or of a manifest that names them, with what is known of their field.
        dest: URL of the run.
        fleet: what to score on; a local Ray with a Segmenter for each core by default.
        model: name of a shipped model, URL of a bundle, which each node fetches, or its folder, which each node must
            see under the same path.
        on_progress: called after each shard.

    Raises:
        UsageError: no cluster is given, and the fleet needs more than this machine has, or is a warm one.
        BundleError: the model is damaged or not there.
        RunConflictError: `dest` holds another run.
        StoreError: a store does not answer, or refuses writes.
        FleetBrokenError: the fleet does not start, or fails whatever it is given.
    """
    driver, run = _begin(_photographs(source), open_store(dest), fleet or Fleet(), model)
    driver.complete(driver.root, run, on_progress)
    return finish_run(driver.root, run)


def retry_archive(
    source: str | Photographs,
    dest: str,
    fleet: Fleet | None = None,
    *,
    model: str = "lite",
    on_progress: OnProgress | None = None,
) -> RunStatus:
    """Score as `score_archive` does, then go once more over the photographs that failed (not those refused).

    A retry that was cut short goes on where it was. Arguments and errors are those of `score_archive`.

    Returns:
        how the whole run ended, each photograph counted where it was last.
    """
    score_archive(source, dest, fleet, model=model, on_progress=on_progress)
    photographs = _photographs(source)
    driver, run = _begin(photographs, open_store(dest), fleet or Fleet(), model)
    retry = begin_retry(photographs.open(), driver.root, run)
    if retry is not None:
        driver.complete(*retry, on_progress)
        finish_run(*retry)
    return finish_run(driver.root, run)


def _photographs(source: str | Photographs) -> Photographs:
    return Photographs(source) if isinstance(source, str) else source


def _begin(photographs: Photographs, root: Store, fleet: Fleet, model: str) -> tuple[_Driver, Run]:
    if starts_own(fleet.address):
        if fleet.name is not None:
            raise UsageError(f"fleet {fleet.name} is kept by a cluster: give its address")
        fleet.check_fits()
    bundle = load_bundle(model, networks=DETECTING)
    log.info("listing the photographs")
    recipe = replace(bundle.recipe, image=photographs.field.told(bundle.recipe.image))
    config = config_digest(recipe, fleet.sandbox.decoder, fleet.operating_point)
    run = begin_run(photographs.open(), root, bundle.digest, config)
    return _Driver(root, model_of(model, bundle), fleet), run


def model_of(model: str, bundle: Bundle) -> Model:
    """What the Segmenters need to know of a bundle that was loaded by its name, folder or URL."""
    return Model(location(model), bundle.digest, bundle.recipe.image)


@dataclass(frozen=True, slots=True)
class _Driver:
    """Brings up a fleet for a run, or for a retry of it, and sends its shards through."""

    root: Store
    """Of the run; masks and overlays of its retries go there, too."""
    model: Model
    fleet: Fleet

    def complete(self, parts: Store, run: Run, on_progress: OnProgress | None) -> None:
        """Score and commit what is pending; `parts` holds the plan and takes the outcomes."""
        todo = pending(parts, run)
        first = next(todo, None)
        if first is None:
            return
        left = run.plan.images - first.row  # at most
        waiting_cpus = self.fleet.readers + 1  # Readers and workers mostly wait
        ray_up = connected(self.fleet.address, waiting_cpus=waiting_cpus)
        with _sigterm_exits(), ray_up, self._fleet_up(run, left) as app, closing(SharedCount()) as count:
            workers, in_flight = _workers(-(-left // largest_shard(run.plan)), app.fleet)
            scorer = partial(_breaking_scorer, app.name, app.fleet, run.source, count)
            spec = WorkerSpec(scorer, parts.url, self.root.url, run, in_flight)
            score_shards(chain([first], todo), spec, workers, on_progress, app.waits_for)

    @contextmanager
    def _fleet_up(self, run: Run, images: int) -> Iterator[ScoringApp]:
        """The fleet of a run, stopped at the end, or the warm one that is named. That of a run has the run's name, so
        that a driver that was killed leaves one behind only until the run is resumed.
        """
        quieten()
        if self.fleet.name is not None:
            yield ScoringApp.join(run.source, self.model, self.fleet)
            return
        app = ScoringApp.deploy(f"ma-cluster-{run.id}", run.source, self.model, self.fleet.sized(images))
        try:
            yield app
        finally:
            app.delete()


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """All that a worker process needs to know; it opens its own stores and handles."""

    scorer: Callable[[], Scorer]
    dest: str
    artefacts: str
    run: Run
    in_flight: int
    """Photographs that it may have under way."""


class _Worker:
    """The actor around a `ShardScorer`: a shard in, the number of its photographs out. Called from several threads."""

    def __init__(self, spec: WorkerSpec) -> None:
        dest, artefacts = open_store(spec.dest), open_store(spec.artefacts)
        threads = ThreadPoolExecutor(spec.in_flight)
        self._shards = ShardScorer(spec.scorer(), dest, artefacts, spec.run, threads, recording.Recorder())

    def score(self, shard: Shard) -> int:
        return self._shards.score(shard)


def _breaking_scorer(app: str, fleet: Fleet, source: str, count: SharedCount) -> Scorer:
    return Breaker(ScoringApp(app, fleet, source), count, fleet.crashes_in_a_row)


def score_shards(
    todo: Iterator[Shard],
    spec: WorkerSpec,
    workers: int,
    on_progress: OnProgress | None = None,
    waits_for: Callable[[], str] = str,
) -> None:
    """Send shards through worker processes of the Ray that is up, a few at a time to each.

    A worker that dies, or whose node does, is started again by Ray, which gives it what it had under way; of that only
    what is not committed is done again.

    Args:
        todo: in the plan's order.
        spec: of each worker.
        workers: how many.
        on_progress: called after each shard.
        waits_for: what of the fleet is not up, in a line; asked where no shard ends for half a minute.

    Raises:
        StoreError, FleetBrokenError: as a worker met it; or workers die time and again.
    """
    at_a_time = 1 + -(-spec.in_flight // largest_shard(spec.run.plan))  # one more: a shard's end idles nobody
    actor: Any = ray.remote(_Worker).options(max_concurrency=at_a_time, **_WORKER)
    pool: list[Any] = [actor.remote(spec) for _ in range(workers)]
    up = [worker.__ray_ready__.remote() for worker in pool]
    idle, under_way = deque(pool * at_a_time), dict[Any, tuple[Any, Shard]]()
    began, total, reached, scored = time.monotonic(), spec.run.plan.images, 0, 0
    log.info("scoring")
    try:
        while True:
            while idle and reached < total:
                shard = next(todo, None)
                reached = total if shard is None else shard.row + shard.images
                if shard is not None:
                    worker = idle.popleft()
                    under_way[worker.score.remote(shard)] = worker, shard
            if not under_way:
                return
            ended, _ = ray.wait(list(under_way), timeout=SAY_S)
            if not ended:
                not_up = ray.wait(up, num_returns=workers, timeout=0)[1]
                _say(
                    len(under_way),
                    waits_for() or (f"{len(not_up)} workers, each for a tenth of a CPU" if not_up else ""),
                )
                continue
            worker, shard = under_way.pop(ended[0])
            idle.append(worker)
            scored += _answer(ended[0])
            done = reached - sum(shard.images for _, shard in under_way.values())
            if on_progress is not None:
                rate = scored / (time.monotonic() - began)
                on_progress(Progress(done, total, rate, (total - done) / rate))
    finally:
        for worker in pool:
            ray.kill(worker)


def _say(shards: int, lacking: str) -> None:
    """What goes on where nothing moves."""
    if lacking:
        log.warning("waiting: %s", lacking)
    else:
        log.info("%d shards under way", shards)


def _answer(of_worker: Any) -> int:
    """The number of photographs of a shard that is through; raises what ended it."""
    try:
        images: int = ray.get(of_worker)
    except RayTaskError as error:
        if isinstance(error.cause, MaClusterError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise FleetBrokenError(
            f"a worker process of the run died more than {_RESTARTS} times: see Ray's logs, look at memory and at the "
            "installation on each node, and give the command again"
        ) from error
    return images


def _workers(shards: int, fleet: Fleet) -> tuple[int, int]:
    """Worker processes, and photographs in flight in each: no replica waits, and memory holds them all."""
    workers = min(shards, -(-fleet.in_flight // _WORKER_IN_FLIGHT))
    return workers, min(_WORKER_IN_FLIGHT, -(-fleet.in_flight // workers))


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
