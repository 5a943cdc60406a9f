"""Whole archive runs on a real Ray, from a folder and from a real S3 server, undisturbed and with faults."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import subprocess
import time
import zlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from archive_runs import driver, masks, replicas, results, rows
from PIL import Image
from processes import Process, descendants, wait_until_gone
from servers import Weed

from ma_cluster.archive.summary import RunStatus, missing_keys, read_status
from ma_cluster.bundle import load_bundle, save_bundle
from ma_cluster.cluster.fleet.driver import score_archive
from ma_cluster.cluster.fleet.replicas import Fleet
from ma_cluster.cluster.fleet.workers import Progress
from ma_cluster.errors import RunConflictError, StoreError
from ma_cluster.storage.local import LocalStore
from ma_cluster.storage.store import open_store

FLEET = Fleet(segmenters=1)
GOOD = 8
POISON = {
    "cut.jpg": "truncated",
    "deep/page.jpg": "not_an_image",
    "nothing.png": "not_an_image",
    "vast.png": "too_large",
}


@dataclass(frozen=True, slots=True)
class ScoredFolder:
    """A finished run from a local folder."""

    source: Path
    dest: Path
    summary: RunStatus
    progress: list[Progress]


def huge_png_header(side: int) -> bytes:
    """A valid PNG header of side x side pixels, and next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight variants of a real photograph and four files that nobody can score."""
    from ma_cluster.images.sample import retina

    folder = tmp_path_factory.mktemp("photographs")
    (folder / "deep").mkdir()
    eye = Image.fromarray(retina())
    for number in range(GOOD):
        side = 400 - 10 * number
        eye.resize((side, side)).rotate(90 * (number % 4)).save(folder / f"eye {number}.jpg", quality=92)
    whole = (folder / "eye 0.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "deep/page.jpg").write_text("<html>the archive is closed for maintenance</html>")
    (folder / "nothing.png").write_bytes(b"")
    (folder / "vast.png").write_bytes(huge_png_header(60_000))
    return folder


@pytest.fixture(scope="module")
def scored_folder(
    photographs: Path, tiny_bundle: Path, local_ray: None, tmp_path_factory: pytest.TempPathFactory
) -> ScoredFolder:
    """The run that others are compared with; it leaves nothing of its fleet behind."""
    dest = tmp_path_factory.mktemp("run") / "dest"
    progress: list[Progress] = []
    summary = score_archive(str(photographs), str(dest), FLEET, model=str(tiny_bundle), on_progress=progress.append)
    actors = ("ray::ServeReplica:", "ray::_Worker", "ray::PlainCount")
    left = [process for process in descendants(os.getpid()) if process.title.startswith(actors)]
    assert wait_until_gone(left, timeout_s=30) == []
    return ScoredFolder(photographs, dest, summary, progress)


def test_photographs_are_scored_and_the_rest_is_refused_with_its_reason(scored_folder: ScoredFolder) -> None:
    outcomes = rows(LocalStore(scored_folder.dest))
    assert {key: row["reason"] for key, row in outcomes.items() if row["status"] == "refused"} == POISON
    assert sum(row["status"] == "scored" for row in outcomes.values()) == GOOD
    assert all(row["attempts"] == 1 for row in outcomes.values())
    assert scored_folder.summary.counts.statuses == {"refused": 4, "scored": GOOD}
    assert not scored_folder.summary.complete
    assert scored_folder.progress[-1].done == scored_folder.progress[-1].total == GOOD + len(POISON)


def test_the_mask_holds_what_the_row_counts(scored_folder: ScoredFolder) -> None:
    dest = LocalStore(scored_folder.dest)
    for row in rows(dest).values():
        if row["status"] == "scored":
            with Image.open(io.BytesIO(dest.get(row["mask_key"]))) as mask:
                assert mask.mode == "1"
                assert np.asarray(mask).shape == (row["height"], row["width"])
                assert int(np.asarray(mask).sum()) == row["lesion_area_px"]
            assert row["lesion_count"] == len(row["lesions"])
            assert dest.get(row["overlay_key"]).startswith(b"\xff\xd8")
    assert sum(row["lesion_count"] or 0 for row in rows(dest).values()) == scored_folder.summary.counts.lesions > 0


def test_run_and_summary_say_what_was_done(scored_folder: ScoredFolder) -> None:
    run = json.loads((scored_folder.dest / "run.json").read_text())
    summary = json.loads((scored_folder.dest / "summary.json").read_text())
    assert run["source"] == str(scored_folder.source)
    assert run["versions"].keys() >= {"ma_cluster", "ray", "torch"}
    assert run["started"] <= run["finished"] == summary["finished"]
    assert summary["images"] == GOOD + len(POISON)
    assert summary["seconds"]["hgn"] == pytest.approx(
        sum(row["seconds_hgn"] or 0 for row in rows(LocalStore(scored_folder.dest)).values()), abs=0.01
    )


def test_status_needs_the_store_alone(scored_folder: ScoredFolder) -> None:
    status = read_status(str(scored_folder.dest)).to_json()
    assert (status["decided"], status["remaining"], status["eta_seconds"]) == (12, 0, 0.0)
    assert status["reasons"] == {"not_an_image": 2, "too_large": 1, "truncated": 1}
    assert list(missing_keys(str(scored_folder.dest))) == []


def test_a_finished_run_is_not_done_again(scored_folder: ScoredFolder, tiny_bundle: Path) -> None:
    before = parts(scored_folder.dest)
    began = time.monotonic()
    again = score_archive(str(scored_folder.source), str(scored_folder.dest), model=str(tiny_bundle))
    assert time.monotonic() - began < 5
    assert again == scored_folder.summary
    assert parts(scored_folder.dest) == before


def test_another_source_is_a_conflict(scored_folder: ScoredFolder, tiny_bundle: Path) -> None:
    with pytest.raises(RunConflictError, match="another source"):
        score_archive(str(scored_folder.source / "deep"), str(scored_folder.dest), model=str(tiny_bundle))


@pytest.mark.slow
def test_s3_gives_the_same_masks_as_a_folder(scored_folder: ScoredFolder, tiny_bundle: Path, weed: Weed) -> None:
    """Of the model, too: its replicas are given a URL and a digest, and no path."""
    source, dest, model = f"{weed.bucket('archive')}/2026", f"{weed.bucket('results')}/run", weed.bucket("models")
    digest = save_bundle(load_bundle(tiny_bundle), model)
    upload = open_store(source)
    for path in scored_folder.source.rglob("*.*"):
        upload.put(path.relative_to(scored_folder.source).as_posix(), path.read_bytes())
    summary = score_archive(source, dest, FLEET, model=model)
    assert summary.counts.statuses == scored_folder.summary.counts.statuses
    kept = Path(os.environ["MA_CLUSTER_CACHE"]) / "models" / digest
    assert {path.name for path in kept.glob("*.*s*")} == {"bundle.json", "hgn_1x.safetensors", "hgn_half.safetensors"}
    from_s3, local = open_store(dest), LocalStore(scored_folder.dest)
    assert masks(from_s3) == masks(local)
    differing = ("etag", "mask_key", "overlay_key")
    assert results(from_s3, *differing) == results(local, *differing)
    assert read_status(dest).counts.statuses == summary.counts.statuses


@pytest.mark.slow
def test_a_model_that_gives_no_numbers_fails_its_photographs_once_and_finds_no_healthy_eye(
    scored_folder: ScoredFolder, tiny_bundle: Path, tmp_path: Path
) -> None:
    """The weights are finite, so that nothing can be said before they are used."""
    model, bundle = tmp_path / "wild", load_bundle(tiny_bundle)
    half = {key: value * (1e38 if key.startswith("head") else 1) for key, value in bundle.weights["hgn_half"].items()}
    save_bundle(replace(bundle, weights=bundle.weights | {"hgn_half": half}), model)
    summary = score_archive(str(scored_folder.source), str(tmp_path / "dest"), FLEET, model=str(model))
    assert summary.counts.statuses == {"refused": 4, "failed": GOOD}
    failed = [row for row in rows(LocalStore(tmp_path / "dest")).values() if row["status"] == "failed"]
    assert {(row["reason"], row["attempts"]) for row in failed} == {("not_finite", 1)}


@pytest.mark.slow
def test_a_killed_segmenter_costs_its_photograph_one_attempt(
    scored_folder: ScoredFolder, tiny_bundle: Path, tmp_path: Path
) -> None:
    """By kill -9 of the replica while it has a photograph."""
    killed: list[int] = []

    def kill_once(progress: Progress) -> None:
        if not killed:
            time.sleep(0.3)  # into the next photograph
            killed.extend(process.pid for process in replicas("Segmenter"))
            os.kill(killed[0], signal.SIGKILL)

    score_archive(str(scored_folder.source), str(tmp_path), FLEET, model=str(tiny_bundle), on_progress=kill_once)
    assert len(killed) == 1
    undisturbed = results(LocalStore(scored_folder.dest), "attempts")
    assert results(LocalStore(tmp_path), "attempts") == undisturbed
    assert sum(row["attempts"] - 1 for row in rows(LocalStore(tmp_path)).values()) <= 1


@pytest.mark.slow
def test_a_stopped_segmenter_is_replaced_and_its_photograph_scored(
    scored_folder: ScoredFolder, tiny_bundle: Path, tmp_path: Path
) -> None:
    """By SIGSTOP of the replica while it has a photograph. It would never answer, and never end."""
    stopped: list[Process] = []

    def stop_once(progress: Progress) -> None:
        if not stopped:
            stopped.extend(replicas("Segmenter"))
            os.kill(stopped[0].pid, signal.SIGSTOP)

    fleet = replace(FLEET, stuck_after_s=6.0)
    score_archive(str(scored_folder.source), str(tmp_path), fleet, model=str(tiny_bundle), on_progress=stop_once)
    assert wait_until_gone(stopped, timeout_s=10) == []
    assert results(LocalStore(tmp_path), "attempts") == results(LocalStore(scored_folder.dest), "attempts")
    assert sum(row["attempts"] - 1 for row in rows(LocalStore(tmp_path)).values()) <= 1


@pytest.mark.slow
def test_a_destination_that_cannot_be_written_ends_the_run(
    scored_folder: ScoredFolder, tiny_bundle: Path, tmp_path: Path
) -> None:
    """As far as root can be refused: a file stands where the folder of masks should be."""
    (tmp_path / "masks").write_text("in the way")
    with pytest.raises(StoreError, match="cannot be written"):
        score_archive(str(scored_folder.source), str(tmp_path), FLEET, model=str(tiny_bundle))
    assert wait_until_gone(replicas(), timeout_s=30) == []


@pytest.mark.slow
def test_a_run_whose_driver_was_killed_goes_on_where_it_was(
    scored_folder: ScoredFolder, tiny_bundle: Path, tmp_path: Path
) -> None:
    """By kill -9 half-way. Committed parts stay as they are, and the end is that of an undisturbed run."""
    with driver_of(scored_folder, tmp_path, tiny_bundle) as process:
        wait_for_parts(tmp_path, 3, process)
        process.kill()
        assert process.wait(timeout=10) == -signal.SIGKILL
    before = parts(tmp_path)
    assert 3 <= len(before) < GOOD + len(POISON)
    assert read_status(str(tmp_path)).remaining == len(list(missing_keys(str(tmp_path)))) > 0
    score_archive(str(scored_folder.source), str(tmp_path), FLEET, model=str(tiny_bundle))
    after = parts(tmp_path)
    assert {name: after[name] for name in before} == before
    assert results(LocalStore(tmp_path)) == results(LocalStore(scored_folder.dest))
    assert masks(LocalStore(tmp_path)) == masks(LocalStore(scored_folder.dest))


@pytest.mark.slow
def test_sigterm_ends_the_driver_cleanly(scored_folder: ScoredFolder, tiny_bundle: Path, tmp_path: Path) -> None:
    """With exit status 143; nothing left running, what is committed stays."""
    with driver_of(scored_folder, tmp_path, tiny_bundle) as process:
        wait_for_parts(tmp_path, 1, process)
        family = descendants(process.pid)
        process.terminate()
        assert process.wait(timeout=60) == 143
        assert wait_until_gone(family, timeout_s=30) == []
    assert parts(tmp_path)
    assert not (tmp_path / "summary.json").exists()


def parts(dest: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time and bytes of each committed part."""
    found = {}
    for path in sorted((dest / "outcomes").glob("part-*")):
        found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
    return found


def driver_of(scored: ScoredFolder, dest: Path, model: Path) -> AbstractContextManager[subprocess.Popen[bytes]]:
    arguments = [str(scored.source), str(dest), "--model", str(model), "--threads", "1"]
    return driver(arguments, dest / "driver.log")


def wait_for_parts(dest: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while len(list((dest / "outcomes").glob("part-*"))) < count:
        assert process.poll() is None, (dest / "driver.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
