"""The plan, its shards and their commits, on folders: no Ray, no networks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ma_cluster.cluster.archive import (
    LARGEST_SHARD_IMAGES,
    PLAN_PART_IMAGES,
    Run,
    begin_run,
    commit,
    committed,
    read_run,
    read_shard,
    shards,
    undecided,
)
from ma_cluster.cluster.outcomes import SCHEMA, Outcome, artefact_name
from ma_cluster.cluster.summary import finish_run
from ma_cluster.errors import MaClusterError, Reason, RunConflictError, StoreError
from ma_cluster.images.store import Entry, LocalStore
from ma_cluster.report.status import missing_keys, read_status


def folders(tmp_path: Path, images: int) -> tuple[LocalStore, LocalStore]:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(images):
        (source / f"{number:03d}.jpg").write_bytes(b"x" * number)
    return LocalStore(source), LocalStore(tmp_path / "dest")


def refused(dest: LocalStore, run: Run, number: int) -> list[Outcome]:
    shard = list(shards(run.plan.images))[number]
    entries = read_shard(dest, shard)
    return [Outcome(key=e.key, etag=e.etag, reason=Reason.NOT_AN_IMAGE, attempts=1) for e in entries]


@given(st.integers(0, 100_000))
def test_shards_hold_every_row_of_every_part_once(images: int) -> None:
    cut = list(shards(images))
    rows = [shard.part * PLAN_PART_IMAGES + row for shard in cut for row in (shard.start, shard.stop)]
    assert rows[1:-1:2] == rows[2::2]
    assert (rows[0], rows[-1]) == (0, images) if images else not cut
    assert [shard.number for shard in cut] == list(range(len(cut)))
    assert all(0 < shard.images <= LARGEST_SHARD_IMAGES for shard in cut)


def test_a_small_archive_has_one_photograph_a_shard_a_large_one_256() -> None:
    assert [shard.images for shard in shards(10)] == [1] * 10
    assert {shard.images for shard in shards(4 * PLAN_PART_IMAGES)} == {256}


def test_the_plan_lists_each_object_with_its_size_and_version(tmp_path: Path) -> None:
    source, dest = folders(tmp_path, 3)
    run = begin_run(source, dest, "model", "config")
    plan = pq.read_table(tmp_path / "dest/plan/part-00000.parquet")
    assert plan.to_pylist() == [dataclasses.asdict(entry) for entry in source.list()]
    assert plan.schema.field("size").metadata == {b"unit": b"byte", b"description": b"of the object"}
    assert run.plan.images == 3


def test_a_destination_inside_the_source_is_not_planned(tmp_path: Path) -> None:
    source, _ = folders(tmp_path, 3)
    inside = LocalStore(tmp_path / "source/results")
    inside.create("old.txt", b"left from before")
    assert begin_run(source, inside, "model", "config").plan.images == 3


def test_a_run_is_begun_once_and_found_again_though_the_source_has_grown(tmp_path: Path) -> None:
    source, dest = folders(tmp_path, 3)
    run = begin_run(source, dest, "model", "config")
    source.create("later.jpg", b"new")
    assert begin_run(source, dest, "model", "config") == run == read_run(dest)


@pytest.mark.parametrize("other", ["source", "model", "config"])
def test_another_source_model_or_config_is_refused(tmp_path: Path, other: str) -> None:
    source, dest = folders(tmp_path, 3)
    begin_run(source, dest, "model", "config")
    if other == "source":
        source = LocalStore(tmp_path)
    with pytest.raises(RunConflictError, match=f"another {other};"):
        begin_run(source, dest, "other" if other == "model" else "model", "x" if other == "config" else "config")


def test_a_plan_half_written_is_completed_unless_the_listing_has_changed(tmp_path: Path) -> None:
    source, dest = folders(tmp_path, 3)
    run = begin_run(source, dest, "model", "config")
    (tmp_path / "dest/run.json").unlink()  # as if the driver had died just before
    assert begin_run(source, dest, "model", "config").id == run.id
    (tmp_path / "dest/run.json").unlink()
    source.create("later.jpg", b"new")
    with pytest.raises(RunConflictError, match="half-written plan"):
        begin_run(source, dest, "model", "config")


def test_a_shard_is_committed_once_and_the_first_commit_stays(tmp_path: Path) -> None:
    source, dest = folders(tmp_path, 3)
    run = begin_run(source, dest, "model", "config")
    shard = list(shards(3))[1]
    assert commit(dest, run, shard, refused(dest, run, 1))
    before = (tmp_path / "dest/outcomes/part-000001.parquet").read_bytes()
    assert not commit(dest, run, shard, refused(dest, run, 1))
    assert (tmp_path / "dest/outcomes/part-000001.parquet").read_bytes() == before
    assert committed(dest) == {1}
    assert [entry.key for entry in undecided(dest, run)] == ["000.jpg", "002.jpg"]


def test_status_and_missing_keys_come_from_the_store(tmp_path: Path) -> None:
    source, dest = folders(tmp_path, 3)
    run = begin_run(source, dest, "model", "config")
    for number in (0, 2):
        commit(dest, run, list(shards(3))[number], refused(dest, run, number))
    status = read_status(dest.url)
    assert (status.decided, status.remaining) == (2, 1)
    assert (status.statuses, status.reasons) == ({"refused": 2}, {"not_an_image": 2})
    assert status.images_per_second and status.eta_seconds
    assert list(missing_keys(dest.url)) == ["001.jpg"]


def test_a_run_with_missing_outcomes_has_no_summary(tmp_path: Path) -> None:
    source, dest = folders(tmp_path, 2)
    run = begin_run(source, dest, "model", "config")
    commit(dest, run, next(shards(2)), refused(dest, run, 0))
    with pytest.raises(MaClusterError, match="1 photographs"):
        finish_run(dest, run)
    assert not (tmp_path / "dest/summary.json").exists()


def test_an_empty_archive_is_finished_at_once(tmp_path: Path) -> None:
    source, dest = folders(tmp_path, 0)
    summary = finish_run(dest, begin_run(source, dest, "model", "config"))
    assert summary.images == 0
    assert json.loads((tmp_path / "dest/summary.json").read_text())["finished"] == summary.finished


def test_a_damaged_part_is_a_store_error(tmp_path: Path) -> None:
    source, dest = folders(tmp_path, 1)
    begin_run(source, dest, "model", "config")
    dest.put("outcomes/part-000000.parquet", b"PAR1 no more")
    with pytest.raises(StoreError, match="damaged"):
        read_status(dest.url)


def test_every_column_says_its_unit_and_meaning() -> None:
    assert all(field.metadata[b"description"] and b"unit" in field.metadata for field in SCHEMA)


@given(st.text(min_size=1, max_size=80))
def test_names_of_masks_are_short_and_harmless(key: str) -> None:
    name = artefact_name(Entry(key, 1, "etag"), "model", "config")
    assert len(name) <= 40 + 1 + 16
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def test_names_of_masks_differ_by_key_version_model_and_config() -> None:
    names = {
        artefact_name(Entry("a/eye.jpg", 1, "1"), "m", "c"),
        artefact_name(Entry("b/eye.jpg", 1, "1"), "m", "c"),
        artefact_name(Entry("a/eye.jpg", 1, "2"), "m", "c"),
        artefact_name(Entry("a/eye.jpg", 1, "1"), "n", "c"),
        artefact_name(Entry("a/eye.jpg", 1, "1"), "m", "d"),
    }
    assert len(names) == 5
    assert all(name.startswith("eye-") for name in names)
