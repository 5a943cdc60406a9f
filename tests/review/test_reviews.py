"""What follows from reviews: masks, agreement, and data that training takes as it is."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from review_runs import small_run

from ma_cluster.archive.run import Run, read_run
from ma_cluster.cli import main
from ma_cluster.config import SplitConfig
from ma_cluster.errors import StoreError, UsageError
from ma_cluster.images.datasets import decode_mask, read_dataset, read_graded, read_object
from ma_cluster.lesions.findings import encode_mask
from ma_cluster.review.events import Event, Kind, append
from ma_cluster.review.export import _annotations, consensus, export_reviews
from ma_cluster.review.reviews import MODEL, compare_reviews, read_reviews
from ma_cluster.storage.local import LocalStore

SQUARE = [(20.0, 30.0), (20.0, 40.0), (28.0, 40.0), (28.0, 30.0)]


class Grader:
    """Says things about photographs of a run."""

    _clock = 0

    def __init__(self, dest: LocalStore, name: str) -> None:
        self.dest, self.name, self.run = dest, name, the_run(dest)

    def say(self, key: str, kind: str, **said: Any) -> None:
        Grader._clock += 1
        stamp = f"20261127T12{Grader._clock // 60:02d}{Grader._clock % 60:02d}.000Z"
        known = {"id": f"{Grader._clock:016x}", "at": stamp, "reviewer": self.name, "run": self.run.id, "key": key}
        append(self.dest, Event(**known, kind=Kind(kind), **said))


def the_run(dest: LocalStore) -> Run:
    run = read_run(dest)
    assert run is not None
    return run


@pytest.fixture
def dest(tmp_path: Path) -> Iterator[LocalStore]:
    """eye-0, -1, -2 with 2, 4, 6 lesions. ada has done all; bob the first two, and sees one lesion less on eye-1."""
    store = small_run(tmp_path)
    ada, bob = Grader(store, "ada"), Grader(store, "bob")
    ada.say("eye-0.jpg", "reject", lesion=1)
    ada.say("eye-0.jpg", "reject", lesion=2)
    ada.say("eye-0.jpg", "grade", grade="none")
    ada.say("eye-1.jpg", "draw", polygon=SQUARE)
    ada.say("eye-1.jpg", "grade", grade="mild")
    ada.say("eye-2.jpg", "grade", grade="ungradable")
    bob.say("eye-0.jpg", "reject", lesion=1)
    bob.say("eye-0.jpg", "reject", lesion=2)
    bob.say("eye-0.jpg", "grade", grade="none")
    bob.say("eye-1.jpg", "reject", lesion=3)
    bob.say("eye-1.jpg", "grade", grade="moderate")
    for grader, photographs in ((ada, 3), (bob, 2)):
        for number in range(photographs):
            grader.say(f"eye-{number}.jpg", "done")
    return store


def test_a_mask_is_the_models_without_what_was_rejected_and_with_what_was_drawn(dest: LocalStore) -> None:
    reviewed = {each.row["key"]: each for each in read_reviews(dest, the_run(dest))}
    eye = reviewed["eye-1.jpg"]
    ada, bob = (eye.mask(eye.standings[name]) for name in ("ada", "bob"))
    drawn = np.zeros_like(ada)
    drawn[20:29, 30:41] = True
    assert (ada == eye.model | drawn).all()
    lost = eye.row["lesions"][2]
    assert (eye.model & ~bob).sum() == lost["area_px"]
    assert (bob & ~eye.model).sum() == 0


def test_reviewers_agree_with_each_other_and_with_the_model_as_far_as_they_do(dest: LocalStore) -> None:
    found = compare_reviews(dest, the_run(dest))
    assert found["reviewers"]["ada"] == {"done": 3, "graded": 3, "accepted": 0, "rejected": 2, "drawn": 1}
    pairs = {(pair["one"], pair["other"]): pair for pair in found["pairs"]}
    both = pairs["ada", "bob"]
    assert (both["photographs"], both["graded"], both["triage_kappa"]) == (2, 2, 1.0)
    assert both["lesion_f1"] == pytest.approx(2 * 3 / (5 + 3))
    assert both["grade_kappa"] == pytest.approx(1 - 1 / 3)
    # bob keeps 3 of the model's 6 lesions on the photographs that he has done
    assert pairs["bob", MODEL]["lesion_f1"] == pytest.approx(2 * 3 / (3 + 6))
    assert pairs["ada", MODEL]["photographs"] == 3
    assert pairs["ada", MODEL]["grade_kappa"] is None


def test_what_is_exported_is_a_data_set(dest: LocalStore, tmp_path: Path) -> None:
    out = LocalStore(tmp_path / "out")
    done = export_reviews(dest, the_run(dest), out)
    assert (done.photographs, done.with_lesions, done.ungradable, done.unfinished) == (2, 1, 1, 0)
    samples = {sample.name: sample for sample in read_dataset(f"{out.url}/manifest.csv", SplitConfig())}
    assert (samples["eye-0"].label, samples["eye-0"].mask) == ("healthy", None)
    sample = samples["eye-1"]
    assert cv2.imdecode(np.frombuffer(read_object(sample.image), np.uint8), cv2.IMREAD_COLOR).shape == (700, 700, 3)
    assert sample.mask is not None
    mask = decode_mask(read_object(sample.mask))
    assert mask[20:29, 30:41].all()  # one of two who drew it is half
    graded = read_graded(f"{out.url}/grades.csv", SplitConfig())
    assert {each.name: each.grade for each in graded} == {"eye-0": 0, "eye-1": 1}
    assert {each.name: each.split for each in graded} == {name: sample.split for name, sample in samples.items()}
    coco = json.loads(out.get("coco.json"))
    assert [image["file_name"] for image in coco["images"]] == ["eye-0.jpg", "eye-1.jpg"]
    assert sum(annotation["area"] for annotation in coco["annotations"]) == mask.sum()
    rows = list(csv.DictReader(io.StringIO(out.get("lesions.csv").decode())))
    assert [row["verdict"] for row in rows if row["photograph"] == "eye-1.jpg" and row["reviewer"] == "bob"] == [
        "accepted", "accepted", "rejected", "accepted",
    ]  # fmt: skip
    again = export_reviews(dest, the_run(dest), out, ["bob"])
    assert (again.photographs, again.lesions) == (2, 3)


@pytest.mark.parametrize("name", ["manifest.csv", "grades.csv", "lesions.csv", "coco.json"])
def test_an_export_replaces_nothing_but_an_export(dest: LocalStore, tmp_path: Path, name: str) -> None:
    out = LocalStore(tmp_path / "out")
    out.put(name, b"[]")
    with pytest.raises(UsageError, match=f"{name} of --export is of no earlier export"):
        export_reviews(dest, the_run(dest), out)
    assert [(entry.key, out.get(entry.key)) for entry in out.list()] == [(name, b"[]")]


@pytest.mark.parametrize("other", [b"<html>", encode_mask(np.ones((40, 50), dtype=bool))], ids=["none", "another"])
def test_a_mask_that_is_not_the_photographs_is_named(dest: LocalStore, other: bytes) -> None:
    key = next(iter(read_reviews(dest, the_run(dest)))).row["mask_key"]
    dest.put(key, other)
    with pytest.raises(StoreError, match=f"^masks/\\*-{key.rpartition('-')[2]} of the destination: .*restore it"):
        list(read_reviews(dest, the_run(dest)))


def test_nothing_is_exported_of_what_nobody_has_done(tmp_path: Path) -> None:
    dest, out = small_run(tmp_path), LocalStore(tmp_path / "out")
    with pytest.raises(UsageError, match="no reviews"):
        export_reviews(dest, the_run(dest), out)
    Grader(dest, "ada").say("eye-0.jpg", "accept", lesion=1)
    with pytest.raises(UsageError, match="no photograph is done"):
        export_reviews(dest, the_run(dest), out)


def test_a_key_that_a_spreadsheet_would_run_is_text(dest: LocalStore, tmp_path: Path) -> None:
    Grader(dest, "ada").say("eye-0.jpg", "note", note="=HYPERLINK(1)")
    out = LocalStore(tmp_path / "out")
    export_reviews(dest, the_run(dest), out)
    assert "'=HYPERLINK(1)" in out.get("lesions.csv").decode()


def test_a_grade_without_microaneurysms_is_no_healthy_photograph(tmp_path: Path) -> None:
    dest, out = small_run(tmp_path), LocalStore(tmp_path / "out")
    grader = Grader(dest, "ada")
    for lesion in (1, 2):
        grader.say("eye-0.jpg", "reject", lesion=lesion)
    grader.say("eye-0.jpg", "grade", grade="severe")
    grader.say("eye-0.jpg", "done")
    export_reviews(dest, the_run(dest), out)
    (sample,) = read_dataset(f"{out.url}/manifest.csv", SplitConfig())
    assert sample.label == "lesion"
    assert sample.mask is not None
    assert not decode_mask(read_object(sample.mask)).any()


def test_the_command_tells_agreement_and_where_the_data_are(
    dest: LocalStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(["reviews", dest.url, "--export", str(out)])
    said = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert said[0] == "ada: 3 photographs done, 3 graded; lesions: 0 accepted, 2 rejected, 1 drawn"
    assert "ada and bob: lesion F1 0.750 on 2 photographs, grade kappa 0.667 on 2, triage kappa 1.000 on 2" in said
    assert said[-1] == f"{out}/manifest.csv"
    with pytest.raises(SystemExit):
        main(["reviews", dest.url, "--json"])
    assert json.loads(capsys.readouterr().out)["reviewers"]["bob"]["done"] == 2


@given(st.lists(arrays(np.bool_, (3, 4)), min_size=1, max_size=5))
def test_a_pixel_is_a_lesion_where_at_least_half_say_so(masks: list[np.ndarray]) -> None:
    assert (consensus(masks) == (np.mean(masks, axis=0) >= 0.5)).all()


@given(arrays(np.bool_, (6, 7)))
def test_a_polygon_of_coco_has_the_area_of_its_lesion_where_that_has_no_hole(mask: np.ndarray) -> None:
    for annotation in _annotations(mask):
        left, top, width, height = annotation["bbox"]
        corners = np.array(annotation["segmentation"][0]).reshape(-1, 2)
        assert corners.min(axis=0).tolist() == pytest.approx([left, top], abs=0.3)
        assert corners.max(axis=0).tolist() == pytest.approx([left + width, top + height], abs=0.3)
