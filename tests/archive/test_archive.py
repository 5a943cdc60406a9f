"""The plan, its shards and their commits, on folders: no Ray, no networks."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ma_cluster import __version__
from ma_cluster.archive.outcomes import SCHEMA, Outcome, artefact_name
from ma_cluster.archive.plan import (
    LARGEST_SHARD_BYTES,
    LARGEST_SHARD_IMAGES,
    PLAN_PART_IMAGES,
    SHARDS_WANTED,
    Plan,
    cut,
    largest_shard,
    read_shard,
    read_shards,
    shards,
    write_plan,
)
from ma_cluster.archive.retry import begin_retry, latest_outcomes
from ma_cluster.archive.run import (
    Run,
    begin_run,
    commit,
    committed,
    read_outcomes,
    read_run,
    undecided,
)
from ma_cluster.archive.summary import finish_run, missing_keys, read_status
from ma_cluster.errors import MaClusterError, PartDamagedError, Reason, RunConflictError, Triage
from ma_cluster.lesions.findings import Findings
from ma_cluster.storage.local import LocalStore
from ma_cluster.storage.manifest import Photographs
from ma_cluster.storage.store import Entry


def folders(tmp_path: Path, images: int) -> tuple[LocalStore, LocalStore]:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(images):
        (source / f"{number:03d}.jpg").write_bytes(b"x" * number)
    return LocalStore(source), LocalStore(tmp_path / "dest")


def refused(dest: LocalStore, run: Run, number: int) -> list[Outcome]:
    entries = read_shard(dest, list(shards(dest, run.plan))[number])
    return [Outcome(key=e.key, etag=e.etag, reason=Reason.NOT_AN_IMAGE, attempts=1) for e in entries]


@given(st.lists(st.integers(0, LARGEST_SHARD_BYTES), max_size=50), st.integers(1, 10))
def test_shards_hold_every_row_once_and_no_more_than_their_limits(sizes: list[int], largest: int) -> None:
    slices = list(cut(sizes, largest))
    assert [row for start, stop in slices for row in range(start, stop)] == list(range(len(sizes)))
    for start, stop in slices:
        assert 1 <= stop - start <= largest
        assert sum(sizes[start:stop]) <= LARGEST_SHARD_BYTES


def test_a_photograph_larger_than_a_shard_has_one_of_its_own() -> None:
    assert list(cut([1, 2 * LARGEST_SHARD_BYTES, 1, 1], 256)) == [(0, 1), (1, 2), (2, 4)]


@pytest.mark.parametrize(("images", "expected"), [(10, {1}), (5120, {5}), (PLAN_PART_IMAGES + 256, {16})])
def test_small_archives_have_small_shards_numbered_in_the_plans_order(
    tmp_path: Path, images: int, expected: set[int]
) -> None:
    dest = LocalStore(tmp_path)
    entries = [Entry(f"{number:05d}", 1, "v") for number in range(images)]
    found = list(shards(dest, write_plan(iter(entries), dest)))
    assert [shard.number for shard in found] == list(range(len(found)))
    assert {shard.images for shard in found} == expected
    assert list(read_shards(dest, found)) == entries
    assert [shard.row for shard in found] == [sum(s.images for s in found[:number]) for number in range(len(found))]


def test_a_run_of_an_earlier_version_goes_on_with_its_own_shards(tmp_path: Path) -> None:
    entries = [Entry(f"{number:05d}", 1, "v") for number in range(640)]
    dest = LocalStore(tmp_path)
    plan = write_plan(iter(entries), dest)
    assert {shard.images for shard in shards(dest, plan)} == {1}
    assert {shard.images for shard in shards(dest, Plan(plan.images, plan.digest))} == {10}
    assert largest_shard(Plan(10**6, "", shards_wanted=SHARDS_WANTED)) == LARGEST_SHARD_IMAGES


def test_a_long_listing_says_how_far_it_is(tmp_path: Path, log_lines: list[str]) -> None:
    entries = (Entry(f"{number:06d}", 1, "v") for number in range(9 * PLAN_PART_IMAGES))
    write_plan(entries, LocalStore(tmp_path))
    assert log_lines == [f"{8 * PLAN_PART_IMAGES} photographs listed"]


def test_planning_holds_one_part_of_the_listing(tmp_path: Path) -> None:
    """The first part is written before the listing is asked for the second's entries."""
    dest, seen = LocalStore(tmp_path), []

    def listing() -> Iterator[Entry]:
        for number in range(PLAN_PART_IMAGES + 2):
            if number > PLAN_PART_IMAGES:
                seen.append((tmp_path / "plan/part-00000.parquet").exists())
            yield Entry(f"{number:05d}", 1, "v")

    assert write_plan(listing(), dest).images == PLAN_PART_IMAGES + 2
    assert seen == [True]


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
        source = LocalStore(tmp_path / "elsewhere")
    with pytest.raises(RunConflictError, match=f"another {other};"):
        begin_run(source, dest, "other" if other == "model" else "model", "x" if other == "config" else "config")


@pytest.mark.parametrize("results", ["2", None])
def test_another_version_of_the_code_is_refused_and_both_are_named(tmp_path: Path, results: str | None) -> None:
    source, dest = folders(tmp_path, 3)
    begin_run(source, dest, "model", "config")
    values = json.loads(dest.get("run.json"))
    values["versions"] |= {"ma_cluster": "0.0.1", "results": results}
    dest.put("run.json", json.dumps(values).encode())
    with pytest.raises(
        RunConflictError, match=rf"begun by ma_cluster 0\.0\.1, whose results.*{re.escape(__version__)}"
    ):
        begin_run(source, dest, "model", "config")


def test_another_version_of_the_code_with_the_same_results_goes_on(tmp_path: Path) -> None:
    source, dest = folders(tmp_path, 3)
    begin_run(source, dest, "model", "config")
    values = json.loads(dest.get("run.json"))
    values["versions"]["ma_cluster"] = "0.0.1"
    dest.put("run.json", json.dumps(values).encode())
    assert begin_run(source, dest, "model", "config").versions["ma_cluster"] == "0.0.1"


def test_a_plan_half_written_is_completed_unless_the_listing_has_changed(tmp_path: Path) -> None:
    source, dest = folders(tmp_path, 3)
    run = begin_run(source, dest, "model", "config")
    (tmp_path / "dest/run.json").unlink()  # as if the driver had died just before
    assert begin_run(source, dest, "model", "config").id == run.id
    (tmp_path / "dest/run.json").unlink()
    source.create("later.jpg", b"new")
    with pytest.raises(RunConflictError, match=f"{dest.url}/plan is half of a plan"):
        begin_run(source, dest, "model", "config")


def test_a_shard_is_committed_once_and_the_first_commit_stays(tmp_path: Path) -> None:
    source, dest = folders(tmp_path, 3)
    run = begin_run(source, dest, "model", "config")
    shard = list(shards(dest, run.plan))[1]
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
        commit(dest, run, list(shards(dest, run.plan))[number], refused(dest, run, number))
    status = read_status(dest.url)
    assert (status.counts.images, status.remaining) == (2, 1)
    assert (status.counts.statuses, status.counts.reasons) == ({"refused": 2}, {"not_an_image": 2})
    assert status.images_per_second and status.eta_seconds
    assert list(missing_keys(dest.url)) == ["001.jpg"]


def test_a_run_with_missing_outcomes_has_no_summary(tmp_path: Path) -> None:
    source, dest = folders(tmp_path, 2)
    run = begin_run(source, dest, "model", "config")
    commit(dest, run, next(shards(dest, run.plan)), refused(dest, run, 0))
    with pytest.raises(MaClusterError, match="1 photographs"):
        finish_run(dest, run)
    assert not (tmp_path / "dest/summary.json").exists()


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


def decide(dest: LocalStore, run: Run, reasons: dict[str, Reason]) -> None:
    """Commit all that is pending: each photograph with the reason named for it, else as scored."""
    for shard in shards(dest, run.plan):
        entries = read_shard(dest, shard)
        outcomes = [
            Outcome(
                key=e.key,
                etag=e.etag,
                reason=reasons.get(e.key),
                attempts=1,
                findings=Findings((), None, Triage.NONE),
                mask_key="m",
            )
            for e in entries
        ]
        commit(dest, run, shard, outcomes)
    finish_run(dest, run)


def run_of(dest: LocalStore) -> Run:
    run = read_run(dest)
    assert run is not None
    return run


def statuses(dest: LocalStore) -> dict[str, str]:
    rows = [row for table in latest_outcomes(dest, run_of(dest), ["status"]) for row in table.to_pylist()]
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: row["status"] for row in rows}


def test_a_retry_is_a_run_of_what_failed_and_its_rows_supersede(tmp_path: Path) -> None:
    source, dest = folders(tmp_path, 4)
    run = begin_run(source, dest, "model", "config")
    failed = {"000.jpg": Reason.TIMEOUT, "002.jpg": Reason.CRASHED_WORKER}
    decide(dest, run, failed | {"001.jpg": Reason.TRUNCATED})
    before = {path: path.read_bytes() for path in (tmp_path / "dest").rglob("*.*")}

    retry = begin_retry(source, dest, run)
    assert retry is not None
    parts, again = retry
    assert parts.url == f"{dest.url}/retries/0001"
    assert [entry.key for entry in undecided(parts, again)] == list(failed)
    assert again.id != run.id
    resumed = begin_retry(source, dest, run)
    assert resumed is not None and resumed[1] == again, "a retry that was cut short is resumed"
    assert statuses(dest)["000.jpg"] == "failed", "until the retry decides otherwise"
    decide(LocalStore(tmp_path / "dest/retries/0001"), again, {"002.jpg": Reason.CRASHED_WORKER})

    assert statuses(dest) == {"000.jpg": "scored", "001.jpg": "refused", "002.jpg": "failed", "003.jpg": "scored"}
    status = read_status(dest.url)
    assert status.counts.statuses == {"failed": 1, "refused": 1, "scored": 2}
    assert (status.counts.images, status.remaining) == (4, 0)
    finished = read_run(dest)
    assert finished is not None and finish_run(dest, finished).counts.statuses == status.counts.statuses
    assert {path: path.read_bytes() for path in before} == before, "nothing is overwritten"
    assert sum(read_outcomes(dest, run, number).num_rows for number in committed(dest)) == 4


def test_a_second_retry_goes_over_what_the_first_has_left(tmp_path: Path) -> None:
    source, dest = folders(tmp_path, 3)
    run = begin_run(source, dest, "model", "config")
    decide(dest, run, {"000.jpg": Reason.TIMEOUT, "002.jpg": Reason.STORE_ERROR})
    for number, failed in enumerate([{"002.jpg": Reason.TIMEOUT}, {}], 1):
        retry = begin_retry(source, dest, run)
        assert retry is not None
        decide(LocalStore(tmp_path / f"dest/retries/{number:04d}"), retry[1], failed)
    assert [entry.key for entry in undecided(*retry)] == []
    assert retry[1].plan.images == 1
    assert set(statuses(dest).values()) == {"scored"}
    assert begin_retry(source, dest, run) is None


def test_outcomes_of_a_retry_are_read_part_by_part(tmp_path: Path) -> None:
    source, dest = folders(tmp_path, 2)
    run = begin_run(source, dest, "model", "config")
    decide(dest, run, dict.fromkeys(("000.jpg", "001.jpg"), Reason.TIMEOUT))
    retry = begin_retry(source, dest, run)
    assert retry is not None
    decide(LocalStore(tmp_path / "dest/retries/0001"), retry[1], {})
    dest.put("retries/0001/outcomes/part-000001.parquet", b"damaged")
    tables = latest_outcomes(dest, run, ["status"])
    assert next(tables).to_pylist() == [{"key": "000.jpg", "status": "scored"}]
    with pytest.raises(PartDamagedError):
        next(tables)


def test_a_retry_whose_driver_died_while_it_planned_is_begun_anew(tmp_path: Path) -> None:
    source, dest = folders(tmp_path, 3)
    run = begin_run(source, dest, "model", "config")
    decide(dest, run, {"001.jpg": Reason.CHANGED, "002.jpg": Reason.TIMEOUT})
    assert begin_retry(source, dest, run) is not None
    (tmp_path / "dest/retries/0001/run.json").unlink()  # as if its driver had died just before
    source.put("001.jpg", b"as it is now")
    retry = begin_retry(source, dest, run)
    assert retry is not None
    assert retry[0].url == f"{dest.url}/retries/0002"
    assert [entry.size for entry in undecided(*retry)] == [12, 2]


def test_a_retry_takes_a_photograph_that_has_come_with_the_words_of_its_row(tmp_path: Path) -> None:
    source, dest = folders(tmp_path, 1)
    source.put("list.csv", b"key,field_degrees,eye\na.jpg,30,R\nb.jpg,wide,L\ngs://a/c.jpg,,\n")
    manifest = Photographs(f"{source.url}/list.csv").open()
    run = begin_run(manifest, dest, "model", "config")
    decide(dest, run, dict.fromkeys(("a.jpg", "b.jpg", "gs://a/c.jpg"), Reason.MISSING))
    for key in ("a.jpg", "b.jpg"):
        source.put(key, b"photograph")
    retry = begin_retry(manifest, dest, run)
    assert retry is not None
    first, second, third = undecided(*retry)
    assert (first.size, first.field_degrees, first.eye, first.fault) == (10, 30.0, "R", "")
    assert second.etag and second.fault == "line 3 of the manifest: field_degrees is an angle in degrees, or left empty"
    assert third.etag == "" and "gs:// is not a store" in third.fault


def test_a_retry_takes_a_photograph_that_had_changed_as_it_is_now(tmp_path: Path) -> None:
    source, dest = folders(tmp_path, 3)
    run = begin_run(source, dest, "model", "config")
    decide(dest, run, {"001.jpg": Reason.CHANGED, "002.jpg": Reason.CHANGED})
    source.put("001.jpg", b"another")
    (tmp_path / "source/002.jpg").unlink()
    retry = begin_retry(source, dest, run)
    assert retry is not None
    planned = {entry.key: entry for entry in undecided(*retry)}
    assert planned["001.jpg"] == source.head("001.jpg")
    assert planned["002.jpg"].size == 2, "gone: as it was planned"
