"""What is planned and what is not: nothing to score, runs below the source, source and destination in one another."""

from __future__ import annotations

from pathlib import Path

import pytest

from ma_cluster.archive.outcomes import Identity, Outcome
from ma_cluster.archive.plan import is_litter, read_shard
from ma_cluster.archive.retry import begin_retry
from ma_cluster.archive.run import Run, begin_run, commit, pending, undecided
from ma_cluster.archive.summary import finish_run, read_status
from ma_cluster.errors import Reason, RunConflictError, StoreError, Triage, UsageError
from ma_cluster.images.fundus import Fov
from ma_cluster.images.quality import Quality
from ma_cluster.images.reading import Facts
from ma_cluster.lesions.findings import Findings
from ma_cluster.report.console import status_lines, summary_lines
from ma_cluster.report.run_report import write_report
from ma_cluster.storage.local import LocalStore
from ma_cluster.storage.manifest import open_source
from ma_cluster.storage.store import Store

FACTS = Facts(100, 120, Fov(50.0, 60.0, 90.0), Quality(0.4, 0.1, 0.08, 0.02, 0.2, 0.9, True, ()), {})


def scored(source: Store, dest: Store, reason: Reason | None = None) -> None:
    """A finished run with all that one writes; where all fail, with a retry."""
    run = begin_run(source, dest, "model", "config")
    decide(dest, dest, run, reason)
    if reason is not None:
        retry = begin_retry(source, dest, run)
        assert retry is not None
        decide(dest, *retry, reason)


def decide(dest: Store, parts: Store, run: Run, reason: Reason | None) -> None:
    for shard in list(pending(parts, run)):
        outcomes = []
        for entry in read_shard(parts, shard):
            keys = {"mask_key": f"masks/{entry.key}.png", "overlay_key": f"overlays/{entry.key}.jpg"}
            for key in keys.values():
                dest.create(key, b"picture")
            known = {"facts": FACTS, "findings": Findings((), None, Triage.NONE), "attempts": 1}
            known["identity"] = Identity(patient="p")
            outcomes.append(Outcome(key=entry.key, etag=entry.etag, reason=reason, **known, **keys))
        commit(parts, run, shard, outcomes)
    finish_run(parts, run, whole=parts is dest)


@pytest.fixture
def source(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "source")
    for key in ("a.jpg", "masks/b.jpg", "plan/c.jpg", "z/d.jpg"):
        store.put(key, key.encode())
    return store


def keys(source: Store, dest: Store) -> list[str]:
    return [entry.key for entry in undecided(dest, begin_run(source, dest, "model", "config"))]


@pytest.mark.parametrize("folder", [".", "no-such-prefix"])
def test_nothing_to_score_is_an_error_that_writes_nothing(tmp_path: Path, folder: str) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/deeper").mkdir()
    dest = LocalStore(tmp_path / "dest")
    with pytest.raises((UsageError, StoreError)):
        begin_run(LocalStore(tmp_path / "source" / folder), dest, "model", "config")
    assert not dest.root.exists()


def test_a_manifest_of_no_rows_is_nothing_to_score(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("key\n")
    dest = LocalStore(tmp_path / "dest")
    with pytest.raises(UsageError, match="nothing to score"):
        begin_run(open_source(f"{tmp_path}/list.csv"), dest, "model", "config")
    assert not dest.root.exists()


def test_photographs_that_arrive_after_nothing_was_found_are_scored(tmp_path: Path) -> None:
    source, dest = LocalStore(tmp_path / "source"), LocalStore(tmp_path / "dest")
    source.root.mkdir()
    with pytest.raises(UsageError, match="nothing to score"):
        begin_run(source, dest, "model", "config")
    source.put("late.jpg", b"1")
    assert keys(source, dest) == ["late.jpg"]


@pytest.mark.parametrize("where", ["old", "deep/er/old", "masks", "z"])
def test_an_earlier_run_below_the_source_is_skipped_and_counted(source: LocalStore, tmp_path: Path, where: str) -> None:
    photographs = [entry.key for entry in source.list()]
    old = LocalStore(source.root / where)
    scored(source, old)
    write_report(old.url)
    written = len([path for path in source.root.rglob("*") if path.is_file()]) - len(photographs)
    dest = LocalStore(tmp_path / "dest")
    assert keys(source, dest) == photographs
    status = read_status(dest.url)
    assert status.run.plan.skipped == written > 10
    assert f"  skipped {written} files that are no photographs, or of earlier runs" in status_lines(status)


def test_a_retried_run_below_the_source_is_skipped_with_its_retries(source: LocalStore, tmp_path: Path) -> None:
    photographs = [entry.key for entry in source.list()]
    scored(source, LocalStore(source.root / "old"), Reason.TIMEOUT)
    assert keys(source, LocalStore(tmp_path / "dest")) == photographs


def test_all_that_a_run_writes_has_a_name_by_which_it_is_known(source: LocalStore, tmp_path: Path) -> None:
    from ma_cluster.archive.retry import repair_run
    from ma_cluster.archive.run import FILES, FOLDERS

    dest = LocalStore(tmp_path / "dest")
    scored(source, dest, Reason.TIMEOUT)
    write_report(dest.url)
    dest.put("outcomes/part-000000.parquet", b"damaged")
    repair_run(source, dest)
    scored(source, dest, Reason.TIMEOUT)
    names = {entry.key.partition("/")[0] for entry in dest.list()}
    asked_for = {"dicom", "reviews", "turnover", "turnover.parquet"}  # come from other commands
    assert names | asked_for == {*FOLDERS, *FILES}


def test_folders_that_are_named_as_a_runs_are_scored_where_there_is_no_run(source: LocalStore, tmp_path: Path) -> None:
    source.put("run.json", b"{}")  # of another program, beside its own masks/
    assert "masks/b.jpg" in keys(source, LocalStore(tmp_path / "dest"))


def test_what_a_manifest_names_is_scored_be_it_of_a_run(source: LocalStore, tmp_path: Path) -> None:
    scored(source, LocalStore(source.root / "old"))
    source.put("list.csv", b"key\nold/overlays/a.jpg.jpg\n")
    assert keys(open_source(f"{source.url}/list.csv"), LocalStore(tmp_path / "dest")) == ["old/overlays/a.jpg.jpg"]  # type: ignore[arg-type]


def test_a_source_of_nothing_but_earlier_runs_says_so(source: LocalStore, tmp_path: Path) -> None:
    scored(source, LocalStore(tmp_path / "all/old"))
    with pytest.raises(UsageError, match=r"holds no photographs but \d+ files that are none or of earlier runs"):
        begin_run(LocalStore(tmp_path / "all"), LocalStore(tmp_path / "dest"), "model", "config")


@pytest.mark.parametrize(
    ("of", "to"),
    [("source", "source"), ("dest/masks", "dest"), ("dest/overlays/deep", "dest"), ("link", "source")],
)
def test_a_destination_that_writes_into_its_source_is_refused(
    source: LocalStore, tmp_path: Path, of: str, to: str
) -> None:
    (tmp_path / "link").symlink_to(source.root)
    LocalStore(tmp_path / of).put("eye.jpg", b"1")
    with pytest.raises(UsageError, match="would write into the source"):
        begin_run(LocalStore(tmp_path / of), LocalStore(tmp_path / to), "model", "config")


def test_a_destination_around_its_source_or_within_it_is_fine(source: LocalStore, tmp_path: Path) -> None:
    assert len(keys(source, LocalStore(tmp_path))) == 4
    assert len(keys(source, LocalStore(source.root / "results"))) == 4


def test_a_linked_source_is_one_source_by_whatever_path(
    source: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(source.root)
    dest = LocalStore(tmp_path / "dest")
    run = begin_run(open_source(str(tmp_path / "link")), dest, "model", "config")
    monkeypatch.chdir(tmp_path)
    for same in ("link", "source", "./link/../link"):
        assert begin_run(open_source(same), dest, "model", "config") == run
    Path("link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "dest")
    with pytest.raises(RunConflictError, match="another source"):
        begin_run(open_source("link"), dest, "model", "config")


class Overwriting(LocalStore):
    """A store without conditional writes, as some servers are."""

    def create(self, key: str, data: bytes) -> bool:
        self.put(key, data)
        return True


def test_a_destination_without_conditional_writes_is_refused(source: LocalStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="overwrites where it should only create"):
        begin_run(source, Overwriting(tmp_path / "dest"), "model", "config")


def test_the_words_of_refusals_are_counted_with_their_numbers_left_out(source: LocalStore, tmp_path: Path) -> None:
    dest = LocalStore(tmp_path / "dest")
    run = begin_run(source, dest, "model", "config")
    words = iter(["format JPEG2000", "480 x 640.5 pixels", "12 x 9 pixels", None])
    for shard in list(pending(dest, run)):
        (entry,) = read_shard(dest, shard)
        said = {"reason": Reason.TOO_SMALL, "detail": next(words)}
        commit(dest, run, shard, [Outcome(key=entry.key, etag=entry.etag, attempts=1, **said)])
    summary = finish_run(dest, run)
    assert summary.counts.details == {"too_small": {"# x # pixels": 2, "format JPEG2000": 1}}
    assert read_status(dest.url).counts.details == summary.counts.details
    assert "      2 x # x # pixels" in summary_lines(summary, None)
    write_report(dest.url)
    page = (dest.root / "report/index.html").read_text()
    assert "# x # pixels" in page and "12 x 9 pixels" in page


def test_outcomes_of_a_version_without_a_column_are_read_with_nulls(source: LocalStore, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    dest = LocalStore(tmp_path / "dest")
    scored(source, dest)
    for path in (dest.root / "outcomes").iterdir():
        table = pq.read_table(path)
        pq.write_table(table.drop_columns(["detail"]), path)
    assert read_status(dest.url).counts.statuses == {"scored": 4}


LITTER = [".DS_Store", "a/._eye.jpg", "THUMBS.DB", "desktop.ini", "@eaDir/eye.jpg/SYNOPHOTO_THUMB_XL.jpg"]
LITTER += ["day/@eaDir/eye.jpg", "__MACOSX/eye.jpg", "photos_$folder$", "eye.xml", "eye.jpg.json", "notes.TXT", "a.pdf"]
LITTER += ["a/eye.xmp", "IMG_1.THM", "@Recycle/eye.jpg", ".@__thumb/eye.jpg", "#snapshot/eye.jpg", "Icon\r", "DICOMDIR"]
LITTER += ["lost+found/eye.jpg", "System Volume Information/x", ".picasaoriginals/eye.jpg", "_SUCCESS", ".eye.jpg.crc"]
LITTER += [".directory", "a/.gitkeep", ".dropbox", "IMG_1.AAE", "autorun.inf", ".nfs0000000a", ".fuse_hidden0001"]
LITTER += ["@tmp/eye.jpg", "_temporary/0/eye.jpg", ".stversions/eye.jpg", ".dropbox.cache/x/eye.jpg"]


@pytest.mark.parametrize("key", LITTER)
def test_litter_and_sidecars_are_known_by_their_names(key: str) -> None:
    assert is_litter(key)


@pytest.mark.parametrize("key", ["eye.jpg", "a/eye", ".hidden.jpg", "thumbs.db/eye.png", "eye.dcm", "x.pdf.jpg"])
def test_what_may_be_a_photograph_is_no_litter(key: str) -> None:
    assert not is_litter(key)
