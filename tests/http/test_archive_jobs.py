"""Archive jobs as the service's store keeps them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from archive_jobs import CONFIG, MODEL, begun, config_of, finish, jobs_of, photographs

from ma_cluster.archive.run import begin_run
from ma_cluster.config import KnownField, ScoreOptions
from ma_cluster.errors import ObjectMissingError, RunConflictError, StoreError, UsageError
from ma_cluster.http.jobs import ArchiveJobs, JobState
from ma_cluster.storage.local import LocalStore


@pytest.fixture
def jobs(tmp_path: Path) -> ArchiveJobs:
    return jobs_of(tmp_path)


@pytest.fixture
def source(tmp_path: Path) -> LocalStore:
    return photographs(tmp_path)


def test_a_job_is_known_to_whoever_serves_next(jobs: ArchiveJobs, tmp_path: Path) -> None:
    asked = jobs.request(str(tmp_path / "a"), str(tmp_path / "b"))
    later = ArchiveJobs(str(tmp_path / "state"), MODEL, config_of)
    assert later.list().jobs == [asked]
    assert later.get(asked.id) == asked


def test_to_ask_twice_is_to_ask_once(jobs: ArchiveJobs, tmp_path: Path) -> None:
    first = jobs.request(str(tmp_path / "a"), str(tmp_path / "b"))
    assert jobs.request(str(tmp_path / "a") + "/", str(tmp_path / "b")) == first
    assert jobs.request(str(tmp_path / "a"), str(tmp_path / "c")).id != first.id
    assert len(jobs.list().jobs) == 2


def test_a_job_that_was_cancelled_or_failed_is_wanted_again_when_it_is_asked_for(
    jobs: ArchiveJobs, tmp_path: Path
) -> None:
    urls = str(tmp_path / "a"), str(tmp_path / "b")
    job = jobs.request(*urls)
    for ended in (jobs.cancel(job.id), jobs.fail(job.id, "the fleet is broken")):
        assert not ended.wanted
        assert jobs.request(*urls) == job


def test_the_state_follows_from_what_was_asked_and_how_its_driver_ended(
    jobs: ArchiveJobs, source: LocalStore, tmp_path: Path
) -> None:
    job = jobs.request(source.url, str(tmp_path / "dest"))
    assert job.state(running=False) is JobState.QUEUED
    assert job.state(running=True) is JobState.RUNNING
    assert jobs.cancel(job.id).state(running=False) is JobState.CANCELLED
    jobs.request(job.source, job.destination)
    assert jobs.fail(job.id, "a fault").state(running=False) is JobState.FAILED
    dest = begun(source, tmp_path / "dest")
    assert jobs.request(job.source, job.destination).state(running=False) is JobState.QUEUED
    finish(dest)
    assert jobs.finish(job.id).state(running=False) is JobState.FINISHED
    assert jobs.cancel(job.id).state(running=False) is JobState.FINISHED


def test_a_driver_that_ended_well_without_its_own_finished_run_has_failed(
    jobs: ArchiveJobs, source: LocalStore, tmp_path: Path
) -> None:
    job = jobs.request(source.url, str(tmp_path / "dest"))
    assert "no finished run" in str(jobs.finish(job.id).error)
    dest = begun(source, tmp_path / "dest")
    assert "no finished run" in str(jobs.finish(job.id).error)
    (tmp_path / "dest" / "run.json").unlink()
    begin_run(source, dest, "n" * 64, CONFIG)
    finish(dest)
    assert "another model" in str(jobs.finish(job.id).error)


def test_two_jobs_cannot_have_one_destination(jobs: ArchiveJobs, source: LocalStore, tmp_path: Path) -> None:
    dest, other = str(tmp_path / "dest"), str(tmp_path / "other")
    first = jobs.request(source.url, dest)
    for elsewhere in (dest, dest + "/", "file://" + dest):
        with pytest.raises(RunConflictError, match=first.id):
            jobs.request(other, elsewhere)
    jobs.cancel(first.id)
    second = jobs.request(other, dest)
    with pytest.raises(RunConflictError, match=second.id):
        jobs.request(source.url, dest)


def test_of_many_that_ask_for_one_destination_one_gets_it(jobs: ArchiveJobs, tmp_path: Path) -> None:
    refused = []

    def ask(number: int) -> None:
        try:
            jobs.request(str(tmp_path / f"source {number}"), str(tmp_path / "dest"))
        except RunConflictError:
            refused.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(refused), len(jobs.list().jobs)) == (7, 1)


def test_another_model_is_another_job_and_cannot_have_the_firsts_destination(
    jobs: ArchiveJobs, source: LocalStore, tmp_path: Path
) -> None:
    job = jobs.request(source.url, str(tmp_path / "dest"))
    finish(begun(source, tmp_path / "dest"))
    assert jobs.finish(job.id).finished is not None
    for model, config in (("n" * 64, CONFIG), (MODEL, "d" * 64)):
        later = ArchiveJobs(str(tmp_path / "state"), model, lambda options, config=config: config)
        with pytest.raises(RunConflictError, match="holds run"):
            later.request(source.url, str(tmp_path / "dest"))
        assert not later.possible(job)
        assert later.request(source.url, str(tmp_path / "elsewhere")).id != job.id
    assert jobs.request(source.url, str(tmp_path / "dest")).finished is not None


def test_a_job_is_its_options_own(jobs: ArchiveJobs, tmp_path: Path) -> None:
    urls = str(tmp_path / "a"), str(tmp_path / "b")
    asked = ScoreOptions("sensitive", KnownField(45.0, no_surround=True))
    job = jobs.request(*urls, asked)
    assert (job.options, jobs.possible(job)) == (asked, True)
    assert jobs.request(*urls, asked) == job == jobs.list().jobs[0]
    for others in (ScoreOptions(), ScoreOptions("sensitive"), ScoreOptions("sensitive", KnownField(45.0))):
        with pytest.raises(RunConflictError, match=job.id):
            jobs.request(*urls, others)


def test_a_job_whose_destination_was_emptied_is_queued_when_it_is_asked_for_again(
    jobs: ArchiveJobs, source: LocalStore, tmp_path: Path
) -> None:
    job = jobs.request(source.url, str(tmp_path / "dest"))
    finish(begun(source, tmp_path / "dest"))
    jobs.finish(job.id)
    assert not jobs.request(source.url, str(tmp_path / "dest")).wanted
    (tmp_path / "dest" / "run.json").unlink()
    assert jobs.request(source.url, str(tmp_path / "dest")).state(running=False) is JobState.QUEUED


def test_a_job_that_cannot_be_is_refused_when_it_is_asked_for(
    jobs: ArchiveJobs, source: LocalStore, tmp_path: Path
) -> None:
    begun(source, tmp_path / "dest")
    with pytest.raises(RunConflictError, match="another source"):
        jobs.request(str(tmp_path / "other"), str(tmp_path / "dest"))
    with pytest.raises(UsageError, match="not a store"):
        jobs.request("ftp://archive", str(tmp_path / "dest"))
    assert jobs.list().jobs == []


@pytest.mark.parametrize("job_id", ["nobody", "../service", "a/b", ""])
def test_an_id_of_no_job_is_missing(jobs: ArchiveJobs, job_id: str) -> None:
    with pytest.raises(ObjectMissingError, match="no such job"):
        jobs.get(job_id)


def test_what_a_service_keeps_is_for_its_user_alone(jobs: ArchiveJobs, tmp_path: Path) -> None:
    job = jobs.request(str(tmp_path / "a"), str(tmp_path / "b"))
    jobs.keep_log(job.id, "a line")
    assert jobs.log(job.id) == "a line"
    state = tmp_path / "state"
    assert {path.stat().st_mode & 0o077 for path in (state, *state.rglob("*"))} == {0}


def test_a_store_that_cannot_be_written_says_so_at_once(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where the folder should be")
    with pytest.raises(StoreError, match="cannot be written"):
        ArchiveJobs(str(tmp_path / "state"), MODEL, config_of)


@pytest.mark.parametrize("inside", ["state", "state/archives", "state/logs/2026", "elsewhere/../state"])
def test_where_the_service_keeps_its_jobs_is_neither_source_nor_destination(
    jobs: ArchiveJobs, tmp_path: Path, inside: str
) -> None:
    for urls in ((tmp_path / inside, tmp_path / "b"), (tmp_path / "a", tmp_path / inside)):
        with pytest.raises(UsageError, match="keeps its jobs"):
            jobs.request(*map(str, urls))
    assert jobs.list().jobs == []
    jobs.request(str(tmp_path / "a"), str(tmp_path / "state" / "results"))


def test_a_destination_that_no_file_system_can_have_is_one_jobs_error(
    jobs: ArchiveJobs, source: LocalStore, tmp_path: Path
) -> None:
    """Also one within its source, which is no error."""
    long = jobs.request(source.url, str(tmp_path / ("x" * 300)))
    within = jobs.request(source.url, f"{source.url}/results")
    begin_run(source, LocalStore(tmp_path / "source" / "results"), MODEL, CONFIG)
    finish(LocalStore(tmp_path / "source" / "results"))
    assert jobs.finish(within.id).state(running=False) is JobState.FINISHED
    assert jobs.finish(long.id).state(running=False) is JobState.FAILED


def test_a_state_without_conditional_writes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There each request for a job would begin it anew."""

    class Overwriting(LocalStore):
        def create(self, key: str, data: bytes) -> bool:
            self.put(key, data)
            return True

    monkeypatch.setattr("ma_cluster.http.jobs.open_store", lambda url, private: Overwriting(Path(url)))
    for _ in range(2):
        with pytest.raises(StoreError, match="overwrites where it should only create"):
            jobs_of(tmp_path)
