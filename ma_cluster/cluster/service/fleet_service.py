"""What stands behind the routes of the HTTP service: the warm fleet, and the archive jobs of the service's store."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any

from ma_cluster.bundle import Bundle
from ma_cluster.cluster import metrics
from ma_cluster.cluster.archive.outcomes import Outcome
from ma_cluster.cluster.archive.run import read_run
from ma_cluster.cluster.archive.status import read_status, to_json
from ma_cluster.cluster.fleet.replicas import Reading, Segmentation
from ma_cluster.cluster.fleet.scoring_app import ScoringApp
from ma_cluster.cluster.service.archive_jobs import ArchiveJob, ArchiveJobs, job_state
from ma_cluster.cluster.service.archive_metrics import ArchiveMetrics
from ma_cluster.cluster.service.http_api import Answer
from ma_cluster.cluster.service.job_runner import JobRunner
from ma_cluster.errors import ImageError, Reason, WorkerLostError
from ma_cluster.images.store import open_store
from ma_cluster.lesions.table import to_values

_PAUSE_S = 2.0
"""After a lost replica: until then Serve still sends requests to it."""


class FleetService:
    """The `Service` of http_api.py."""

    def __init__(self, app: ScoringApp, jobs: ArchiveJobs, runner: JobRunner, bundle: Bundle) -> None:
        self._app, self._jobs, self._runner = app, jobs, runner
        self._model = {"model_digest": bundle.digest, "threshold": bundle.recipe.detector.threshold}
        self._recorder = metrics.Recorder()
        self._metrics = ArchiveMetrics(lambda: [job.destination for job in jobs.list() if not job.cancelled])
        self.changed = threading.Event()
        """Set where somebody asked for something of the jobs."""

    def segment(self, data: bytes) -> Answer:
        """Score an upload, which counts in the metrics as a photograph of an archive does; raises ImageError."""
        self._recorder.begun()
        try:
            reading, segmentation = self._attempt(data)
        except ImageError as error:
            self._recorder.decided(Outcome(key="", etag="", reason=error.reason, attempts=1))
            raise
        facts, lesions = reading.facts, segmentation.lesions
        self._recorder.decided(Outcome(key="", etag="", reason=None, attempts=1, facts=facts, lesions=lesions))
        values = to_values(lesions, facts.fov, (facts.height, facts.width))
        more = {"quality": dataclasses.asdict(facts.quality), "seconds": facts.seconds | segmentation.seconds}
        return Answer(self._model | values | more, segmentation.mask_png, segmentation.overlay_jpeg)

    def _attempt(self, data: bytes) -> tuple[Reading, Segmentation]:
        """Once more where a replica was lost, perhaps to somebody else's photograph, or was dead already."""
        try:
            return self._scored(data)
        except WorkerLostError as lost:
            if lost.reason is not Reason.CRASHED_WORKER:
                raise
        time.sleep(_PAUSE_S)
        return self._scored(data)

    def _scored(self, data: bytes) -> tuple[Reading, Segmentation]:
        reading = self._app.read_upload(data)
        return reading, self._app.segment(reading)

    def ready(self) -> bool:
        """Whether the fleet is up."""
        return self._app.up()

    def request_archive(self, source: str, destination: str) -> dict[str, Any]:
        """Note an archive job; raises as `ArchiveJobs.request` does."""
        job = self._jobs.request(source, destination)
        self.changed.set()
        return self._known(job, self._runner.running())

    def archives(self) -> list[dict[str, Any]]:
        """All jobs, the earliest first."""
        running = self._runner.running()
        return [self._known(job, running) for job in self._jobs.list()]

    def archive(self, job_id: str) -> dict[str, Any]:
        """One job, with the status of its run once that is planned; raises ObjectMissingError."""
        job = self._jobs.get(job_id)
        planned = read_run(open_store(job.destination)) is not None
        return self._known(job, self._runner.running()) | {
            "status": to_json(read_status(job.destination)) if planned else None
        }

    def cancel_archive(self, job_id: str) -> dict[str, Any]:
        """Want a job no more; raises ObjectMissingError."""
        job = self._jobs.cancel(job_id)
        self.changed.set()
        return self._known(job, self._runner.running())

    def metrics(self) -> bytes:
        """Of the archives, in Prometheus's text format."""
        return self._metrics.text()

    def _known(self, job: ArchiveJob, running: set[str]) -> dict[str, Any]:
        return {"state": job_state(job, job.id in running)} | dataclasses.asdict(job)
