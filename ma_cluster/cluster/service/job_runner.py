"""Drives the archive jobs of a service: what the store wants to run, runs, each as `ma-cluster score` on this cluster.

A job's driver is a process beside a detached actor, so it outlives the Gateway; the store says what is wanted, the
cluster says what runs, and `reconcile` brings the second in line with the first, as often as it is called.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util import list_named_actors

from ma_cluster.errors import MaClusterError
from ma_cluster.http.jobs import ArchiveJob, ArchiveJobs, JobState, job_state

log = logging.getLogger(__name__)
_NAMESPACE, _PREFIX = "ma-cluster", "archive-"
_ENDED_WELL = (0, 3, 143, -15)  # all scored, some not, cancelled: at its work, or before it had begun
_MESSAGE_BYTES = 4096
_ANSWER_S = 30.0


class DriverProcess:
    """The actor beside a driver: starts it, says whether it still runs, ends it."""

    def __init__(self, command: Sequence[str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._errors
        )

    def poll(self) -> tuple[int | None, str]:
        """Its exit status, None while it runs, and the last line that it wrote for people."""
        status = self._process.poll()
        if status is None:
            return None, ""
        size = self._errors.seek(0, 2)
        self._errors.seek(max(0, size - _MESSAGE_BYTES))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return status, lines[-1].removeprefix("ma-cluster: ") if lines else f"ended with status {status}"

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
    _done: set[str] = field(default_factory=set)

    def running(self) -> set[str]:
        """Ids of the jobs that something drives."""
        named: list[dict[str, str]] = list_named_actors(all_namespaces=True)
        own = [actor["name"] for actor in named if actor["namespace"] == _NAMESPACE]
        return {name.removeprefix(_PREFIX) for name in own if name.startswith(_PREFIX)}

    def reconcile(self) -> None:
        """Take note of drivers that have ended, end those that nobody wants, start those that are wanted.

        Raises:
            StoreError: the store of the jobs does not answer.
        """
        running = {job_id for job_id in self.running() if self._still_runs(job_id)}
        for job in self.jobs.list():
            if job.id in running and not job.wanted:
                self._ask(job.id, "stop")
            elif job.wanted and job.id not in running | self._done and len(running) < self.at_once:
                running |= self._begin(job)

    def stop(self, timeout_s: float) -> None:
        """End all drivers and wait for them; the jobs stay wanted."""
        deadline = time.monotonic() + timeout_s
        for job_id in self.running():
            self._ask(job_id, "stop")
        while any([self._still_runs(job_id) for job_id in self.running()]) and time.monotonic() < deadline:
            time.sleep(0.2)

    def _begin(self, job: ArchiveJob) -> set[str]:
        try:
            finished = job_state(job, running=False) is JobState.FINISHED
        except MaClusterError as error:
            log.warning("the destination of job %s: %s", job.id, error)
            return set()
        if finished:
            self._done.add(job.id)
            return set()
        address = ray.get_runtime_context().gcs_address
        command = [sys.executable, "-m", "ma_cluster", "score", job.source, job.destination, "--address", address]
        ray.remote(DriverProcess).options(
            name=_PREFIX + job.id, namespace=_NAMESPACE, lifetime="detached", num_cpus=0, get_if_exists=True
        ).remote([*command, *self.options])
        return {job.id}

    def _still_runs(self, job_id: str) -> bool:
        answer = self._ask(job_id, "poll")
        if answer is None:
            return False
        status, message = answer
        if status is None:
            return True
        if status not in _ENDED_WELL:
            log.warning("job %s ended with %d: %s", job_id, status, message)
            self.jobs.fail(job_id, message)
        ray.kill(ray.get_actor(_PREFIX + job_id, _NAMESPACE))
        return False

    def _ask(self, job_id: str, method: str) -> Any:
        """What the actor of a job answers, None where it is gone."""
        try:
            actor: Any = ray.get_actor(_PREFIX + job_id, _NAMESPACE)
            return ray.get(getattr(actor, method).remote(), timeout=_ANSWER_S)
        except (ValueError, RayActorError):  # there is none, or not any more
            return None
