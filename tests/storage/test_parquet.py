"""Parquet in memory: it comes back whole or not at all, and leaves no thread behind that would abort the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from ma_cluster.archive.outcomes import Outcome
from ma_cluster.archive.plan import read_shard
from ma_cluster.archive.run import begin_run, commit, pending
from ma_cluster.archive.summary import finish_run
from ma_cluster.storage.local import LocalStore
from ma_cluster.storage.parquet import DAMAGED, from_parquet, to_parquet

TABLE = pa.table({"key": [f"{number}.jpg" for number in range(1000)], "size": list(range(1000))})
THREADS = """
import os, sys, time
from ma_cluster.archive import retry, summary
from ma_cluster.storage.manifest import open_source

def threads():
    return len(os.listdir("/proc/self/task"))

dest, manifest = sys.argv[1:]
before = threads()
assert summary.read_status(dest).counts.images == 3
assert len(list(summary.missing_keys(dest))) == 0
assert len(list(open_source(manifest).list())) == 3
until = time.monotonic() + 5  # those of our own executors have been joined, and take a moment to go
while threads() > before and time.monotonic() < until:
    time.sleep(0.01)
print(threads() - before)
"""


@pytest.fixture
def run(tmp_path: Path) -> LocalStore:
    """A finished run of three photographs."""
    source, dest = LocalStore(tmp_path / "source"), LocalStore(tmp_path / "dest")
    for number in range(3):
        source.put(f"{number}.jpg", b"1")
    begun = begin_run(source, dest, "model", "config")
    for shard in list(pending(dest, begun)):
        entries = read_shard(dest, shard)
        commit(dest, begun, shard, [Outcome(key=e.key, etag=e.etag, reason=None, attempts=1) for e in entries])
    finish_run(dest, begun)
    source.put("list.parquet", to_parquet(pa.table({"key": ["0.jpg", "1.jpg", "2.jpg"]})))
    return dest


def test_reading_a_run_starts_no_thread_that_could_outlive_the_interpreter(run: LocalStore, tmp_path: Path) -> None:
    """One of Arrow's pool that lets go of the file's bytes while Python ends aborts it: seen in 1 of 60 processes."""
    command = [sys.executable, "-c", THREADS, run.url, f"{tmp_path}/source/list.parquet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"]


@pytest.mark.long
def test_hundreds_of_processes_that_read_a_run_end_with_their_own_status(run: LocalStore) -> None:
    command = [sys.executable, "-m", "ma_cluster", "status", run.url]
    assert [subprocess.run(command, capture_output=True).returncode for _ in range(300)] == [0] * 300


def test_columns_are_read_alone_and_those_that_are_not_there_are_left_out() -> None:
    data = to_parquet(TABLE)
    assert from_parquet(data) == TABLE
    assert from_parquet(data, ["size", "colour"]).column_names == ["size"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_damaged(share: float) -> None:
    data = to_parquet(TABLE)
    with pytest.raises(DAMAGED):
        from_parquet(data[: int(share * len(data))])


def test_a_flipped_bit_of_the_values_is_damage_and_not_another_value() -> None:
    data = to_parquet(TABLE)
    for place in range(40, len(data) // 2, 97):
        flipped = bytearray(data)
        flipped[place] ^= 4
        with pytest.raises(DAMAGED):
            from_parquet(bytes(flipped))
