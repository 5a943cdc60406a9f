"""An archive run from plan to summary: its shards go through worker processes that ask the scoring fleet.

plan -> pending shards -> [ShardScorer -> Reader -> Segmenter -> mask, overlay -> commit] -> summary -> retry
"""

from __future__ import annotations

import logging
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import ray

from ma_cluster.archive.outcomes import config_digest
from ma_cluster.archive.patients import keep_pseudonyms
from ma_cluster.archive.plan import largest_shard
from ma_cluster.archive.retry import begin_retry
from ma_cluster.archive.run import Run, begin_run, pending
from ma_cluster.archive.shard_scorer import Breaker, PlainCount, Scorer
from ma_cluster.archive.summary import RunStatus, finish_run
from ma_cluster.bundle import DETECTING, Bundle, load_bundle, location
from ma_cluster.cluster.connection import connected, quieten, starts_own
from ma_cluster.cluster.fleet.replicas import Fleet, Model
from ma_cluster.cluster.fleet.scoring_app import ScoringApp
from ma_cluster.cluster.fleet.workers import OnProgress, WorkerSpec, score_shards, workers_for
from ma_cluster.config import ScoreOptions
from ma_cluster.errors import UsageError
from ma_cluster.storage.identity import Pseudonyms
from ma_cluster.storage.manifest import Photographs
from ma_cluster.storage.store import Store, open_store

log = logging.getLogger(__name__)


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
        RunConflictError: `dest` holds another run, or one that calls its patients otherwise.
        StoreError: a store does not answer, or refuses writes.
        FleetBrokenError: the fleet does not start, or it or the source fails whatever is asked of it.
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
        finish_run(*retry, whole=False)
    return finish_run(driver.root, run)


def _photographs(source: str | Photographs) -> Photographs:
    return Photographs(source) if isinstance(source, str) else source


def _begin(photographs: Photographs, root: Store, fleet: Fleet, model: str) -> tuple[_Driver, Run]:
    if starts_own(fleet.address):
        if fleet.name is not None:
            raise UsageError(f"fleet {fleet.name} is kept by a cluster: give its address")
        fleet.check_fits()
    bundle, source = load_bundle(model, networks=DETECTING), photographs.open()
    log.info("listing the photographs")
    options = ScoreOptions(fleet.operating_point, photographs.field)
    config = config_digest(bundle.recipe, fleet.sandbox.decoder, options)
    run = keep_pseudonyms(root, begin_run(source, root, bundle.digest, config), photographs.pseudonyms)
    return _Driver(root, model_of(model, bundle), fleet, photographs.pseudonyms), run


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
    pseudonyms: Pseudonyms

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
            workers, in_flight = workers_for(-(-left // largest_shard(run.plan)), app.fleet)
            scorer = partial(_breaking_scorer, app.name, app.fleet, run.source, count)
            spec = WorkerSpec(scorer, parts.url, self.root.url, run, in_flight, self.pseudonyms, self.fleet.dicom)
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


def _breaking_scorer(app: str, fleet: Fleet, source: str, count: SharedCount) -> Scorer:
    return Breaker(ScoringApp(app, fleet, source), count, fleet.crashes_in_a_row)


class SharedCount:
    """A `Count` that processes of a job share, until it is closed. It goes from one to another as a name: of a handle
    among the arguments of an actor Ray complains, on the terminal, that the actor may not start again.
    """

    def __init__(self, name: str | None = None) -> None:
        """The count of that name, or a new one."""
        self._name = name or f"crashes-{uuid.uuid4().hex}"
        # Without a CPU of its own; after its node's death it counts anew.
        known = {"name": self._name, "get_if_exists": True}
        actor = ray.remote(PlainCount).options(num_cpus=0, max_restarts=-1, max_task_retries=-1, **known)
        self._actor: Any = actor.remote()

    def __reduce__(self) -> tuple[type[SharedCount], tuple[str]]:
        return SharedCount, (self._name,)

    def lost(self) -> int:
        in_a_row: int = ray.get(self._actor.lost.remote())
        return in_a_row

    def won(self) -> None:
        ray.get(self._actor.won.remote())  # or it might come after `close`, and Ray would complain of it

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._actor)


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
