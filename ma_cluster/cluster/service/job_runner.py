"""Drives the archive jobs of a service: what the store wants to run, runs, each as `ma-cluster score` on this cluster.

A job's driver is a process beside a detached actor, so it outlives the Gateway; the store says what is wanted, the
cluster says what runs, and `reconcile` brings the second in line with the first, as often as it is called.

Not Ray Jobs: they need the dashboard, and that the node's agent has got port 52365. A second Ray on a machine does not
get it, `ray.init` cannot ask for another, and every job is then refused ("No available agent to submit job").
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError
from ray.util import list_named_actors

from ma_cluster.errors import MaClusterError
from ma_cluster.http.jobs import ArchiveJob, ArchiveJobs

log = logging.getLogger(__name__)
_NAMESPACE, _PREFIX = "ma-cluster", "archive-"
_COMPLETE = (0, 3)  # all scored; some refused or failed
_CANCELLED = (128 + signal.SIGTERM, -signal.SIGTERM)  # at its work; before it had begun
_STARTS = 3  # that fail before a job has
_LOG_BYTES = 16_384
_ANSWER_S = 30.0
_OTHER_MODEL = "it was asked for of another model or other numbers than this service has; ask for it again"
_ALIVE: tuple[int | None, str] = (None, "")


class DriverProcess:
    """The actor beside a driver: starts it, says whether it still runs, ends it."""

    def __init__(self, command: Sequence[str]) -> None:
        self._lines = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._lines, stderr=subprocess.STDOUT, env=environment
        )

    def poll(self) -> tuple[int | None, str]:
        """Its exit status, None while it runs, and the last that it wrote."""
        status = self._process.poll()
        size = os.fstat(self._lines.fileno()).st_size
        last = os.pread(self._lines.fileno(), _LOG_BYTES, max(0, size - _LOG_BYTES))
        return status, last.decode(errors="replace")

    def stop(self) -> None:
        """Ask it to end; it leaves a run that can be resumed."""
        self._process.terminate()


@dataclass(frozen=True, slots=True)
class JobRunner:
    """Runs the jobs of a store on the Ray that this process is connected to."""

    jobs: ArchiveJobs
    options: tuple[str, ...]
    """Of `ma-cluster score`: the model and the warm fleet."""
    at_once: int
    """Jobs that run at a time; the others wait in the order in which they were asked for."""
    _logs: dict[str, str] = field(default_factory=dict)
    """Of the drivers that run, as they were last kept."""
    _slow: set[str] = field(default_factory=set)
    """Jobs whose driver was started, and had not answered yet."""

    def running(self) -> set[str]:
        """Ids of the jobs that something drives."""
        named: list[dict[str, str]] = list_named_actors(all_namespaces=True)
        own = [actor["name"] for actor in named if actor["namespace"] == _NAMESPACE]
        return {name.removeprefix(_PREFIX) for name in own if name.startswith(_PREFIX)}

    def reconcile(self) -> None:
        """Take note of drivers that have ended, end those that nobody wants, start those that are wanted. What goes
        wrong with one job holds up no other.

        Raises:
            StoreError: the store of the jobs does not answer.
        """
        running = {job_id for job_id in self.running() if self._still_runs(job_id)}
        for job in self.jobs.list().jobs:
            if job.id in running and not job.wanted:
                self._ask(job.id, "stop")
            elif job.wanted and job.id not in running and len(running) < self.at_once and self._begin(job):
                running.add(job.id)

    def stop(self, timeout_s: float) -> None:
        """End all drivers and wait for them; the jobs stay wanted."""
        deadline = time.monotonic() + timeout_s
        for job_id in self.running():
            self._ask(job_id, "stop")
        while any([self._still_runs(job_id) for job_id in self.running()]) and time.monotonic() < deadline:
            time.sleep(0.2)

    def _begin(self, job: ArchiveJob) -> bool:
        """Whether a driver runs now. A start counts as failed from before it until its driver answers, so that one
        that takes the Gateway with it is counted, too.
        """
        if not self.jobs.possible(job):
            self.jobs.fail(job.id, _OTHER_MODEL)
            return False
        if job.failed_starts >= _STARTS:
            self.jobs.fail(job.id, f"it was started {job.failed_starts} times, and its driver never answered")
            return False
        self.jobs.change(job.id, failed_starts=job.failed_starts + 1)
        address = ray.get_runtime_context().gcs_address
        command = [sys.executable, "-m", "ma_cluster", "score", job.source, job.destination, "--address", address]
        command += ["--operating-point", job.operating_point, "--field-degrees", repr(job.field_degrees)]
        command += ["--no-surround"] * job.no_surround
        actor: Any = ray.remote(DriverProcess).options(
            name=_PREFIX + job.id, namespace=_NAMESPACE, lifetime="detached", num_cpus=0, get_if_exists=True
        )
        try:
            ray.get(actor.remote([*command, *self.options]).poll.remote(), timeout=_ANSWER_S)
        except GetTimeoutError:  # a slow start is none that has failed, once it answers
            self._slow.add(job.id)
            return True
        except RayActorError as error:
            self._start_failed(job.id, str(error).strip().splitlines()[-1])
            return False
        self.jobs.change(job.id, failed_starts=job.failed_starts)
        return True

    def _start_failed(self, job_id: str, why: str) -> None:
        log.warning("a driver of job %s failed: %s", job_id, why)
        if self.jobs.get(job_id).failed_starts >= _STARTS:
            self.jobs.fail(job_id, f"it was started {_STARTS} times in vain; the last time: {why}")

    def _still_runs(self, job_id: str) -> bool:
        answer = self._ask(job_id, "poll")
        if answer is None:
            self._slow.discard(job_id)
            return False
        status, lines = answer
        try:
            if job_id in self._slow and answer is not _ALIVE:
                self.jobs.change(job_id, failed_starts=max(0, self.jobs.get(job_id).failed_starts - 1))
                self._slow.remove(job_id)
            if lines and lines != self._logs.get(job_id):
                self.jobs.keep_log(job_id, lines)
                self._logs[job_id] = lines
            if status is not None:
                self._note(job_id, status, lines)
        except MaClusterError as error:  # the actor is kept, and asked again: how it ended must not be lost
            log.warning("of job %s nothing can be noted: %s", job_id, error)
            return status is None
        if status is None:
            return True
        self._logs.pop(job_id, None)
        ray.kill(ray.get_actor(_PREFIX + job_id, _NAMESPACE))
        return False

    def _note(self, job_id: str, status: int, lines: str) -> None:
        """Keep how a driver ended."""
        if status in _COMPLETE:
            self.jobs.finish(job_id)
        elif status in _CANCELLED:
            return
        elif status < 0:  # killed, as by a machine that is out of memory: the next may fare better
            failed = self.jobs.get(job_id).failed_starts + 1
            self.jobs.change(job_id, failed_starts=failed)
            self._start_failed(job_id, f"its driver was killed ({signal.Signals(-status).name})")
        else:
            self.jobs.fail(job_id, _message(lines) or f"its driver ended with status {status}")

    def _ask(self, job_id: str, method: str) -> Any:
        """What the actor of a job answers, None where it is gone; one that is stuck still runs."""
        try:
            actor: Any = ray.get_actor(_PREFIX + job_id, _NAMESPACE)
            return ray.get(getattr(actor, method).remote(), timeout=_ANSWER_S)
        except (GetTimeoutError, ActorUnavailableError):
            return _ALIVE
        except (ValueError, RayActorError):  # there is none, or not any more
            return None


def _message(lines: str) -> str:
    """What a driver said last: in the command's own words, where there are any."""
    written = lines.strip().splitlines()
    own = [line for line in written if line.startswith("ma-cluster: ")]
    return (own or written or [""])[-1].removeprefix("ma-cluster: ")
