"""Photographs as cameras and hospitals give them: read right, or refused for their true cause, by every command.

With the model that ships, on a photograph of IDRiD's where its folder is at hand, lesions are compared, too.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from archive_runs import rows
from odd_inputs import Odd, odd_photographs, reduced
from photographs import idrid_folder

from ma_cluster.config import ImageConfig
from ma_cluster.errors import Flag, ImageRefusedError, Status
from ma_cluster.images.decode import decode
from ma_cluster.images.reading import Facts, Prepared, read_bytes
from ma_cluster.images.sample import retina
from ma_cluster.lesions.detector import Detector
from ma_cluster.report.detections import detect_file
from ma_cluster.storage.local import LocalStore

CONFIG = ImageConfig()
KINDS = odd_photographs(reduced(retina(), 1000))
ALWAYS = frozenset({Flag.FIELD_ASSUMED})


def read(name: str) -> tuple[Prepared, Facts]:
    return read_bytes(KINDS[name].data, CONFIG)


@pytest.fixture(scope="module")
def references() -> dict[str, Prepared]:
    return {name: read(name)[0] for name in {kind.like for kind in KINDS.values() if kind.like}}


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.reason])
def test_what_cannot_be_read_is_refused_for_its_true_cause(name: str) -> None:
    with pytest.raises(ImageRefusedError) as caught:
        read(name)
    assert caught.value.reason is KINDS[name].reason
    assert re.search(KINDS[name].says, caught.value.detail)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.reason])
def test_what_can_be_read_is_read_right_and_judged(name: str, references: dict[str, Prepared]) -> None:
    kind = KINDS[name]
    prepared, facts = read(name)
    assert set(facts.quality.flags) >= kind.flags | ALWAYS
    assert facts.quality.gradable == kind.gradable
    assert facts.quality.detail
    if kind.like:
        other = references[kind.like]
        assert prepared.fov.diameter_px == pytest.approx(other.fov.diameter_px, rel=0.01)
        size = other.enhanced_half.shape[1], other.enhanced_half.shape[0]  # a pixel or two apart
        apart = cv2.resize(prepared.enhanced_half, size).astype(int) - other.enhanced_half
        assert np.abs(apart)[other.fov_half].mean() < 4


def test_a_drawing_over_the_rim_does_not_move_the_disc(references: dict[str, Prepared]) -> None:
    found, whole = read("label_rim.png")[0].fov, references["base.png"].fov
    assert found.diameter_px == pytest.approx(whole.diameter_px, rel=0.03)
    assert np.hypot(found.row - whole.row, found.col - whole.col) < 0.02 * whole.diameter_px


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """All kinds in a folder, with what Windows, macOS and a NAS leave in one."""
    folder = LocalStore(tmp_path_factory.mktemp("odd"))
    for name, kind in KINDS.items():
        folder.put(name, kind.data)
    for name in (".DS_Store", "._base.jpg", "Thumbs.db", "desktop.ini", "@eaDir/base.jpg/SYNOPHOTO_THUMB_XL.jpg"):
        folder.put(name, KINDS["base.jpg"].data)
    return folder


def detected(detector: Detector, folder: LocalStore, kinds: dict[str, Odd]) -> dict[str, dict[str, Any]]:
    """What `detect` writes of each kind."""
    found = {}
    for name in kinds:
        out = LocalStore(folder.root / ".out" / name)
        detect_file(detector, Path(folder.url, name), out)
        found[name] = json.loads(out.get(f"{Path(name).stem}.json"))
    return found


@pytest.mark.slow
def test_detect_and_score_say_the_same_of_every_kind(
    archive: LocalStore, tiny_bundle: Path, local_ray: None, tmp_path: Path
) -> None:
    from ma_cluster.cluster.fleet.driver import score_archive

    summary = score_archive(archive.url, str(tmp_path / "run"), model=str(tiny_bundle))
    assert (summary.run.plan.images, summary.run.plan.skipped) == (len(KINDS), 5)
    outcomes, single = rows(LocalStore(tmp_path / "run")), detected(Detector.load(tiny_bundle), archive, KINDS)
    for name, kind in KINDS.items():
        row, one = outcomes[name], single[name]
        assert row["status"] == one["status"] == (Status.REFUSED if kind.reason else Status.SCORED), name
        assert row["detail"] == one["detail"]
        if kind.reason:
            assert row["reason"] == one["reason"] == kind.reason
        else:
            assert (row["flags"], row["gradable"]) == (one["flags"], one["gradable"])
            assert row["lesion_count"] == len(one["lesions"])


@pytest.mark.long
def test_lesions_are_those_of_the_photograph_or_a_person_is_told(tmp_path: Path) -> None:
    (path,) = idrid_folder().rglob("IDRiD_45.jpg")
    kinds = odd_photographs(reduced(decode(path.read_bytes(), CONFIG).pixels, 1000))
    for name, kind in kinds.items():
        LocalStore(tmp_path).put(name, kind.data)
    found = detected(Detector.load("lite"), LocalStore(tmp_path), kinds)
    for name, kind in kinds.items():
        assert found[name].get("reason") == kind.reason, name
        if kind.reason is None:
            assert set(found[name]["flags"]) >= kind.flags | ALWAYS, name
            assert found[name]["gradable"] == kind.gradable, name
        if kind.like:
            wanted = len(found[kind.like]["lesions"])
            assert abs(len(found[name]["lesions"]) - wanted) <= max(2, 0.2 * wanted), name
