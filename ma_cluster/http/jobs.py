"""The archive runs that the HTTP service was asked for, each an object of a store of its own. No Ray in here.

    archives/ID.json      source, destination, when it was asked for, whether it was cancelled, why it last failed

What became of a run is told by its destination alone, so a service that starts anew knows all that the last one knew.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from ma_cluster.archive.run import read_run
from ma_cluster.config import digest
from ma_cluster.errors import ObjectMissingError, RunConflictError, StoreError
from ma_cluster.storage.manifest import open_source
from ma_cluster.storage.store import open_store


class JobState(StrEnum):
    """How an archive job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveJob:
    """What was asked for. Times are ISO 8601, UTC."""

    id: str
    """Follows from source and destination: to ask twice is to ask once."""
    source: str
    destination: str
    requested: str
    cancelled: bool = False
    error: str | None = None
    """Why it ended before it was done; None where it did not."""

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for it."""
        return not self.cancelled and self.error is None


class ArchiveJobs:
    """All jobs of a service, in its store."""

    def __init__(self, url: str) -> None:
        """Raises StoreError: the store under the URL does not answer, or cannot be written."""
        self._store = open_store(url)
        self._store.create("service.json", b'{"format": "ma_cluster.service/1"}\n')

    def request(self, source: str, destination: str) -> ArchiveJob:
        """Note a job, or want one again that was cancelled or failed.

        Raises:
            UsageError: one of the URLs is of no store that is known, or the destination holds what is no run.
            RunConflictError: the destination holds the run of another source.
            StoreError: a store does not answer.
        """
        source, dest = open_source(source).url, open_store(destination)
        run = read_run(dest)
        if run is not None and run.source != source:
            raise RunConflictError(f"the destination holds run {run.id} of another source; use an empty one")
        job = ArchiveJob(
            id=digest([source, dest.url])[:16],
            source=source,
            destination=dest.url,
            requested=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        if self._store.create(_key(job.id), _to_json(job)):
            return job
        known = self.get(job.id)
        return known if known.wanted else self._put(dataclasses.replace(known, cancelled=False, error=None))

    def cancel(self, job_id: str) -> ArchiveJob:
        """Want a job no more; raises ObjectMissingError where there is none."""
        return self._put(dataclasses.replace(self.get(job_id), cancelled=True))

    def fail(self, job_id: str, error: str) -> ArchiveJob:
        """Note why a job ended; it waits until somebody asks for it again."""
        return self._put(dataclasses.replace(self.get(job_id), error=error))

    def get(self, job_id: str) -> ArchiveJob:
        """A job by its id.

        Raises:
            ObjectMissingError: there is none.
            StoreError: what is there was not written by this version.
        """
        try:
            return ArchiveJob(**json.loads(self._store.get(_key(job_id if job_id.isalnum() else "none"))))
        except ObjectMissingError as error:
            raise ObjectMissingError("there is no such job; GET /v1/archives lists them") from error
        except (TypeError, ValueError) as error:
            raise StoreError(
                f"job {job_id} was not written by this version; remove it from the service's store"
            ) from error

    def list(self) -> list[ArchiveJob]:
        """All jobs, the earliest first."""
        keys = [entry.key for entry in self._store.list("archives/")]
        jobs = [self.get(key.removeprefix("archives/").removesuffix(".json")) for key in keys]
        return sorted(jobs, key=lambda job: (job.requested, job.id))

    def _put(self, job: ArchiveJob) -> ArchiveJob:
        self._store.put(_key(job.id), _to_json(job))
        return job


def job_state(job: ArchiveJob, running: bool) -> JobState:
    """How a job stands; `running` says whether something drives it.

    Raises:
        StoreError: its destination does not answer.
    """
    if running:
        return JobState.RUNNING
    run = read_run(open_store(job.destination))
    if run is not None and run.finished is not None:
        return JobState.FINISHED
    if job.cancelled:
        return JobState.CANCELLED
    return JobState.FAILED if job.error is not None else JobState.QUEUED


def _key(job_id: str) -> str:
    return f"archives/{job_id}.json"


def _to_json(job: ArchiveJob) -> bytes:
    return (json.dumps(dataclasses.asdict(job), indent=2) + "\n").encode()
