"""What a service says of its archives, in lists and in metrics, and that one of them which is broken hides no other."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from archive_jobs import begun, decide, finish, jobs_of, photographs
from dicom_files import dicom_file
from known_service import served
from PIL import Image

from ma_cluster.archive.outcomes import Outcome
from ma_cluster.archive.retry import begin_retry
from ma_cluster.archive.run import outcomes_key, pending, read_run
from ma_cluster.archive.shard_scorer import Reading, Segmentation
from ma_cluster.archive.summary import finish_run, read_status
from ma_cluster.bundle import load_bundle
from ma_cluster.config import KnownField, OperatingPoint
from ma_cluster.errors import Reason
from ma_cluster.http.fleet_service import ArchiveMetrics, Backing, FleetService, Looks
from ma_cluster.http.guard import HttpLimits
from ma_cluster.http.jobs import ArchiveJob, ArchiveJobs, JobState
from ma_cluster.images.datasets import decode_mask
from ma_cluster.images.reading import read_bytes
from ma_cluster.images.sample import retina
from ma_cluster.lesions.detector import Detector
from ma_cluster.lesions.findings import encode_mask
from ma_cluster.storage.local import LocalStore


class Nothing:
    """A fleet and a recorder of which nothing is asked."""

    def read_upload(self, data: bytes, field: KnownField) -> Reading:
        raise AssertionError

    def segment(self, reading: Reading, operating_point: OperatingPoint) -> Segmentation:
        raise AssertionError

    def up(self) -> bool:
        raise AssertionError

    def begun(self) -> None:
        raise AssertionError

    def decided(self, outcome: Outcome) -> None:
        raise AssertionError


@pytest.fixture
def jobs(tmp_path: Path) -> ArchiveJobs:
    return jobs_of(tmp_path)


@pytest.fixture
def source(tmp_path: Path) -> LocalStore:
    return photographs(tmp_path)


@pytest.fixture
def service(jobs: ArchiveJobs, tiny_bundle: Path) -> FleetService:
    return FleetService(Backing(Nothing(), jobs, lambda: set(), Nothing()), load_bundle(tiny_bundle))


class Here(Nothing):
    """A fleet in this process, and a recorder that keeps nothing."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector

    def read_upload(self, data: bytes, field: KnownField) -> Reading:
        prepared, facts = read_bytes(data, field.told(self._detector.recipe.image))
        return Reading(facts, prepared)

    def segment(self, reading: Reading, operating_point: OperatingPoint) -> Segmentation:
        found = self._detector.segment(reading.prepared, operating_point)
        return Segmentation(found.findings, encode_mask(found.mask), b"an overlay", found.seconds)

    def begun(self) -> None: ...

    def decided(self, outcome: Outcome) -> None: ...


def test_a_dicom_body_is_answered_with_what_its_header_tells_but_who_it_is(
    jobs: ArchiveJobs, tiny_bundle: Path
) -> None:
    bundle, photograph = load_bundle(tiny_bundle), np.asarray(Image.fromarray(retina()).resize((301, 300)))
    fleet = Here(Detector(bundle))
    data = dicom_file(photograph, "rle", 7)
    with served(HttpLimits(), FleetService(Backing(fleet, jobs, lambda: set(), fleet), bundle)) as server:
        status, values, _ = server.ask("POST", "/v1/segment?operating_point=sensitive", data)
        mask = server.ask("POST", "/v1/segment", data, Accept="image/png")[1]
        known = server.ask("POST", "/v1/segment?field_degrees=30", data)[1]
    assert (status, values["status"], values["height"], values["width"]) == (200, "scored", 300, 301)
    assert (values["eye"], values["eye_source"], values["visit"]) == ("R", "dicom", "2026-01-02")
    assert (values["operating_point"], values["fov"]["degrees"]) == ("sensitive", 45.0)
    assert values["patient"] is None and "patient-7" not in json.dumps(values)
    assert decode_mask(mask).shape == (300, 301)
    assert known["fov"]["degrees"] == 30.0, "what is said goes before what the header tells"


BROKEN: dict[str, Callable[[ArchiveJob], bytes]] = {
    "archives/0123456789abcdef.json": lambda job: b'{"id": "0123456789abcdef", "colour": "red"}',
    "archives/1123456789abcdef.json": lambda job: b"[" * 100_000,
    "archives/2123456789abcdef.json": lambda job: b"\xff",
    "archives/3123456789abcdef.json": lambda job: json.dumps(
        {"id": job.id, "source": "a", "destination": "b"}
    ).encode(),
    "archives/4123456789abcdef.json": lambda job: b"",
    "archives/notes.txt": lambda job: b"call the clinic",
    "archives/old/5123456789abcdef.json": lambda job: b"{}",
}


@pytest.mark.parametrize("key", BROKEN)
def test_an_entry_that_is_no_job_carries_its_fault_and_hides_no_other(
    service: FleetService, jobs: ArchiveJobs, tmp_path: Path, key: str
) -> None:
    job = jobs.request(str(tmp_path / "a"), str(tmp_path / "b"))
    LocalStore(tmp_path / "state").put(key, BROKEN[key](job))
    first, broken = service.archives()
    assert (first["id"], first["state"]) == (job.id, "queued")
    assert broken.keys() == {"id", "state", "error"}
    assert "--state" in broken["error"]
    assert jobs.request(str(tmp_path / "a"), str(tmp_path / "c")).state(running=False) is JobState.QUEUED


def test_a_destination_that_was_damaged_emptied_or_taken_is_its_own_jobs_fault(
    service: FleetService, jobs: ArchiveJobs, source: LocalStore, tmp_path: Path
) -> None:
    faults = {
        "whole": None,
        "damaged": "run.json",
        "deep": "run.json",
        "emptied": "not hold",
        "taken": "another source",
    }
    for name in faults:
        job = jobs.request(source.url, str(tmp_path / name))
        finish(begun(source, tmp_path / name))
        jobs.finish(job.id)
    (tmp_path / "damaged" / "run.json").write_bytes(b"{")
    (tmp_path / "deep" / "run.json").write_bytes(b"[" * 100_000)
    (tmp_path / "emptied" / "run.json").unlink()
    text = (tmp_path / "taken" / "run.json").read_text()
    (tmp_path / "taken" / "run.json").write_text(text.replace(source.url, "another"))
    known = {Path(entry["destination"]).name: entry for entry in service.archives()}
    for name, fault in faults.items():
        error = known[name]["error"]
        assert (error is None) if fault is None else (fault in error), name
        alone = service.archive(known[name]["id"])
        assert (alone["status"] is not None) == (fault is None), name


def test_one_destination_that_never_answers_costs_the_others_nothing() -> None:
    stuck = threading.Event()

    def look(url: str) -> str:
        if url.startswith("s3://dead/"):
            stuck.wait(20)
        if url == "odd":
            raise ZeroDivisionError
        return url

    looks = Looks(look, within_s=0.5)
    urls = ["a", "odd", "s3://alive/x", *(f"s3://dead/{number}" for number in range(50))]
    for _ in range(3):
        began = time.monotonic()
        found = looks(urls)
        assert time.monotonic() - began < 2
        assert (found["a"], found["s3://alive/x"]) == ("a", "s3://alive/x")
        assert "did not answer within 0.5 s" in str(found["s3://dead/7"])
        assert "cannot be read" in str(found["odd"])
    assert threading.active_count() < 40
    stuck.set()


def test_a_look_that_ends_after_the_limit_is_told_at_the_next_call() -> None:
    going_on, looked = threading.Semaphore(0), threading.Semaphore(0)
    count = 0

    def look(url: str) -> int:
        nonlocal count
        count += 1
        number = count
        going_on.acquire(timeout=20)
        looked.release()
        return number

    looks = Looks(look, within_s=0.2)
    for number in (1, 2):
        assert "did not answer" in str(looks(["slow"])["slow"])
        going_on.release()
        looked.acquire(timeout=20)
        time.sleep(0.1)  # until its thread has noted the answer
        assert looks(["slow"]) == {"slow": number}


def test_a_destination_that_is_always_slow_is_told_of_at_every_call_but_the_first() -> None:
    going_on, looked, count = threading.Semaphore(0), threading.Semaphore(0), itertools.count(1)

    def look(url: str) -> int:
        going_on.acquire(timeout=20)
        looked.release()
        return next(count)

    looks, told = Looks(look, within_s=0.2), []
    for _ in range(5):
        told.append(looks(["slow"])["slow"])
        going_on.release()
        looked.acquire(timeout=20)
        time.sleep(0.1)  # until its thread has noted the answer
    assert "did not answer" in str(told[0]) and told[1:] == [1, 2, 3, 4]


def test_a_job_is_told_of_as_its_run_stands_and_no_part_of_it_is_read_twice(
    service: FleetService, jobs: ArchiveJobs, source: LocalStore, tmp_path: Path
) -> None:
    dest = begun(source, tmp_path / "dest")
    job, run = jobs.request(source.url, dest.url), read_run(dest)
    assert run is not None
    first, second, *others = pending(dest, run)
    for shard in (first, second):
        assert service.archive(job.id)["status"] == read_status(dest.url).to_json()
        decide(dest, shard, None)
    status = service.archive(job.id)["status"]
    assert status == read_status(dest.url).to_json() and status["images_per_second"] is not None
    whole = dest.get(outcomes_key(first.number))
    dest.put(outcomes_key(first.number), b"")
    assert service.archive(job.id)["status"] == status
    assert b'status="scored"} ' + str(float(first.images + second.images)).encode() in service.metrics()
    dest.put(outcomes_key(first.number), whole)
    for shard in others:
        decide(dest, shard, Reason.STORE_ERROR)
    finish_run(dest, run)
    assert begin_retry(source, dest, run) is not None
    assert service.archive(job.id)["status"] == read_status(dest.url).to_json()


def test_parts_that_were_put_aside_and_scored_again_count_once(source: LocalStore, tmp_path: Path) -> None:
    dest = begun(source, tmp_path / "dest")
    run = read_run(dest)
    assert run is not None
    metrics, (shard, *_) = ArchiveMetrics(list), pending(dest, run)
    for reason in (Reason.STORE_ERROR, None):
        decide(dest, shard, reason)
        status = metrics.status(dest.url)
        assert status is not None and status.counts.statuses == {"failed" if reason else "scored": 1}
        dest.move(outcomes_key(shard.number), f"damaged/{reason}")
        assert metrics.status(dest.url) == read_status(dest.url)


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
