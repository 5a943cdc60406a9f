"""Comparing photographs from files and from a run: figures, pages, and what is said where nothing can be."""

from __future__ import annotations

import io
import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from moved_eyes import FIELD, Movement, two_shots
from PIL import Image

from ma_cluster.archive.outcomes import Outcome, identify
from ma_cluster.archive.plan import read_shard, shards
from ma_cluster.archive.run import begin_run, commit
from ma_cluster.archive.summary import open_run
from ma_cluster.config import ImageConfig
from ma_cluster.errors import ImageRefusedError, StoreError, Triage, UsageError
from ma_cluster.images.fundus import find_fov
from ma_cluster.images.quality import Quality
from ma_cluster.images.reading import Facts
from ma_cluster.images.sample import retina
from ma_cluster.lesions.detector import Detector
from ma_cluster.lesions.findings import Findings, Lesion
from ma_cluster.report.turnover import SCHEMA, _by_eye_and_visit, compare_files, turnover_of_run
from ma_cluster.storage.local import LocalStore
from ma_cluster.storage.manifest import Photographs

RETINA = retina()
FOV = find_fov(RETINA, ImageConfig())[0]


def jpeg(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=95)
    return out.getvalue()


@pytest.fixture(scope="module")
def shots() -> tuple[bytes, bytes]:
    first, second = two_shots(RETINA, RETINA, FOV, Movement(shift=(0.0, 0.1), degrees=4), np.random.default_rng(0))
    return jpeg(first), jpeg(second)


class Loads(HTMLParser):
    """What a page would load, and its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.circles: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "circle":
            self.circles.append(given["class"])
        self.found += [tag] if tag in ("script", "link", "iframe") else []
        self.found += [value[:16] for name, value in given.items() if name in ("src", "href")]


def lesion(row: float, col: float) -> Lesion:
    return Lesion(1, row, col, (0, 0, 1, 1), 30, 6.0, 0.9, 0.9, 0.9, 0.0)


def test_two_files_are_compared_on_a_page_that_loads_nothing(
    shots: tuple[bytes, bytes], tmp_path: Path, tiny_bundle: Path
) -> None:
    files = tmp_path / "<before>.jpg", tmp_path / "after.jpg"
    for file, data in zip(files, shots, strict=True):
        file.write_bytes(data)
    out = LocalStore(tmp_path / "out")
    values = compare_files(Detector.load(tiny_bundle).knowing(FIELD), (files[0], files[1]), 2.0, out)
    assert json.loads(out.get("compare.json")) == json.loads(json.dumps(values))
    assert values["registered"] and values["residual_px"] < 5 and values["years"] == 2.0
    page = out.get("compare.html").decode()
    assert Loads(page).found == ["data:image/jpeg;", "data:image/jpeg;"]
    assert "not a medical device" in page and "style=" not in page

    assert "&lt;before&gt;.jpg" in page and "<before>" not in page


def test_what_cannot_be_registered_has_no_rates_and_no_page(
    shots: tuple[bytes, bytes], tmp_path: Path, tiny_bundle: Path
) -> None:
    files = tmp_path / "left.jpg", tmp_path / "right.jpg"
    files[0].write_bytes(shots[0])
    files[1].write_bytes(jpeg(np.asarray(Image.open(io.BytesIO(shots[0])))[:, ::-1]))
    out = LocalStore(tmp_path / "out")
    values = compare_files(Detector.load(tiny_bundle).knowing(FIELD), (files[0], files[1]), 2.0, out)
    assert values["registered"] is False and "turnover_per_year" not in values
    assert [entry.key for entry in out.list()] == ["compare.json"]


@pytest.mark.parametrize("side", ["BEFORE", "AFTER"])
def test_a_photograph_that_cannot_be_scored_is_named_by_its_side(
    shots: tuple[bytes, bytes], tmp_path: Path, tiny_bundle: Path, side: str
) -> None:
    files = {"BEFORE": tmp_path / "one.jpg", "AFTER": tmp_path / "other.jpg"}
    for file in files.values():
        file.write_bytes(shots[0])
    files[side].write_bytes(b"<html>not found</html>")
    with pytest.raises(ImageRefusedError, match=f"^not_an_image: {side}: "):
        compare_files(Detector.load(tiny_bundle), (files["BEFORE"], files["AFTER"]), None, LocalStore(tmp_path / "out"))


def run_of(tmp_path: Path, shots: tuple[bytes, bytes], lines: list[str]) -> LocalStore:
    """A run whose photographs each have one lesion at the optic disc's rim, and the later ones one more."""
    archive, dest = LocalStore(tmp_path / "archive"), LocalStore(tmp_path / "dest")
    for name, data in zip(("early.jpg", "late.jpg"), shots, strict=True):
        archive.create(name, data)
    archive.put("list.csv", "\n".join(["key,patient,eye,visit,field_degrees", *lines]).encode())
    run = begin_run(Photographs(f"{archive.url}/list.csv", keep_ids=True).open(), dest, "model", "config")
    fov, quality = FOV, Quality(0.4, 0.1, 0.08, 0.02, 0.2, 0.9, True, ())
    for shard in shards(dest, run.plan):
        outcomes = []
        for entry in read_shard(dest, shard):
            found = (lesion(500.0, 500.0), *((lesion(300.0, 400.0),) if "late" in entry.key else ()))
            known: dict[str, Any] = {"facts": Facts(1, 1, fov, quality, {}), "identity": identify(entry, None, None)}
            known["findings"] = Findings(found, None, Triage.NONE)
            outcomes.append(Outcome(key=entry.key, etag=entry.etag, reason=None, attempts=1, **known))
        commit(dest, run, shard, outcomes)
    return dest


def test_a_run_that_knows_an_eye_at_two_visits_has_its_turnover(shots: tuple[bytes, bytes], tmp_path: Path) -> None:
    lines = [f"early.jpg,p,R,2023-01-01,{FIELD.degrees}", f"late.jpg,p,R,2024-01-01,{FIELD.degrees}"]
    dest = run_of(tmp_path, shots, lines)
    heard: list[dict[str, Any]] = []
    assert turnover_of_run(dest.url, heard.append) == f"{dest.url}/turnover.parquet"
    table = pq.read_table(Path(dest.url) / "turnover.parquet")
    assert table.schema.equals(SCHEMA)
    (row,) = table.to_pylist()
    assert (row["patient"], row["eye"], row["before"], row["after"]) == ("p", "R", "2023-01-01", "2024-01-01")
    assert row["registered"] and row["years"] == pytest.approx(1.0, abs=0.01)
    counts = [row[f"{name}_count"] for name in ("persisting", "new", "gone", "outside")]
    assert row["turnover_per_year"] == pytest.approx((counts[1] + counts[2]) / row["years"])
    assert len(heard) == 1 and 2 * counts[0] + sum(counts[1:]) == 3
    assert len(Loads(dest.get(row["page"]).decode()).circles) == 3


def test_a_photograph_that_is_gone_is_said_to_be_and_not_taken_for_another_eye(
    shots: tuple[bytes, bytes], tmp_path: Path
) -> None:
    dest = run_of(tmp_path, shots, ["early.jpg,p,R,2023-01-01,", "late.jpg,p,R,2024-01-01,"])
    (tmp_path / "archive" / "late.jpg").unlink()
    heard: list[dict[str, Any]] = []
    turnover_of_run(dest.url, heard.append)
    (row,) = pq.read_table(Path(dest.url) / "turnover.parquet").to_pylist()
    assert row["registered"] is False and row["new_count"] is None
    assert row["detail"] == heard[0]["detail"] == "1 of the visits' 2 photographs could not be read again"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has a file that opens and cannot be read")
def test_an_outage_of_the_source_ends_it_and_is_not_taken_for_another_eye(
    shots: tuple[bytes, bytes], tmp_path: Path
) -> None:
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "late.jpg").symlink_to("/proc/self/mem")
    dest = run_of(tmp_path, shots, ["early.jpg,p,R,2023-01-01,", "late.jpg,p,R,2024-01-01,"])
    with pytest.raises(StoreError, match="cannot be read"):
        turnover_of_run(dest.url, print)
    assert not (Path(dest.url) / "turnover.parquet").exists()


def test_visits_that_are_labels_have_no_order_and_are_not_compared(
    shots: tuple[bytes, bytes], tmp_path: Path, log_lines: list[str]
) -> None:
    dest = run_of(tmp_path, shots, ["early.jpg,p,R,visit 2,", "late.jpg,p,R,visit 10,"])
    with pytest.raises(UsageError, match="labels have no order"):
        turnover_of_run(dest.url, print)
    assert any("of 1 eyes, visits that are not YYYY-MM-DD are not compared" in line for line in log_lines)


def test_lesions_are_read_of_eyes_at_two_dates_alone(shots: tuple[bytes, bytes], tmp_path: Path) -> None:
    lines = ["early.jpg,p,R,2023-01-01,45", "late.jpg,p,R,2024-01-01,", f"{tmp_path}/archive/late.jpg,p,R,baseline,"]
    dest = run_of(tmp_path, shots, [*lines, f"{tmp_path}/archive/early.jpg,q,R,2023-01-01,"])
    found = _by_eye_and_visit(*open_run(dest.url))
    assert list(found) == [("p", "R")] and sorted(found["p", "R"]) == ["2023-01-01", "2024-01-01"]
    assert [len(own[0].lesions) for own in found["p", "R"].values()] == [1, 2]


def test_a_run_without_two_visits_says_what_it_needs(shots: tuple[bytes, bytes], tmp_path: Path) -> None:
    dest = run_of(tmp_path, shots, ["early.jpg,p,R,2023-01-01,", "late.jpg,p,L,2024-01-01,"])
    with pytest.raises(UsageError, match="two visits"):
        turnover_of_run(dest.url, print)
