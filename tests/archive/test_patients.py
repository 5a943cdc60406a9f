"""From photographs to eyes and visits: whatever could not be judged is never called none."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ma_cluster.archive import patients
from ma_cluster.archive.outcomes import Identity, Outcome, identify
from ma_cluster.archive.patients import EYES, VISITS, Rollup, keep_pseudonyms, write_patients
from ma_cluster.archive.plan import read_shard, shards
from ma_cluster.archive.run import begin_run, commit
from ma_cluster.archive.summary import finish_run, open_run, read_status
from ma_cluster.errors import Reason, RunConflictError, Triage, UsageError
from ma_cluster.images.acquisition import Acquisition
from ma_cluster.images.fundus import Fov
from ma_cluster.images.laterality import Side
from ma_cluster.images.quality import Quality
from ma_cluster.images.reading import Facts
from ma_cluster.lesions.findings import Findings
from ma_cluster.report.console import status_lines
from ma_cluster.storage.identity import Pseudonyms
from ma_cluster.storage.local import LocalStore
from ma_cluster.storage.manifest import Photographs
from ma_cluster.storage.store import Entry

NONE = {"status": "scored", "gradable": True, "triage": "none"}
REFER = {"status": "scored", "gradable": True, "triage": "refer"}
POOR = {"status": "scored", "gradable": False, "triage": "ungradable"}
POOR_REFER = {"status": "scored", "gradable": False, "triage": "refer"}
REFUSED = {"status": "refused", "gradable": None, "triage": None}
FAILED = {"status": "failed", "gradable": None, "triage": None}
UNDECIDED = {"status": None, "gradable": None, "triage": None}
KINDS = [NONE, REFER, POOR, POOR_REFER, REFUSED, FAILED, UNDECIDED]


def photograph(kind: dict[str, Any], eye: str | None, visit: str | None = "1", patient: str = "p") -> dict[str, Any]:
    known = {"patient": patient, "visit": visit, "eye": eye, "eye_source": "manifest" if eye else None}
    return known | {"lesion_count": 0, "image_score": None} | kind


def rolled_up(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of eyes and visits."""
    with closing(Rollup()) as found:
        for row in rows:
            found.add(row)
        return list(found.eyes()), list(found.visits())


PHOTOGRAPHS = st.lists(
    st.builds(
        photograph,
        st.sampled_from(KINDS),
        st.sampled_from(["R", "L", None]),
        st.sampled_from(["1", "2", None]),
        st.sampled_from(["p", "q"]),
    ),
    max_size=12,
)


@given(PHOTOGRAPHS)
def test_no_ungradable_eye_ends_in_none(rows: list[dict[str, Any]]) -> None:
    eyes, visits = rolled_up(rows)
    for row in eyes:
        own = [each for each in rows if all(each[name] == row[name] for name in ("patient", "visit", "eye"))]
        if row["triage"] == Triage.NONE:
            assert any(each["gradable"] and each["triage"] == "none" for each in own)
            assert not any(each["triage"] == "refer" or each["status"] in ("failed", None) for each in own)
    for row in visits:
        own = [each for each in rows if all(each[name] == row[name] for name in ("patient", "visit"))]
        refers = any(each["triage"] == "refer" for each in own)
        assert (row["triage"] == Triage.REFER) is refers
        if row["triage"] == Triage.NONE:
            for eye in ("R", "L"):
                assert any(each["eye"] == eye and each["gradable"] and each["triage"] == "none" for each in own)


@given(PHOTOGRAPHS)
def test_every_photograph_is_counted_once_and_order_does_not_matter(rows: list[dict[str, Any]]) -> None:
    found = rolled_up(rows)
    assert [sum(row["photographs"] for row in of) for of in found] == [len(rows)] * 2
    assert found == rolled_up(rows[::-1])


@pytest.mark.parametrize(
    ("right", "left", "todo", "lacking"),
    [
        ([NONE], [NONE], "none", ""),
        ([NONE, POOR], [NONE], "none", ""),
        ([NONE], [POOR], "ungradable", "L"),
        ([NONE], [], "ungradable", "L"),
        ([NONE, FAILED], [NONE], "ungradable", "R"),
        ([NONE, REFUSED], [NONE], "none", ""),
        ([POOR], [POOR_REFER], "refer", "R"),
    ],
)
def test_a_visit_is_none_where_both_eyes_are(
    right: list[dict[str, Any]], left: list[dict[str, Any]], todo: str, lacking: str
) -> None:
    rows = [photograph(kind, "R") for kind in right] + [photograph(kind, "L") for kind in left]
    _, (visit,) = rolled_up(rows)
    assert (visit["triage"], visit["lacking"]) == (todo, lacking)


@pytest.mark.parametrize(
    ("right", "left", "least"),
    [("manifest", "picture", "picture"), ("manifest", "dicom", "dicom"), ("manifest", None, "manifest")],
)
def test_a_visit_says_how_sure_its_eyes_are(right: str, left: str | None, least: str) -> None:
    rows = [photograph(NONE, "R") | {"eye_source": right}, photograph(NONE, left and "L") | {"eye_source": left}]
    _, (visit,) = rolled_up(rows)
    assert visit["eye_source"] == least and "eye_source" in VISITS.names


FOV, QUALITY = Fov(50.0, 60.0, 90.0), Quality(0.4, 0.1, 0.08, 0.02, 0.2, 0.9, True, ())
FACTS, FINDINGS = Facts(100, 120, FOV, QUALITY, {}), Findings((), 0.25, Triage.NONE)


def scored_run(tmp_path: Path, rows: list[str], committed: int = 10**6) -> LocalStore:
    """A run of a manifest whose photographs are all scored and none, but those whose key says otherwise."""
    archive, dest = LocalStore(tmp_path / "archive"), LocalStore(tmp_path / "dest")
    for row in rows:
        archive.create(row.partition(",")[0], b"photograph")
    archive.put("list.csv", "\n".join(["key,patient,eye,visit", *rows]).encode())
    run = begin_run(Photographs(f"{archive.url}/list.csv", keep_ids=True).open(), dest, "model", "config")
    for shard in list(shards(dest, run.plan))[:committed]:
        outcomes = []
        for entry in read_shard(dest, shard):
            reason = Reason.TIMEOUT if "late" in entry.key else None
            known: dict[str, Any] = {} if reason else {"facts": FACTS, "findings": FINDINGS}
            known |= {"key": entry.key, "etag": entry.etag, "attempts": 1, "identity": identify(entry, None, None)}
            outcomes.append(Outcome(reason=reason, **known))
        commit(dest, run, shard, outcomes)
    return dest


ROWS = ["a.jpg,=p,R,2024-05-01", "b.jpg,=p,L,2024-05-01", "c.jpg,q,R,1", "late.jpg,q,L,1", "d.jpg,,,"]


@pytest.mark.parametrize("at_a_time", [1, 10_000])
def test_a_run_that_knows_patients_says_at_its_end_what_is_to_be_done_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_a_time: int
) -> None:
    monkeypatch.setattr(patients, "_ROWS", at_a_time)
    dest = scored_run(tmp_path, ROWS)
    finish_run(dest, open_run(dest.url)[1])
    eyes = pq.read_table(Path(dest.url) / "patients/eyes.parquet")
    visits = pq.read_table(Path(dest.url) / "patients/visits.parquet").to_pylist()
    assert eyes.schema.equals(EYES) and VISITS.names == list(visits[0])
    assert [(row["patient"], row["triage"], row["lacking"]) for row in visits] == [
        ("=p", "none", ""),
        ("q", "ungradable", "L"),
    ]
    counts = {
        "patients": 2,
        "visits": {"none": 1, "refer": 0, "ungradable": 1},
        "eyes": {"none": 3, "refer": 0, "ungradable": 1},
    }
    assert json.loads(dest.get("summary.json"))["patients"] == counts == read_status(dest.url).patients
    assert "    visits none 1, refer 0, ungradable 1" in status_lines(read_status(dest.url))
    listed = list(csv.DictReader(io.StringIO(dest.get("patients/visits.csv").decode())))
    assert [row["patient"] for row in listed] == ["'=p", "q"], "no spreadsheet takes an id for a formula"


def test_a_photograph_without_an_outcome_yet_keeps_its_eye_from_being_none(tmp_path: Path) -> None:
    dest = scored_run(tmp_path, ["a.jpg,p,R,1", "b.jpg,p,L,1"], committed=1)
    assert write_patients(dest, open_run(dest.url)[1])["visits"] == {"none": 0, "refer": 0, "ungradable": 1}


def test_a_run_that_knows_no_patients_says_so_and_has_no_such_files(tmp_path: Path) -> None:
    dest = scored_run(tmp_path, ["a.jpg,,,", "b.jpg,,,"])
    status = finish_run(dest, open_run(dest.url)[1])
    assert status.patients is None and list(dest.list("patients/")) == []
    with pytest.raises(UsageError, match="knows no patients"):
        write_patients(dest, status.run)


SALTS = [Pseudonyms(b"one salt of a site"), Pseudonyms(b"another salt of it"), Pseudonyms(None)]


@pytest.mark.parametrize("first", SALTS)
@pytest.mark.parametrize("scored", [True, False])
def test_a_run_that_knows_patients_keeps_to_its_salt(tmp_path: Path, first: Pseudonyms, scored: bool) -> None:
    dest = scored_run(tmp_path, ROWS, committed=10 if scored else 0)
    begun = open_run(dest.url)[1]
    assert begun.pseudonyms == "", "as in a run of an earlier version, which goes on"
    assert (
        keep_pseudonyms(dest, begun, first) == open_run(dest.url)[1] == dataclasses.replace(begun, pseudonyms=first.tag)
    )
    for other in SALTS:
        if other is first:
            assert keep_pseudonyms(dest, open_run(dest.url)[1], other).pseudonyms == first.tag
        else:
            with pytest.raises(RunConflictError, match=r"calls its patients by .*: go on as it was begun"):
                keep_pseudonyms(dest, open_run(dest.url)[1], other)
    assert open_run(dest.url)[1].pseudonyms == first.tag


def test_a_run_without_patients_goes_on_with_any_salt(tmp_path: Path) -> None:
    dest = scored_run(tmp_path, ["a.jpg,,,", "b.jpg,,,"], committed=1)
    for salt in SALTS:
        assert keep_pseudonyms(dest, open_run(dest.url)[1], salt).pseudonyms == salt.tag


def test_a_manifest_goes_before_a_file_which_names_its_patient_by_a_pseudonym() -> None:
    taken = Acquisition(patient_id="4711", laterality="L", visit="2024-05-01")
    facts = dataclasses.replace(FACTS, acquisition=taken)
    salt = Pseudonyms(b"one salt of a site")
    bare, said = Entry("a", 1, "1"), Entry("a", 1, "1", patient="p", eye="R", visit="2")
    assert identify(bare, None, salt) == Identity()
    known = Identity(patient=salt.of("4711"), eye="L", eye_source="dicom", eye_confidence=1.0, visit="2024-05-01")
    assert identify(bare, facts, salt) == known
    assert identify(bare, facts, None).patient is None, "nobody is named who has no pseudonym"
    told = Identity(patient="p", eye="R", eye_source="manifest", eye_confidence=1.0, visit="2")
    assert identify(said, facts, salt) == told


def test_where_nobody_says_the_eye_the_picture_does_if_it_is_sure() -> None:
    entry = Entry("a", 1, "1")
    for confidence, eye, source in ((0.99, "R", "picture"), (0.8, None, None)):
        facts = dataclasses.replace(FACTS, side=Side("R", confidence, (0.0, 0.0), (0.0, 0.0)))
        assert identify(entry, facts, None) == Identity(eye=eye, eye_source=source, eye_confidence=confidence)
        told = dataclasses.replace(facts, acquisition=Acquisition(laterality="L"))
        assert identify(entry, told, None).eye == "L"


def test_the_command_rolls_a_run_up_and_says_what_it_found(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from ma_cluster.cli.app import app

    dest = scored_run(tmp_path, ROWS)
    done = CliRunner().invoke(app, ["patients", dest.url])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines() == [
        "  patients 2",
        "    visits none 1, refer 0, ungradable 1",
        "    eyes   none 3, refer 0, ungradable 1",
        f"{dest.url}/patients",
    ]
    assert dest.head("patients/eyes.csv").size > 0
