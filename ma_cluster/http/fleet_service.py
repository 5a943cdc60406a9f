"""What stands behind the routes of the HTTP service: the warm fleet, the archive jobs of its store, and their metrics.

How archives stand is computed at each scrape from what their stores hold. `Looks` asks many destinations at a time, so
that one whose store is down hides no other.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ma_cluster.archive.outcomes import Outcome, identify
from ma_cluster.archive.retry import retries
from ma_cluster.archive.run import Run, committed, read_run
from ma_cluster.archive.shard_scorer import Reading, Recorder, Segmentation
from ma_cluster.archive.summary import RunStatus, Tally, count_parts, count_shards
from ma_cluster.bundle import Bundle
from ma_cluster.config import KnownField, OperatingPoint, ScoreOptions
from ma_cluster.errors import ImageError, MaClusterError, Reason, Status, StoreError, WorkerLostError
from ma_cluster.http.api import Answer
from ma_cluster.http.jobs import ArchiveJob, ArchiveJobs, JobState
from ma_cluster.lesions.findings import to_values
from ma_cluster.metrics import ARCHIVE_STATE
from ma_cluster.storage.store import Entry, Store, open_store

log = logging.getLogger(__name__)
_Found = TypeVar("_Found")
_LOOKS = 8  # at destinations of one store at a time
_WITHIN_S = 5.0  # less than Prometheus waits for a scrape
_PAUSE_S = 2.0
"""After a lost replica: until then Serve still sends requests to it."""


@runtime_checkable
class WarmFleet(Protocol):
    """A fleet that is up for uploads; `ScoringApp` is one."""

    def read_upload(self, data: bytes, field: KnownField) -> Reading:
        """Read one photograph from its encoded bytes, with what is known of its field; raises ImageError."""

    def segment(self, reading: Reading, operating_point: OperatingPoint) -> Segmentation:
        """Networks and lesion table; raises ImageError."""

    def up(self) -> bool:
        """Whether it takes photographs."""


@dataclass(frozen=True, slots=True)
class Backing:
    """What a service stands on."""

    fleet: WarmFleet
    jobs: ArchiveJobs
    running: Callable[[], set[str]]
    """Ids of the jobs that something drives."""
    recorder: Recorder


class FleetService:
    """The `Service` of api.py."""

    def __init__(self, backing: Backing, bundle: Bundle) -> None:
        self._fleet, self._jobs, self._running = backing.fleet, backing.jobs, backing.running
        self._model = {"model_digest": bundle.digest, "threshold": bundle.recipe.detector.threshold}
        self._recorder = backing.recorder
        self._metrics = ArchiveMetrics(
            lambda: [job.destination for job in backing.jobs.list().jobs if not job.cancelled]
        )
        self._runs = Looks(lambda url: read_run(open_store(url)))
        self.changed = threading.Event()
        """Set where somebody asked for something of the jobs."""

    def segment(self, data: bytes, options: ScoreOptions) -> Answer:
        """Score an upload, which counts in the metrics as a photograph of an archive does; raises ImageError."""
        self._recorder.begun()
        try:
            reading, segmentation = self._attempt(data, options)
        except ImageError as error:
            self._recorder.decided(Outcome(key="", etag="", reason=error.reason, attempts=1))
            raise
        facts, findings = reading.facts, segmentation.findings
        self._recorder.decided(Outcome(key="", etag="", reason=None, attempts=1, facts=facts, findings=findings))
        values = to_values(findings, facts.fov, (facts.height, facts.width), facts.quality)
        values |= identify(Entry("", 0, ""), facts, None).to_values()
        values["seconds"] = facts.seconds | segmentation.seconds
        return Answer(self._model | values, segmentation.mask_png, segmentation.overlay_jpeg)

    def _attempt(self, data: bytes, options: ScoreOptions) -> tuple[Reading, Segmentation]:
        """Once more where a replica was lost, perhaps to somebody else's photograph, or was dead already."""
        try:
            return self._scored(data, options)
        except WorkerLostError as lost:
            if lost.reason is not Reason.CRASHED_WORKER:
                raise
        time.sleep(_PAUSE_S)
        return self._scored(data, options)

    def _scored(self, data: bytes, options: ScoreOptions) -> tuple[Reading, Segmentation]:
        reading = self._fleet.read_upload(data, options.field)
        return reading, self._fleet.segment(reading, options.operating_point)

    def ready(self) -> bool:
        """Whether the fleet is up."""
        return self._fleet.up()

    def request_archive(self, source: str, destination: str, options: ScoreOptions) -> dict[str, Any]:
        """Note an archive job; raises as `ArchiveJobs.request` does."""
        job = self._jobs.request(source, destination, options)
        self.changed.set()
        return self._known(job, self._running())

    def archives(self) -> list[dict[str, Any]]:
        """All jobs, the earliest first; one that cannot be told of says why. Takes some seconds at most for the
        destinations.
        """
        running, listing = self._running(), self._jobs.list()
        runs = self._runs(job.destination for job in listing.jobs if job.finished is not None)
        known = [self._known(job, running) | _fault(job, runs.get(job.destination)) for job in listing.jobs]
        faults = listing.unreadable.items()
        return known + [{"id": job_id, "state": JobState.FAILED, "error": fault} for job_id, fault in faults]

    def archive(self, job_id: str) -> dict[str, Any]:
        """One job, with the status of its run once that is planned, and the last lines of its driver; raises
        ObjectMissingError.
        """
        job = self._jobs.get(job_id)
        known = self._known(job, self._running()) | {"status": None, "log": self._jobs.log(job_id)}
        try:
            status = None if job.run() is None else self._metrics.status(job.destination)
            return known | {"status": status and status.to_json()}
        except MaClusterError as error:
            return known | {"error": job.error or str(error)}

    def cancel_archive(self, job_id: str) -> dict[str, Any]:
        """Want a job no more; raises ObjectMissingError."""
        job = self._jobs.cancel(job_id)
        self.changed.set()
        return self._known(job, self._running())

    def metrics(self) -> bytes:
        """Of the archives, in Prometheus's text format."""
        return self._metrics.text()

    def _known(self, job: ArchiveJob, running: set[str]) -> dict[str, Any]:
        return {"state": job.state(job.id in running)} | dataclasses.asdict(job)


def _fault(job: ArchiveJob, found: Run | MaClusterError | None) -> dict[str, str]:
    """What is wrong with the destination of a finished job, as its entry shows it."""
    if job.finished is None:
        return {}
    try:
        if isinstance(found, MaClusterError):
            raise found
        if job.check(found) is None:
            return {"error": "the destination does not hold its run any more; ask for it again"}
    except MaClusterError as error:
        return {"error": str(error)}
    return {}


class Looks(Generic[_Found]):
    """Looks at destinations, for some seconds at most. Each store has threads of its own: one that is down, and takes
    minutes to say so, holds up no other, and is not asked again meanwhile. What it says in the end is told once, at the
    next call, where that is late as well: it may never be quicker.
    """

    def __init__(self, look: Callable[[str], _Found], within_s: float = _WITHIN_S) -> None:
        self._look, self._within_s = look, within_s
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._under_way: dict[str, Future[_Found]] = {}
        self._beginning = threading.Lock()

    def __call__(self, urls: Iterable[str]) -> dict[str, _Found | MaClusterError]:
        """What is found at each URL, or why nothing is."""
        with self._beginning:
            looks = {url: self._begun(url) for url in urls}
        wait([look for look, _ in looks.values()], self._within_s)
        told = {url: late if late and not look.done() else look for url, (look, late) in looks.items()}
        found = {url: self._found(look) for url, look in told.items()}
        with self._beginning:
            for url in [url for url, look in told.items() if look.done() and self._under_way.get(url) is look]:
                del self._under_way[url]
        return found

    def _begun(self, url: str) -> tuple[Future[_Found], Future[_Found] | None]:
        """The look that is under way, and one that has ended since the last call."""
        before = self._under_way.get(url)
        if before is not None and not before.done():
            return before, None
        store = "/".join(url.split("/")[:3]) if "://" in url else "local"
        threads = self._threads.setdefault(store, ThreadPoolExecutor(_LOOKS))
        look = self._under_way[url] = threads.submit(self._look, url)
        return look, before

    def _found(self, look: Future[_Found]) -> _Found | MaClusterError:
        if not look.done():
            return StoreError(f"its store did not answer within {self._within_s:g} s")
        error = look.exception()
        if error is None:
            return look.result()
        if isinstance(error, MaClusterError):
            return error
        log.error("a destination was looked at in vain", exc_info=error)
        return StoreError("its destination cannot be read; the service's log says more")


class ArchiveMetrics(Collector):
    """`ma_archive_images{run,status}`, `ma_archive_remaining{run}` and `ma_archive_ungradable{run}` of the runs at some
    destinations."""

    def __init__(self, destinations: Callable[[], Iterable[str]]) -> None:
        self._destinations = destinations
        self._followed: dict[str, _Followed] = {}
        self._looks = Looks(self.status)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def describe(self) -> list[Metric]:
        """The families without values: registering must not ask a store."""
        return list(_families())

    def collect(self) -> Iterator[Metric]:
        """One scrape. A run whose store does not answer is left out, so that its series end and an alert can say so."""
        images, remaining, ungradable = _families()
        for found in self._looks(set(self._destinations())).values():
            if isinstance(found, MaClusterError):
                log.warning("an archive is not counted: %s", found)
            elif found is not None:
                for status in Status:
                    images.add_metric([found.run.id, status], found.counts.statuses[status])
                remaining.add_metric([found.run.id], found.remaining)
                ungradable.add_metric([found.run.id], found.counts.ungradable)
        yield from (images, remaining, ungradable)

    def status(self, url: str) -> RunStatus | None:
        """Of the run at a destination, None before it is planned; only what is new since the last time is read."""
        return self._followed.setdefault(url, _Followed(open_store(url))).status()

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)


class _Followed:
    """The run at one destination, as it grows. A part never changes, so each is read once; all are counted anew where
    retries grow, where parts were put aside, and where another run has taken the place of the first.
    """

    def __init__(self, dest: Store) -> None:
        self._dest, self._counting = dest, threading.Lock()
        self._begun: str | None = None
        self._retried: list[int] = []
        self._parts: set[int] = set()
        self._tally = Tally()

    def status(self) -> RunStatus | None:
        """Its status, None before it is planned."""
        with self._counting:  # whoever asks meanwhile finds it counted
            run = read_run(self._dest)
            return None if run is None else self._count(run)

    def _count(self, run: Run) -> RunStatus:
        parts, retried = committed(self._dest), [len(committed(retry)) for retry, _ in retries(self._dest)]
        grown = self._parts == parts if retried else self._parts <= parts
        if run.started != self._begun or retried != self._retried or not grown:
            self._parts, self._tally = set(), Tally()
        tally = Tally(self._tally.counts, [*self._tally.latest])  # a store that fails half way leaves the old one
        if parts != self._parts:
            new = count_parts(self._dest, run) if retried else count_shards(self._dest, run, parts - self._parts)
            for counts in new:
                tally.add(counts)
        self._begun, self._retried, self._parts, self._tally = run.started, retried, parts, tally
        return tally.status(self._dest, run, len(retried))


def _families() -> tuple[GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily]:
    images, remaining, ungradable = (
        GaugeMetricFamily(metric.name, metric.help, labels=list(metric.labels)) for metric in ARCHIVE_STATE
    )
    return images, remaining, ungradable
