"""What said what: a chain that follows from the outcomes, and that nobody changes unseen."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from archive_runs import rows, upload_eyes
from review_runs import score_here
from typer.testing import CliRunner

from ma_cluster.archive.audit import audit_lines, check_audit, complete_audit
from ma_cluster.archive.outcomes import Outcome, to_table
from ma_cluster.archive.plan import read_shard, shards
from ma_cluster.archive.retry import repair_run
from ma_cluster.archive.run import Run, begin_run, commit, pending
from ma_cluster.archive.summary import finish_run, open_run
from ma_cluster.bundle import load_bundle
from ma_cluster.cli.app import app
from ma_cluster.errors import Reason
from ma_cluster.lesions.detector import Detector
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
    checked = check_audit(dest, run)
    assert (checked.results, checked.undecided, checked.faults) == (3, 0, ())


def test_the_whole_has_one_hash_that_stays(run: Run, tmp_path: Path) -> None:
    dest = LocalStore(tmp_path / "run")
    assert check_audit(dest, run) == check_audit(dest, run)


def test_a_line_that_was_changed_or_taken_out_is_seen(run: Run, tmp_path: Path) -> None:
    dest = LocalStore(tmp_path / "run")
    whole = dest.get(PART)
    for changed in (whole.replace(b"corrupt", b"no_fov "), whole[whole.index(b"\n") + 1 :], b""):
        dest.put(PART, changed)
        (fault,) = check_audit(dest, run).faults
        assert fault.startswith(f"{PART}: it does not follow" if changed else f"{PART}: it is missing")
    dest.put(PART, whole)
    assert check_audit(dest, run).faults == ()


def test_an_outcome_that_was_changed_is_seen(run: Run, tmp_path: Path) -> None:
    dest = LocalStore(tmp_path / "run")
    (tmp_path / "run" / "outcomes" / "part-000000.parquet").unlink()
    decide(dest, run, Reason.NO_FOV)
    (fault,) = check_audit(dest, run).faults
    assert "was changed" in fault


def test_all_parts_that_are_missing_or_that_nobody_planned_are_named(run: Run, tmp_path: Path) -> None:
    root, finished = tmp_path / "run", open_run(str(tmp_path / "run"))
    (root / PART).unlink()
    (root / "outcomes/part-000001.parquet").unlink()
    surplus = [root / name for name in ("outcomes/part-000009.parquet", "audit/part-000008.jsonl", "audit/notes.txt")]
    for path in surplus:
        path.write_bytes(b"{}")
    assert [fault.partition(":")[0] for fault in check_audit(*finished).faults] == [
        PART,
        "outcomes/part-000001.parquet",
        "audit/notes.txt",
        "audit/part-000001.jsonl",
        "audit/part-000008.jsonl",
        "outcomes/part-000009.parquet",
    ]
    said = CliRunner().invoke(app, ["audit", str(root)])
    assert said.exit_code == 1 and "outcomes/part-000001.parquet: it is missing" in said.output


def test_what_is_not_decided_yet_is_no_fault_of_a_run_that_goes_on(run: Run, tmp_path: Path) -> None:
    dest = LocalStore(tmp_path / "run")
    for name in ("audit/part-000002.jsonl", "outcomes/part-000002.parquet"):
        (tmp_path / "run" / name).unlink()
    checked = check_audit(dest, dataclasses.replace(run, finished=None))
    assert (checked.results, checked.undecided, checked.faults) == (2, 1, ())


def test_outcomes_of_other_photographs_than_were_planned_are_seen(run: Run, tmp_path: Path) -> None:
    dest = LocalStore(tmp_path / "run")
    (shard, *_) = shards(dest, run.plan)
    for name in ("audit/part-000000.jsonl", "outcomes/part-000000.parquet"):
        (tmp_path / "run" / name).unlink()
    commit(dest, run, shard, [Outcome(key="other.jpg", etag="e", reason=Reason.CORRUPT, attempts=1)])
    complete_audit(dest, run)
    assert check_audit(dest, run).faults == ("outcomes/part-000000.parquet: its photographs are not those of the plan",)


def test_a_result_holds_its_operating_point_and_the_digest_of_its_mask(tmp_path: Path, tiny_bundle: Path) -> None:
    source, dest = LocalStore(tmp_path / "eyes"), LocalStore(tmp_path / "run")
    upload_eyes(source, 1)
    run = score_here(source.url, dest.url, Detector(load_bundle(str(tiny_bundle))))
    (line,) = [json.loads(line) for entry in dest.list("audit/") for line in dest.get(entry.key).splitlines()]
    mask = dest.get(line["mask_key"])
    assert line["operating_point"] == "default"
    assert line["mask_sha256"] == hashlib.sha256(mask).hexdigest()
    assert check_audit(dest, run, masks=True).faults == ()
    dest.put(line["mask_key"], mask + b"!")
    assert check_audit(dest, run).faults == ()
    assert check_audit(dest, run, masks=True).faults == (
        f"{line['mask_key']}: it was changed since its result was committed",
    )
    (tmp_path / "run" / line["mask_key"]).unlink()
    assert check_audit(dest, run, masks=True).faults == (f"{line['mask_key']}: it is missing",)


def test_outcomes_of_earlier_versions_have_the_audit_that_they_had(run: Run) -> None:
    told = to_table([Outcome(key="0.jpg", etag="e", reason=Reason.CORRUPT, attempts=1)])
    told = told.replace_schema_metadata({"ma_cluster.committed": "1.5"})
    later = ("operating_point", "mask_sha256")
    (now,), (earlier,) = (audit_lines(run, 0, outcomes) for outcomes in (told, told.drop_columns(list(later))))
    assert set(json.loads(now)) - set(json.loads(earlier)) == set(later)


def test_what_is_scored_again_after_a_repair_is_audited_again(run: Run, tmp_path: Path) -> None:
    source, dest = LocalStore(tmp_path / "eyes"), LocalStore(tmp_path / "run")
    dest.put("outcomes/part-000000.parquet", b"damaged")
    (aside,) = (each for each in repair_run(source, dest) if each.part.startswith("outcomes/"))
    assert PART not in {entry.key for entry in dest.list("audit/")} and aside.now is not None
    again = begin_run(source, dest, "model", "config")
    decide(dest, again, Reason.NO_FOV)
    finish_run(dest, again)
    assert check_audit(dest, again).results == 3
    assert b"no_fov" in dest.get(PART)
