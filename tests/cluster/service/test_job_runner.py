"""Archive jobs on real Ray whose drivers cannot start, fail or are killed: each is told of, none blocks the queue."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from archive_jobs import config_of, jobs_of, photographs
from processes import descendants, kill

from ma_cluster.cluster.service import job_runner
from ma_cluster.cluster.service.job_runner import DriverProcess, JobRunner
from ma_cluster.http.jobs import ArchiveJobs, JobState
from ma_cluster.storage.local import LocalStore

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def jobs(tmp_path: Path) -> ArchiveJobs:
    photographs(tmp_path)
    return jobs_of(tmp_path)


def runner(jobs: ArchiveJobs) -> JobRunner:
    """Remembers nothing of the last one, as after a restart. There is no such model: drivers find that out."""
    return JobRunner(jobs, ("--model", "lost"), at_once=1)


def until(jobs: ArchiveJobs, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline, jobs.list()
        runner(jobs).reconcile()
        time.sleep(0.1)


def test_a_job_that_cannot_start_fails_with_its_reason_and_the_queue_goes_on(jobs: ArchiveJobs, tmp_path: Path) -> None:
    first = jobs.request(str(tmp_path / "source"), str(tmp_path / "first"))
    entry = json.dumps(dataclasses.asdict(dataclasses.replace(first, source="nu\0l")))
    LocalStore(tmp_path / "state").put(f"archives/{first.id}.json", entry.encode())
    second = jobs.request(str(tmp_path / "source"), str(tmp_path / "second"))
    until(jobs, lambda: jobs.get(second.id).error is not None)
    assert jobs.get(first.id).failed_starts > 0
    until(jobs, lambda: jobs.get(first.id).error is not None)
    failed = jobs.get(first.id)
    assert (failed.state(running=False), failed.failed_starts) == (JobState.FAILED, 3)
    assert "3 times" in str(failed.error)
    assert "null byte" in str(failed.error)


def test_what_a_driver_says_is_the_jobs_error_and_its_lines_are_kept(jobs: ArchiveJobs, tmp_path: Path) -> None:
    job = jobs.request(str(tmp_path / "source"), str(tmp_path / "dest"))
    until(jobs, lambda: jobs.get(job.id).error is not None)
    assert "lost" in str(jobs.get(job.id).error)
    assert f"ma-cluster: {jobs.get(job.id).error}" in jobs.log(job.id)
    assert runner(jobs).running() == set()


@pytest.mark.slow
def test_a_driver_that_is_killed_again_and_again_fails_and_one_that_is_killed_once_does_not(
    jobs: ArchiveJobs, tmp_path: Path
) -> None:
    job = jobs.request(str(tmp_path / "source"), str(tmp_path / "dest"))

    def killed(times: int) -> Callable[[], bool]:
        def done() -> bool:
            kill([process for process in descendants(os.getpid()) if "ma_cluster score" in process.title])
            return jobs.get(job.id).failed_starts >= times and (times < 3 or jobs.get(job.id).error is not None)

        return done

    until(jobs, killed(3))
    assert "SIGKILL" in str(jobs.get(job.id).error)
    assert jobs.request(job.source, job.destination).failed_starts == 0
    until(jobs, killed(1))
    until(jobs, lambda: jobs.get(job.id).error is not None)
    assert "lost" in str(jobs.get(job.id).error)


def test_a_start_that_was_slow_has_not_failed_once_its_driver_answers(
    jobs: ArchiveJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, own = jobs.request(str(tmp_path / "source"), str(tmp_path / "dest")), runner(jobs)
    with monkeypatch.context() as slow:
        slow.setattr(job_runner, "_ANSWER_S", 0.0)
        own.reconcile()
    assert jobs.get(job.id).failed_starts == 1
    own.reconcile()
    assert jobs.get(job.id).failed_starts == 0
    own.stop(timeout_s=30.0)


def test_a_job_of_another_model_is_not_run(jobs: ArchiveJobs, tmp_path: Path) -> None:
    job = jobs.request(str(tmp_path / "source"), str(tmp_path / "dest"))
    runner(ArchiveJobs(str(tmp_path / "state"), "n" * 64, config_of)).reconcile()
    assert "another model" in str(jobs.get(job.id).error)
    assert jobs.request(job.source, job.destination).wanted


def test_an_entry_that_is_damaged_while_its_driver_runs_frees_its_place(jobs: ArchiveJobs, tmp_path: Path) -> None:
    first = jobs.request(str(tmp_path / "source"), str(tmp_path / "first"))
    runner(jobs).reconcile()
    LocalStore(tmp_path / "state").put(f"archives/{first.id}.json", b"{")
    second = jobs.request(str(tmp_path / "source"), str(tmp_path / "second"))
    until(jobs, lambda: jobs.get(second.id).error is not None)
    LocalStore(tmp_path / "state").put(f"archives/{first.id}.json", json.dumps(dataclasses.asdict(first)).encode())
    until(jobs, lambda: jobs.get(first.id).error is not None)


def test_a_driver_whose_lines_cannot_be_kept_is_still_waited_for(jobs: ArchiveJobs, tmp_path: Path) -> None:
    job = jobs.request(str(tmp_path / "source"), str(tmp_path / "dest"))
    slow = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(3), exit(143)))"
    name: dict[str, Any] = {"name": f"archive-{job.id}", "namespace": "ma-cluster", "lifetime": "detached"}
    actor: Any = ray.remote(DriverProcess).options(num_cpus=0, **name)
    driver = actor.remote([sys.executable, "-c", f"{slow}; print('at work', flush=True); time.sleep(60)"])
    while not ray.get(driver.poll.remote())[1]:
        time.sleep(0.05)
    in_the_way = tmp_path / "state" / "logs" / f"{job.id}.txt"
    in_the_way.mkdir(parents=True)
    runner(jobs).stop(timeout_s=30.0)
    assert ray.get(driver.poll.remote())[0] == 143, "it was waited for"
    in_the_way.rmdir()
    runner(jobs).stop(timeout_s=30.0)
    assert runner(jobs).running() == set()
