"""Archive runs on real Ray and a real S3 server that lose processes: a worker, a node, everything, time and again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archive_runs import driver, family, masks, results, upload_eyes
from processes import Process, descendants, kill
from servers import Weed

from ma_cluster.archive.run import committed, read_run
from ma_cluster.cluster.fleet.driver import score_archive
from ma_cluster.cluster.fleet.replicas import Fleet
from ma_cluster.cluster.fleet.workers import Progress
from ma_cluster.storage.store import Store, open_store

FLEET = Fleet(segmenters=1)
EYES = 20
COPIES = 3
KILLS = 5
ROUNDS = int(os.environ.get("MA_CLUSTER_KILL_ROUNDS", "1"))


@dataclass(frozen=True, slots=True)
class Scored:
    """A bucket with photographs and an undisturbed run over them."""

    bucket: str
    source: str
    model: str
    results: dict[str, dict[str, Any]]
    masks: dict[str, bytes]

    def store(self, name: str) -> Store:
        return open_store(f"{self.bucket}/{name}")

    def check(self, dest: Store) -> None:
        """Every key once, with the same outcome and the same mask. Which attempt it was is the faults' own matter."""
        assert results(dest, "attempts") == self.results
        assert masks(dest) == self.masks


@pytest.fixture(scope="module")
def scored(weed: Weed, local_ray: None, tiny_bundle: Path) -> Scored:
    bucket = weed.bucket("processes")
    source, clean = open_store(f"{bucket}/eyes"), open_store(f"{bucket}/clean")
    upload_eyes(source, EYES)
    source.put("page.html", b"<html>")
    assert score_archive(source.url, clean.url, FLEET, model=str(tiny_bundle)).counts.images == EYES + 1
    return Scored(bucket, source.url, str(tiny_bundle), results(clean, "attempts"), masks(clean))


@pytest.mark.slow
def test_a_killed_worker_costs_nothing(scored: Scored) -> None:
    """By kill -9. What the worker had under way is done by another, and what it has committed stays."""
    killed: list[Process] = []

    def kill_one(progress: Progress) -> None:
        if not killed:
            killed.extend(islice(workers(), 1))
            kill(killed)

    dest = scored.store("worker")
    score_archive(scored.source, dest.url, FLEET, model=scored.model, on_progress=kill_one)
    assert len(killed) == 1
    scored.check(dest)


@pytest.mark.long
def test_a_lost_node_costs_nothing(scored: Scored, tmp_path: Path) -> None:
    """By kill -9 of the second raylet, with replicas, workers and pixels on its node."""
    dest, log = scored.store("node"), tmp_path / "log.txt"
    script = Path(__file__).with_name("score_losing_a_node.py")
    command = [sys.executable, str(script), scored.source, dest.url, scored.model]
    with log.open("wb") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, timeout=300)
    assert done.returncode == 0, log.read_text()
    (printed,) = (line for line in done.stdout.splitlines() if line.startswith(b"["))  # Ray writes to it, too
    replicas = json.loads(printed)
    assert replicas != [], "the lost node had some"
    scored.check(dest)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_run_that_is_killed_with_all_its_processes_at_random_moments_ends_as_a_clean_one(
    scored: Scored, tmp_path: Path, seed: int
) -> None:
    """Killed five times, each further on than the last; MA_CLUSTER_KILL_ROUNDS=4 for twenty.

    A moment is a number of shards and a fraction of a second, so that it does not depend on the machine's speed; the
    first of a round lies before the first shard: in planning, or while Ray and the fleet start.
    """
    rng, dest = np.random.default_rng(seed), scored.store(f"killed-{seed}")
    for number in range(KILLS):
        before = parts(dest)
        further = 0 if number == 0 else int(rng.integers(1, 2 * EYES // KILLS))
        with driver_of(scored, dest, tmp_path / "log.txt") as process:
            wait_for_parts(dest, min(len(before) + further, EYES + 1), process)
            time.sleep(rng.uniform(0, 8.0 if number == 0 else 0.5))
            kill(family(process))
        assert {name: etag for name, etag in parts(dest).items() if name in before} == before
    score_archive(scored.source, dest.url, FLEET, model=scored.model)
    scored.check(dest)


@pytest.mark.long
def test_two_drivers_of_one_run_share_it(scored: Scored, tmp_path: Path) -> None:
    """Each on a Ray of its own, over copies enough for both to be at work at once. Neither fails, each key has one
    outcome, that of its original.
    """
    source, dest = scored.store("copies"), scored.store("shared")
    original = open_store(scored.source)
    for key in scored.masks:
        data = original.get(key)
        for copy in range(COPIES):
            source.put(f"{copy}/{key}", data)
    arguments = [source.url, dest.url, "--model", scored.model, "--replicas", "1"]
    with driver(arguments, tmp_path / "log.txt") as other:
        while read_run(dest) is None:  # it has planned; its Ray and its fleet are yet to start
            assert other.poll() is None, (tmp_path / "log.txt").read_text()
            time.sleep(0.05)
        summary = score_archive(source.url, dest.url, FLEET, model=scored.model)
        assert other.wait(timeout=120) == 0, (tmp_path / "log.txt").read_text()
    assert summary.counts.statuses == {"scored": COPIES * EYES}
    found = masks(dest)
    assert found == {f"{copy}/{key}": mask for key, mask in scored.masks.items() for copy in range(COPIES)}


@pytest.mark.long
def test_a_driver_that_was_stopped_goes_on_and_finds_what_another_has_done_meanwhile(
    scored: Scored, tmp_path: Path
) -> None:
    """By SIGSTOP, for as long as the other takes for the whole run; its workers and its fleet are not stopped."""
    dest, log = scored.store("stopped"), tmp_path / "log.txt"
    with driver_of(scored, dest, log) as stopped:
        wait_for_parts(dest, 2, stopped)
        stopped.send_signal(signal.SIGSTOP)
        by_it = parts(dest)
        summary = score_archive(scored.source, dest.url, FLEET, model=scored.model)
        assert len(by_it) < EYES
        finished = parts(dest)
        stopped.send_signal(signal.SIGCONT)
        assert stopped.wait(timeout=120) == 3, log.read_text()
    assert summary.counts.images == EYES + 1
    assert parts(dest) == finished
    assert by_it.items() <= finished.items()
    scored.check(dest)


def workers() -> Iterator[Process]:
    """Of the run, on this test run's own Ray."""
    return (each for each in descendants(os.getpid()) if each.title.startswith("ray::_Worker"))


def parts(dest: Store) -> dict[str, str]:
    """Committed parts and their versions."""
    return {entry.key: entry.etag for entry in dest.list("outcomes/")}


@contextmanager
def driver_of(scored: Scored, dest: Store, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    arguments = [scored.source, dest.url, "--model", scored.model, "--replicas", "1"]
    with driver(arguments, log) as process:
        yield process


def wait_for_parts(dest: Store, count: int, process: subprocess.Popen[bytes]) -> None:
    """Until so many shards are committed, or the driver has ended."""
    deadline = time.monotonic() + 240
    while len(committed(dest)) < count and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
