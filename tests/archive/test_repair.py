"""Runs whose parts were damaged, swapped, lost or added to: named with the cure, put aside, and gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from servers import Weed

from ma_cluster.archive.outcomes import Outcome
from ma_cluster.archive.plan import read_shard
from ma_cluster.archive.retry import RUN_SUMMARY, begin_retry, repair_run
from ma_cluster.archive.run import Run, begin_run, commit, committed, pending, read_run
from ma_cluster.archive.summary import finish_run, read_status
from ma_cluster.errors import PartDamagedError, Reason, RunConflictError, UsageError
from ma_cluster.storage.local import LocalStore
from ma_cluster.storage.store import Store, open_store

PART = "outcomes/part-000001.parquet"


def decide(dest: Store, run: Run, reasons: dict[str, Reason] | None = None) -> None:
    """Score what is pending, each photograph with the reason named for it."""
    for shard in list(pending(dest, run)):
        entries = read_shard(dest, shard)
        found = [(entry, (reasons or {}).get(entry.key)) for entry in entries]
        commit(dest, run, shard, [Outcome(key=e.key, etag=e.etag, reason=why, attempts=1) for e, why in found])
    finish_run(dest, run)


@pytest.fixture
def source(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "source")
    for number in range(4):
        store.put(f"{number}.jpg", b"x" * number)
    return store


@pytest.fixture
def dest(source: LocalStore, tmp_path: Path) -> LocalStore:
    """A finished run of four photographs in four parts."""
    store = LocalStore(tmp_path / "dest")
    decide(store, begin_run(source, store, "model", "config"))
    return store


def run_of(dest: Store) -> Run:
    run = read_run(dest)
    assert run is not None
    return run


def cut_short(dest: LocalStore) -> None:
    dest.put(PART, dest.get(PART)[:-20])


def flip_a_bit(dest: LocalStore) -> None:
    data = bytearray(dest.get(PART))
    data[40] ^= 1
    dest.put(PART, bytes(data))


def empty(dest: LocalStore) -> None:
    dest.put(PART, b"")


def no_rows(dest: LocalStore) -> None:
    pq.write_table(pq.read_table(dest.root / PART).slice(0, 0), dest.root / PART)


def copy_of_another(dest: LocalStore) -> None:
    dest.put(PART, dest.get("outcomes/part-000000.parquet"))


def of_another_run(dest: LocalStore) -> None:
    table = pq.read_table(dest.root / PART)
    stamp = table.schema.metadata | {b"ma_cluster.run": b"another"}
    pq.write_table(table.replace_schema_metadata(stamp), dest.root / PART)


def of_another_program(dest: LocalStore) -> None:
    pq.write_table(pa.table({"a": [1]}), dest.root / PART)


DAMAGES = [cut_short, flip_a_bit, empty, copy_of_another, of_another_run, of_another_program]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_of_the_outcomes_is_named_with_its_cure(
    dest: LocalStore, damage: Callable[[LocalStore], None]
) -> None:
    damage(dest)
    for attempt in (lambda: read_status(dest.url), lambda: finish_run(dest, run_of(dest))):
        with pytest.raises(PartDamagedError, match=r"^outcomes/part-000001\.parquet .*score SOURCE DEST --repair"):
            attempt()


@pytest.mark.parametrize("damage", [*DAMAGES, no_rows])
def test_a_damaged_part_of_the_outcomes_is_put_aside_and_scored_again(
    source: LocalStore, dest: LocalStore, damage: Callable[[LocalStore], None]
) -> None:
    whole = {number: dest.get(f"outcomes/part-{number:06d}.parquet") for number in (0, 2, 3)}
    damage(dest)
    found = dest.get(PART)
    done = {each.part: each.now for each in repair_run(source, dest)}
    assert done == {PART: f"damaged/0001/{PART}", "summary.json": "damaged/0001/summary.json"}
    assert dest.get(f"damaged/0001/{PART}") == found
    assert (read_status(dest.url).remaining, run_of(dest).finished) == (1, None)

    decide(dest, begin_run(source, dest, "model", "config"))
    assert read_status(dest.url).counts.statuses == {"scored": 4}
    assert {number: dest.get(f"outcomes/part-{number:06d}.parquet") for number in whole} == whole
    assert json.loads(dest.get("summary.json"))["finished"] == run_of(dest).finished
    assert repair_run(source, dest) == []


def test_a_second_repair_keeps_what_the_first_has_put_aside(source: LocalStore, dest: LocalStore) -> None:
    for content in (b"first", b"second"):
        dest.put(PART, content)
        repair_run(source, dest)
        decide(dest, run_of(dest))
    assert [dest.get(f"damaged/{number}/{PART}") for number in ("0001", "0002")] == [b"first", b"second"]


def test_a_surplus_part_of_the_outcomes_is_named_and_put_aside(source: LocalStore, dest: LocalStore) -> None:
    surplus = "outcomes/part-000004.parquet"
    dest.put(surplus, dest.get(PART))
    with pytest.raises(PartDamagedError, match=r"part-000004\.parquet of the destination: the plan has no such part"):
        list(pending(dest, run_of(dest)))
    with pytest.raises(PartDamagedError, match=r"part-000004\.parquet of the destination: it is the copy of another"):
        read_status(dest.url)
    assert repair_run(source, dest)[0].part == surplus
    assert read_status(dest.url).remaining == 0


@pytest.mark.parametrize("content", [None, b"", b"PAR1 no more"])
def test_a_missing_or_damaged_part_of_the_plan_is_named_and_listed_again(
    source: LocalStore, dest: LocalStore, content: bytes | None
) -> None:
    plan, before = dest.root / "plan/part-00000.parquet", dest.get("plan/part-00000.parquet")
    plan.unlink()
    if content is not None:
        plan.write_bytes(content)
    with pytest.raises(PartDamagedError, match=r"^plan/part-00000\.parquet .*--repair"):
        list(pending(dest, run_of(dest)))
    (done,) = repair_run(source, dest)
    assert (done.part, done.now is None) == ("plan/part-00000.parquet", content is None)
    assert dest.get("plan/part-00000.parquet") == before
    assert list(pending(dest, run_of(dest))) == []


def test_a_plan_of_another_archive_with_as_many_photographs_is_noticed(source: LocalStore, dest: LocalStore) -> None:
    other = LocalStore(dest.root.parent / "other")
    begin_run(source, other, "model", "config")
    table = pq.read_table(other.root / "plan/part-00000.parquet")
    keys = pa.array([f"other {number}.jpg" for number in range(4)])
    pq.write_table(table.set_column(0, table.schema.field("key"), keys), dest.root / "plan/part-00000.parquet")
    assert [each.part for each in repair_run(source, dest)] == ["plan/part-00000.parquet"]
    assert read_status(dest.url).remaining == 0


def test_a_plan_whose_source_has_changed_cannot_be_listed_again_and_is_left(
    source: LocalStore, dest: LocalStore
) -> None:
    dest.put("plan/part-00000.parquet", b"damaged")
    source.put("later.jpg", b"new")
    with pytest.raises(RunConflictError, match="put back the destination's plan/ from a copy"):
        repair_run(source, dest)
    assert dest.get("plan/part-00000.parquet") == b"damaged"


def test_repair_of_another_source_or_of_no_run_touches_nothing(source: LocalStore, dest: LocalStore) -> None:
    dest.put(PART, b"damaged")
    with pytest.raises(RunConflictError, match="another source; nothing was touched"):
        repair_run(LocalStore(dest.root.parent / "other"), dest)
    with pytest.raises(UsageError, match="no run"):
        repair_run(source, LocalStore(dest.root.parent / "other"))
    assert dest.get(PART) == b"damaged"


@pytest.fixture
def retried(source: LocalStore, tmp_path: Path) -> LocalStore:
    """Two photographs failed; a retry scored the first, a second retry the other."""
    store = LocalStore(tmp_path / "retried")
    run = begin_run(source, store, "model", "config")
    decide(store, run, {"0.jpg": Reason.TIMEOUT, "2.jpg": Reason.TIMEOUT})
    for failing in ({"2.jpg": Reason.TIMEOUT}, {}):
        retry = begin_retry(source, store, run)
        assert retry is not None
        decide(*retry, failing)
        finish_run(store, run_of(store))
    return store


@pytest.mark.parametrize("number", ["0001", "0002"])
@pytest.mark.parametrize("what", ["outcomes/part-000000.parquet", "plan/part-00000.parquet", "run.json"])
def test_what_a_retry_has_lost_is_retried_again(
    source: LocalStore, retried: LocalStore, number: str, what: str
) -> None:
    assert read_status(retried.url).counts.statuses == {"scored": 4}
    retried.put(f"retries/{number}/{what}", b"damaged")
    assert f"damaged/0001/retries/{number}/{what}" in {each.now for each in repair_run(source, retried)}
    assert read_status(retried.url).counts.statuses["failed"] >= 1
    while (retry := begin_retry(source, retried, run_of(retried))) is not None:
        decide(*retry)
    assert read_status(retried.url).counts.statuses == {"scored": 4}


def test_after_a_retry_the_whole_runs_summary_lies_beside_it(retried: LocalStore) -> None:
    whole = [json.loads(retried.get(f"retries/{number}/{RUN_SUMMARY}")) for number in ("0001", "0002")]
    assert [summary["statuses"] for summary in whole] == [{"failed": 1, "scored": 3}, {"scored": 4}]
    assert json.loads(retried.get("summary.json"))["statuses"] == {"failed": 2, "scored": 2}
    assert json.loads(retried.get("retries/0002/summary.json"))["images"] == 1
    assert read_status(retried.url).retries == 2


def test_a_run_in_s3_is_repaired_as_well(source: LocalStore, weed: Weed) -> None:
    dest = open_store(f"{weed.bucket('repair')}/run +%")
    decide(dest, begin_run(source, dest, "model", "config"))
    dest.put(PART, b"damaged")
    repair_run(source, dest)
    assert committed(dest) == {0, 2, 3}
    assert dest.get(f"damaged/0001/{PART}") == b"damaged"
    decide(dest, run_of(dest))
    assert read_status(dest.url).counts.statuses == {"scored": 4}


@pytest.mark.parametrize(
    "text", ["", "[]", "3", '{"plan": 3}', "[" * 100_000, '{"id": "', '{"plan": {"images": "x", "digest": ""}}', "\xff"]
)
def test_a_damaged_run_json_is_one_clear_error(dest: LocalStore, text: str) -> None:
    dest.put("run.json", text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"run\.json of the destination is damaged"):
        read_status(dest.url)
