"""What said what: a chain that follows from the outcomes, and that nobody changes unseen."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from archive_runs import rows

from ma_cluster.archive.audit import audit_lines, check_audit
from ma_cluster.archive.outcomes import Outcome, to_table
from ma_cluster.archive.plan import read_shard
from ma_cluster.archive.retry import repair_run
from ma_cluster.archive.run import Run, begin_run, commit, pending
from ma_cluster.archive.summary import finish_run
from ma_cluster.errors import PartDamagedError, Reason
from ma_cluster.storage.local import LocalStore

PART = "audit/part-000000.jsonl"


def decide(dest: LocalStore, run: Run, reason: Reason) -> None:
    """Commit all that is pending, refused for one reason."""
    for shard in pending(dest, run):
        entries = read_shard(dest, shard)
        told = [Outcome(key=entry.key, etag=entry.etag, reason=reason, attempts=1) for entry in entries]
        commit(dest, run, shard, told)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Three photographs, of which none could be read; its workers died before they wrote any audit."""
    source, dest = LocalStore(tmp_path / "eyes"), LocalStore(tmp_path / "run")
    for number in range(3):
        source.put(f"{number}.jpg", bytes(number))
    begun = begin_run(source, dest, "model", "config")
    decide(dest, begun, Reason.CORRUPT)
    assert list(dest.list("audit/")) == []
    finish_run(dest, begun)
    return begun


def test_each_line_holds_the_hash_of_the_line_before(run: Run) -> None:
    told = [Outcome(key=f"{number}.jpg", etag="e", reason=Reason.CORRUPT, attempts=1) for number in range(4)]
    outcomes = to_table(told).replace_schema_metadata({"ma_cluster.committed": "1.5"})
    lines = list(audit_lines(run, 7, outcomes))
    values = [json.loads(line) for line in lines]
    assert [each["key"] for each in values] == [each.key for each in told]
    assert values[0]["committed"] == "1970-01-01T00:00:01.500+00:00"
    hashes = [hashlib.sha256(line.encode()).hexdigest() for line in lines]
    assert [each["previous"] for each in values[1:]] == hashes[:-1]
    assert next(audit_lines(run, 8, outcomes)) != lines[0]


def test_a_run_says_of_each_result_which_model_gave_it(run: Run, tmp_path: Path) -> None:
    dest = LocalStore(tmp_path / "run")
    found = [json.loads(line) for entry in dest.list("audit/") for line in dest.get(entry.key).splitlines()]
    assert {each["key"]: each["reason"] for each in found} == dict.fromkeys(rows(dest), "corrupt")
    assert {(each["run"], each["model_digest"], each["config_digest"]) for each in found} == {
        (run.id, "model", "config")
    }
    assert check_audit(dest, run)[0] == 3


def test_the_whole_has_one_hash_that_stays(run: Run, tmp_path: Path) -> None:
    dest = LocalStore(tmp_path / "run")
    assert check_audit(dest, run) == check_audit(dest, run)


def test_a_line_that_was_changed_or_taken_out_is_seen(run: Run, tmp_path: Path) -> None:
    dest = LocalStore(tmp_path / "run")
    whole = dest.get(PART)
    for changed in (whole.replace(b"corrupt", b"no_fov "), whole[whole.index(b"\n") + 1 :], b""):
        dest.put(PART, changed)
        with pytest.raises(PartDamagedError, match="was changed"):
            check_audit(dest, run)
    dest.put(PART, whole)
    check_audit(dest, run)


def test_an_outcome_that_was_changed_is_seen(run: Run, tmp_path: Path) -> None:
    dest = LocalStore(tmp_path / "run")
    (tmp_path / "run" / "outcomes" / "part-000000.parquet").unlink()
    decide(dest, run, Reason.NO_FOV)
    with pytest.raises(PartDamagedError, match="was changed"):
        check_audit(dest, run)


def test_an_audit_that_is_missing_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run" / PART).unlink()
    with pytest.raises(PartDamagedError, match="missing"):
        check_audit(LocalStore(tmp_path / "run"), run)


def test_what_is_scored_again_after_a_repair_is_audited_again(run: Run, tmp_path: Path) -> None:
    source, dest = LocalStore(tmp_path / "eyes"), LocalStore(tmp_path / "run")
    dest.put("outcomes/part-000000.parquet", b"damaged")
    (aside,) = (each for each in repair_run(source, dest) if each.part.startswith("outcomes/"))
    assert PART not in {entry.key for entry in dest.list("audit/")} and aside.now is not None
    again = begin_run(source, dest, "model", "config")
    decide(dest, again, Reason.NO_FOV)
    finish_run(dest, again)
    assert check_audit(dest, again)[0] == 3
    assert b"no_fov" in dest.get(PART)
