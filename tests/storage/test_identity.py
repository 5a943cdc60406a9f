"""Patients, eyes and visits as a manifest names them, and what results call a patient."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ma_cluster.archive.plan import read_shards, shards, write_plan
from ma_cluster.errors import UsageError
from ma_cluster.storage import identity
from ma_cluster.storage.identity import (
    Pseudonyms,
    eye_named,
    is_date,
    salts,
    site_pseudonyms,
    visit_named,
    years_between,
)
from ma_cluster.storage.local import LocalStore
from ma_cluster.storage.manifest import Photographs, open_source

SALT, OTHER = Pseudonyms(b"one salt of a site"), Pseudonyms(b"another one, of another")


@given(first=st.text(min_size=1), second=st.text(min_size=1))
def test_two_patients_have_two_pseudonyms_and_each_has_one(first: str, second: str) -> None:
    same = first.strip() == second.strip()
    assert (SALT.of(first) == SALT.of(second)) is same


def test_a_pseudonym_follows_from_the_salt_and_tells_neither_id_nor_salt() -> None:
    assert SALT.of("4711") != OTHER.of("4711")
    assert "4711" not in SALT.of("4711")
    assert salts([SALT.of("4711"), SALT.of("4712")]) == {SALT.of("4711")[:4]}
    assert len(salts([SALT.of("4711"), OTHER.of("4711"), "4711"])) == 3
    assert "salt of" not in repr(SALT)


def test_padding_is_no_part_of_an_id_and_no_id_has_no_pseudonym() -> None:
    assert SALT.of(" 4711 ") == SALT.of("4711")
    assert SALT.of("  ") == ""


def test_without_a_salt_of_the_site_one_is_drawn_and_kept_for_this_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    monkeypatch.delenv("MA_CLUSTER_SALT")
    monkeypatch.setenv("HOME", str(tmp_path))
    identity._kept_salt.cache_clear()
    first = site_pseudonyms()
    identity._kept_salt.cache_clear()
    assert site_pseudonyms() == first
    (said,) = log_lines
    assert "of this machine alone: set MA_CLUSTER_SALT" in said
    kept = tmp_path / ".local/state/ma_cluster/salt"
    assert kept.read_bytes() == first.salt and kept.stat().st_mode & 0o077 == 0
    identity._kept_salt.cache_clear()
    kept.write_bytes(b"")
    with pytest.raises(UsageError, match=r"the salt that is kept.*put it back"):
        site_pseudonyms()


def test_a_salt_that_cannot_be_kept_is_said_to_end_with_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    (tmp_path / ".local").write_bytes(b"a file where a folder should be")
    monkeypatch.delenv("MA_CLUSTER_SALT")
    monkeypatch.setenv("HOME", str(tmp_path))
    identity._kept_salt.cache_clear()
    assert site_pseudonyms() == site_pseudonyms()
    (said,) = log_lines
    assert "ends with this process: set MA_CLUSTER_SALT" in said
    identity._kept_salt.cache_clear()


def test_a_salt_that_can_be_guessed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MA_CLUSTER_SALT", "hospital")
    with pytest.raises(UsageError, match="shorter than 16"):
        site_pseudonyms()
    assert site_pseudonyms(keep_ids=True).of("4711") == "4711"


@pytest.mark.parametrize(("said", "eye"), [("R", "R"), ("od", "R"), (" Left ", "L"), ("OS", "L"), ("", "")])
def test_an_eye_has_many_names(said: str, eye: str) -> None:
    assert eye_named(said) == eye


@pytest.mark.parametrize(
    ("said", "visit"),
    [
        ("20240501", "2024-05-01"),
        ("2024-05-01", "2024-05-01"),
        ("2024-05-01 13:00:00", "2024-05-01"),
        ("2", "2"),
        ("2.0", "2.0"),
        ("visit 10", "visit 10"),
    ],
)
def test_a_visit_is_a_date_or_a_label(said: str, visit: str) -> None:
    assert visit_named(said) == visit


@pytest.mark.parametrize(
    "said", ["2024-02-30", "x" * 33, "a\nb", "01.02.2026", "2/15/26", "2026-1-5", "15.01.2026 13:00"]
)
def test_what_is_neither_is_refused(said: str) -> None:
    with pytest.raises(UsageError, match="visit"):
        visit_named(said)


def test_only_dates_have_an_order_and_a_time_between_them() -> None:
    assert years_between("2023-05-01", "2024-05-01") == pytest.approx(1.0, abs=0.01)
    assert is_date("2024-05-01") and not any(map(is_date, ("2", "visit 10", "2024-W01-1", None)))


@pytest.fixture
def archive(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "archive")
    for key in ("a.jpg", "b.jpg", "c.jpg"):
        store.create(key, key.encode())
    lines = ["key,Patient,eye,visit", "a.jpg,4711,OD,20240501", "b.jpg,4711,both,", "gone.jpg,4712,L,2", "c.jpg,,,"]
    store.put("list.csv", "\n".join(lines).encode())
    return store


def test_a_manifest_says_whom_it_shows_under_a_pseudonym(archive: LocalStore) -> None:
    entries = list(Photographs(f"{archive.url}/list.csv").open().list())
    first, second = (site_pseudonyms().of(patient) for patient in ("4711", "4712"))
    said = [(entry.patient, entry.eye, entry.visit) for entry in entries]
    assert said == [(first, "R", "2024-05-01"), (first, "", ""), (second, "L", "2"), ("", "", "")]
    assert [bool(entry.fault) for entry in entries] == [False, True, True, False]
    assert "eye is R or L" in entries[1].fault and "both" not in entries[1].fault


def test_who_reads_a_manifest_without_pseudonyms_does_not_hear_of_patients(archive: LocalStore) -> None:
    assert {entry.patient for entry in open_source(f"{archive.url}/list.csv").list()} == {""}


def test_a_parquet_may_hold_numbers_and_dates(archive: LocalStore) -> None:
    import datetime

    path = Path(archive.url) / "list.parquet"
    columns = {"key": ["a.jpg"], "patient": [4711], "eye": ["L"], "visit": [datetime.date(2024, 5, 1)]}
    pq.write_table(pa.table(columns), path)
    (entry,) = Photographs(str(path), keep_ids=True).open().list()
    assert (entry.patient, entry.eye, entry.visit) == ("4711", "L", "2024-05-01")


def test_no_id_reaches_a_plan_and_what_is_known_comes_back_from_it(archive: LocalStore, tmp_path: Path) -> None:
    entries = list(Photographs(f"{archive.url}/list.csv").open().list())
    dest = LocalStore(tmp_path / "dest")
    plan = write_plan(entries, dest)
    assert list(read_shards(dest, shards(dest, plan))) == entries
    assert not any(b"4711" in dest.get(entry.key) for entry in dest.list())
