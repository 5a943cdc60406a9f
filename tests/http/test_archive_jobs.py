"""Archive jobs as the service's store keeps them, and the metrics that their destinations give."""

from __future__ import annotations

from pathlib import Path

import pytest

from ma_cluster.archive.outcomes import Outcome
from ma_cluster.archive.plan import Shard, read_shard
from ma_cluster.archive.retry import begin_retry
from ma_cluster.archive.run import begin_run, commit, pending, read_run
from ma_cluster.archive.summary import finish_run
from ma_cluster.errors import ObjectMissingError, Reason, RunConflictError, StoreError, UsageError
from ma_cluster.http.archive_metrics import ArchiveMetrics
from ma_cluster.http.jobs import ArchiveJobs, JobState, job_state
from ma_cluster.storage.local import LocalStore
from ma_cluster.storage.store import Store


@pytest.fixture
def jobs(tmp_path: Path) -> ArchiveJobs:
    return ArchiveJobs(str(tmp_path / "state"))


@pytest.fixture
def source(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "source")
    for number in range(5):
        store.put(f"eye {number}.jpg", b"x" * (number + 1))
    return store


def begun(source: Store, root: Path) -> LocalStore:
    """A destination with a planned run."""
    dest = LocalStore(root)
    root.mkdir()
    begin_run(source, dest, "m" * 64, "c" * 64)
    return dest


def decide(dest: Store, shard: Shard, reason: Reason | None) -> None:
    run = read_run(dest)
    assert run is not None
    entries = read_shard(dest, shard)
    commit(dest, run, shard, [Outcome(key=e.key, etag=e.etag, reason=reason, attempts=1) for e in entries])


def test_a_job_is_known_to_whoever_serves_next(jobs: ArchiveJobs, tmp_path: Path) -> None:
    asked = jobs.request(str(tmp_path / "a"), str(tmp_path / "b"))
    later = ArchiveJobs(str(tmp_path / "state"))
    assert later.list() == [asked]
    assert later.get(asked.id) == asked


def test_to_ask_twice_is_to_ask_once(jobs: ArchiveJobs, tmp_path: Path) -> None:
    first = jobs.request(str(tmp_path / "a"), str(tmp_path / "b"))
    assert jobs.request(str(tmp_path / "a") + "/", str(tmp_path / "b")) == first
    assert jobs.request(str(tmp_path / "a"), str(tmp_path / "c")).id != first.id
    assert len(jobs.list()) == 2


def test_a_job_that_was_cancelled_or_failed_is_wanted_again_when_it_is_asked_for(
    jobs: ArchiveJobs, tmp_path: Path
) -> None:
    urls = str(tmp_path / "a"), str(tmp_path / "b")
    job = jobs.request(*urls)
    for ended in (jobs.cancel(job.id), jobs.fail(job.id, "the fleet is broken")):
        assert not ended.wanted
        assert jobs.request(*urls) == job


def test_the_state_follows_from_what_was_asked_and_what_the_destination_holds(
    jobs: ArchiveJobs, source: LocalStore, tmp_path: Path
) -> None:
    job = jobs.request(source.url, str(tmp_path / "dest"))
    assert job_state(job, running=False) is JobState.QUEUED
    assert job_state(job, running=True) is JobState.RUNNING
    assert job_state(jobs.cancel(job.id), running=False) is JobState.CANCELLED
    jobs.request(job.source, job.destination)
    assert job_state(jobs.fail(job.id, "a fault"), running=False) is JobState.FAILED
    dest = begun(source, tmp_path / "dest")
    assert job_state(jobs.request(job.source, job.destination), running=False) is JobState.QUEUED
    run = read_run(dest)
    assert run is not None
    for shard in pending(dest, run):
        decide(dest, shard, None)
    finish_run(dest, run)
    assert job_state(jobs.cancel(job.id), running=False) is JobState.FINISHED


def test_a_job_that_cannot_be_is_refused_when_it_is_asked_for(
    jobs: ArchiveJobs, source: LocalStore, tmp_path: Path
) -> None:
    begun(source, tmp_path / "dest")
    with pytest.raises(RunConflictError, match="another source"):
        jobs.request(str(tmp_path / "other"), str(tmp_path / "dest"))
    with pytest.raises(UsageError, match="not a store"):
        jobs.request("ftp://archive", str(tmp_path / "dest"))
    assert jobs.list() == []


@pytest.mark.parametrize("job_id", ["nobody", "../service", "a/b", ""])
def test_an_id_of_no_job_is_missing(jobs: ArchiveJobs, job_id: str) -> None:
    with pytest.raises(ObjectMissingError, match="no such job"):
        jobs.get(job_id)


def test_a_job_of_another_version_is_named(jobs: ArchiveJobs, tmp_path: Path) -> None:
    LocalStore(tmp_path / "state").put("archives/abc.json", b'{"id": "abc", "colour": "red"}')
    with pytest.raises(StoreError, match="job abc was not written by this version"):
        jobs.list()


def test_a_store_that_cannot_be_written_says_so_at_once(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where the folder should be")
    with pytest.raises(StoreError, match="cannot be written"):
        ArchiveJobs(str(tmp_path / "state"))


def test_metrics_follow_the_parts_and_their_retries(source: LocalStore, tmp_path: Path) -> None:
    dest = begun(source, tmp_path / "dest")
    run = read_run(dest)
    assert run is not None
    metrics = ArchiveMetrics(lambda: [dest.url, str(tmp_path / "not planned yet")])

    def figures() -> tuple[float, float, float]:
        lines = dict(line.rsplit(" ", 1) for line in metrics.text().decode().splitlines() if line[0] != "#")
        images = f'ma_archive_images{{run="{run.id}",status='
        remaining = lines[f'ma_archive_remaining{{run="{run.id}"}}']
        return float(remaining), float(lines[images + '"scored"}']), float(lines[images + '"failed"}'])

    assert figures() == (5, 0, 0)
    for shard in pending(dest, run):
        decide(dest, shard, Reason.STORE_ERROR)
    assert figures() == figures() == (0, 0, 5)
    finish_run(dest, run)
    again = begin_retry(source, dest, run)
    assert again is not None
    retry, retried = again
    assert figures() == (0, 0, 5)
    for shard in pending(retry, retried):
        decide(retry, shard, None)
    assert figures() == (0, 5, 0)
