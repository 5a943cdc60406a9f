"""What stands behind the routes of the HTTP service: the warm fleet, and the archive jobs of the service's store."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ma_cluster.archive.outcomes import Outcome
from ma_cluster.archive.run import Run, read_run
from ma_cluster.archive.shard_scorer import Reading, Recorder, Segmentation
from ma_cluster.archive.summary import read_status
from ma_cluster.bundle import Bundle
from ma_cluster.config import OperatingPoint
from ma_cluster.errors import ImageError, MaClusterError, Reason, WorkerLostError
from ma_cluster.http.api import Answer
from ma_cluster.http.archive_metrics import ArchiveMetrics, Looks
from ma_cluster.http.jobs import ArchiveJob, ArchiveJobs, JobState
from ma_cluster.lesions.grading import to_values
from ma_cluster.storage.store import open_store

_PAUSE_S = 2.0
"""After a lost replica: until then Serve still sends requests to it."""


@runtime_checkable
class WarmFleet(Protocol):
    """A fleet that is up for uploads; `ScoringApp` is one."""

    def read_upload(self, data: bytes) -> Reading:
        """Read one photograph from its encoded bytes; raises ImageError."""

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

    def segment(self, data: bytes, operating_point: OperatingPoint) -> Answer:
        """Score an upload, which counts in the metrics as a photograph of an archive does; raises ImageError."""
        self._recorder.begun()
        try:
            reading, segmentation = self._attempt(data, operating_point)
        except ImageError as error:
            self._recorder.decided(Outcome(key="", etag="", reason=error.reason, attempts=1))
            raise
        facts, findings = reading.facts, segmentation.findings
        self._recorder.decided(Outcome(key="", etag="", reason=None, attempts=1, facts=facts, findings=findings))
        values = to_values(findings, facts.fov, (facts.height, facts.width), facts.quality)
        values["seconds"] = facts.seconds | segmentation.seconds
        return Answer(self._model | values, segmentation.mask_png, segmentation.overlay_jpeg)

    def _attempt(self, data: bytes, point: OperatingPoint) -> tuple[Reading, Segmentation]:
        """Once more where a replica was lost, perhaps to somebody else's photograph, or was dead already."""
        try:
            return self._scored(data, point)
        except WorkerLostError as lost:
            if lost.reason is not Reason.CRASHED_WORKER:
                raise
        time.sleep(_PAUSE_S)
        return self._scored(data, point)

    def _scored(self, data: bytes, point: OperatingPoint) -> tuple[Reading, Segmentation]:
        reading = self._fleet.read_upload(data)
        return reading, self._fleet.segment(reading, point)

    def ready(self) -> bool:
        """Whether the fleet is up."""
        return self._fleet.up()

    def request_archive(self, source: str, destination: str) -> dict[str, Any]:
        """Note an archive job; raises as `ArchiveJobs.request` does."""
        job = self._jobs.request(source, destination)
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
            planned = job.run() is not None
            return known | {"status": read_status(job.destination).to_json() if planned else None}
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
