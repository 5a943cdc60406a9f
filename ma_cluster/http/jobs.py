"""The archive runs that the HTTP service was asked for, each an object of a store of its own. No Ray in here.

    archives/ID.json      what was asked for, and what became of it: see `ArchiveJob`
    logs/ID.txt           the last that its driver wrote

A job stands for one run: its source, its destination, and the digests that decide a result. What lies in the
destination is the job's only where it is that run; another run there is the job's error.
"""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ma_cluster.archive.run import Run, check_same, read_run
from ma_cluster.config import KnownField, OperatingPoint, ScoreOptions, digest
from ma_cluster.errors import MaClusterError, ObjectMissingError, RunConflictError, StoreError, UsageError
from ma_cluster.storage.manifest import open_source
from ma_cluster.storage.store import Entry, open_store

_KEY = re.compile(r"archives/([0-9a-f]{16})\.json")
_READS = 8  # entries read at a time: they wait for the store, not for a core


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
    """Follows from source, destination and digests: to ask twice is to ask once."""
    source: str
    destination: str
    model_digest: str
    config_digest: str
    requested: str
    operating_point: OperatingPoint = "default"
    field_degrees: float = 0.0
    no_surround: bool = False
    """These three are `ScoreOptions`, as the command line has them; the digest of the configuration follows from them.
    """
    finished: str | None = None
    """When its run was found complete, after its driver had ended."""
    cancelled: bool = False
    error: str | None = None
    """Why it ended before it was done; None where it did not."""
    failed_starts: int = 0
    """How often its driver was started and did not live to say how it went; one that has not yet answered included."""

    @property
    def options(self) -> ScoreOptions:
        """What it was asked for with."""
        return ScoreOptions(self.operating_point, KnownField(self.field_degrees, self.no_surround))

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for it."""
        return not self.cancelled and self.error is None and self.finished is None

    def state(self, running: bool) -> JobState:
        """How it stands; `running` says whether something drives it."""
        if running:
            return JobState.RUNNING
        if self.finished is not None:
            return JobState.FINISHED
        if self.cancelled:
            return JobState.CANCELLED
        return JobState.QUEUED if self.error is None else JobState.FAILED

    def run(self) -> Run | None:
        """Its run, None where that is not planned.

        Raises:
            RunConflictError: the destination holds another run.
            MaClusterError: the destination does not answer, or holds what is no run.
        """
        return self.check(read_run(open_store(self.destination)))

    def check(self, run: Run | None) -> Run | None:
        """The run that the destination holds, where it is the job's own; raises RunConflictError."""
        if run is not None:
            check_same(run, {name: getattr(self, name) for name in ("source", "model_digest", "config_digest")})
        return run


@dataclass(frozen=True, slots=True)
class Listing:
    """All jobs of a service, the earliest first, and what is wrong with entries that are none, by their ids."""

    jobs: list[ArchiveJob]
    unreadable: dict[str, str]


class ArchiveJobs:
    """All jobs of a service, in its store."""

    def __init__(self, url: str, model_digest: str, config_digest: Callable[[ScoreOptions], str]) -> None:
        """The digests are those of the runs that the service can do, the second as they are asked for.

        Raises StoreError: the store under the URL does not answer, cannot be written, or honours no conditional writes.
        """
        self._store = open_store(url, private=True)
        self._model_digest, self._config_digest = model_digest, config_digest
        self._changing = threading.RLock()
        self._known: dict[str, tuple[Entry, ArchiveJob]] = {}
        known = "service.json", b'{"format": "ma_cluster.service/2"}\n'
        if self._store.create(*known) and self._store.create(*known):
            raise StoreError("the store of --state overwrites where it should only create; use one that does")

    def request(self, source: str, destination: str, options: ScoreOptions | None = None) -> ArchiveJob:
        """Note a job, or want one again that was cancelled, failed, or is not in its destination any more.

        Raises:
            UsageError: one of the URLs is of no store that is known, or lies in the service's own, or the destination
                holds what is no run.
            RunConflictError: the destination holds another run, or another job is to put one there.
            StoreError: a store does not answer.
        """
        source, dest = open_source(source).url, open_store(destination).url
        own = tuple(f"{self._store.url}/{folder}/" for folder in ("archives", "logs"))
        if any(url == self._store.url or f"{url}/".startswith(own) for url in (source, dest)):
            raise UsageError("this is where the service keeps its jobs: give another source, or another destination")
        options = options or ScoreOptions()
        model, config = self._model_digest, self._config_digest(options)
        job = ArchiveJob(
            id=digest([source, dest, model, config])[:16],
            source=source,
            destination=dest,
            model_digest=model,
            config_digest=config,
            requested=datetime.now(UTC).isoformat(timespec="seconds"),
            operating_point=options.operating_point,
            field_degrees=options.field.degrees,
            no_surround=options.field.no_surround,
        )
        run = job.run()
        with self._changing:
            for other in self.list().jobs:
                rival = other.destination == dest and other.wanted and self.possible(other)
                if rival and other.id != job.id:
                    raise RunConflictError(f"job {other.id} has this destination, too; use another, or cancel that job")
            if self._store.create(_key(job.id), _to_json(job)):
                return job
            known = self.get(job.id)
            done = known.finished is not None and run is not None and run.finished is not None
            if known.wanted or done:
                return known
            return self.change(job.id, finished=None, cancelled=False, error=None, failed_starts=0)

    def possible(self, job: ArchiveJob) -> bool:
        """Whether this service has the model and the numbers that the job was asked for with."""
        return (job.model_digest, job.config_digest) == (self._model_digest, self._config_digest(job.options))

    def cancel(self, job_id: str) -> ArchiveJob:
        """Want a job no more; raises ObjectMissingError where there is none."""
        return self.change(job_id, cancelled=True)

    def fail(self, job_id: str, error: str) -> ArchiveJob:
        """Note why a job ended; it waits until somebody asks for it again."""
        return self.change(job_id, error=error)

    def finish(self, job_id: str) -> ArchiveJob:
        """Note that a driver has ended well, where its run is there and complete; else why it is not."""
        try:
            run = self.get(job_id).run()
        except MaClusterError as error:
            return self.fail(job_id, str(error))
        if run is None or run.finished is None:
            return self.fail(job_id, "its driver ended well, and the destination holds no finished run; ask again")
        return self.change(job_id, finished=run.finished)

    def change(self, job_id: str, **values: Any) -> ArchiveJob:
        """A job with other values, as it is kept from now on; raises as `get` does."""
        with self._changing:  # requests and the runner change jobs, from several threads
            job = dataclasses.replace(self.get(job_id), **values)
            self._store.put(_key(job.id), _to_json(job))
        return job

    def get(self, job_id: str) -> ArchiveJob:
        """A job by its id.

        Raises:
            ObjectMissingError: there is none.
            StoreError: what is there was not written by this version.
        """
        key = _key(job_id)
        missing = ObjectMissingError("there is no such job; GET /v1/archives lists them")
        if _KEY.fullmatch(key) is None:
            raise missing
        try:
            job = _FORMAT.validate_json(self._store.get(key))
        except ObjectMissingError as error:
            raise missing from error
        except ValidationError as error:
            raise StoreError(f"job {job_id} was not written by this version; remove it from --state") from error
        if job.id != job_id:
            raise StoreError(f"job {job_id} is a copy of another; remove it from --state")
        return job

    def list(self) -> Listing:
        """All of them; an entry that cannot be read hides no other. Raises StoreError: the store does not answer."""
        listing = Listing([], {})
        with ThreadPoolExecutor(_READS) as readers:
            entries = list(self._store.list("archives/"))
            for entry, job in zip(entries, readers.map(self._read, entries), strict=True):
                if isinstance(job, ArchiveJob):
                    listing.jobs.append(job)
                else:
                    listing.unreadable[entry.key.removeprefix("archives/").removesuffix(".json")] = job
        listing.jobs.sort(key=lambda job: (job.requested, job.id))
        return listing

    def _read(self, entry: Entry) -> ArchiveJob | str:
        """The job of an entry, read anew where the entry has changed, or what is wrong with it."""
        known, job = self._known.get(entry.key, (None, None))
        if job is not None and known == entry:
            return job
        match = _KEY.fullmatch(entry.key)
        if match is None:
            return "archives/ of --state holds what is no job; remove it"
        try:
            job = self.get(match[1])
        except MaClusterError as error:
            return str(error)
        self._known[entry.key] = entry, job
        return job

    def keep_log(self, job_id: str, text: str) -> None:
        """Replace what is known of a driver's lines."""
        self._store.put(_log_key(job_id), text.encode())

    def log(self, job_id: str) -> str:
        """The last lines of a job's driver, empty before it has written any."""
        try:
            return self._store.get(_log_key(job_id)).decode(errors="replace")
        except ObjectMissingError:
            return ""


_FORMAT = TypeAdapter(ArchiveJob)


def _key(job_id: str) -> str:
    return f"archives/{job_id}.json"


def _log_key(job_id: str) -> str:
    return f"logs/{job_id}.txt"


def _to_json(job: ArchiveJob) -> bytes:
    return (json.dumps(dataclasses.asdict(job), indent=2) + "\n").encode()
