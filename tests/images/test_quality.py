"""Gradability: what is lost of a photograph is told, what light alone takes away is given back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from photographs import encode, idrid_folder
from PIL import Image, ImageDraw, ImageFont

from ma_cluster.config import ImageConfig
from ma_cluster.errors import Flag, ImageRefusedError, Reason
from ma_cluster.images.decode import decode
from ma_cluster.images.quality import Quality, exposure_gain, has_text
from ma_cluster.images.reading import Prepared, read_bytes, read_photograph, read_pixels
from ma_cluster.images.sample import retina
from ma_cluster.storage.local import LocalStore

CONFIG = ImageConfig()
RETINA = retina()


def quality(pixels: np.ndarray, config: ImageConfig = CONFIG) -> Quality:
    return read_pixels(np.ascontiguousarray(pixels.astype(np.uint8)), config)[1].quality


def gain(found: Quality) -> float:
    return exposure_gain(found.brightness, found.vessel_contrast, CONFIG)


def hazy(pixels: np.ndarray, share: float) -> np.ndarray:
    inside = pixels.max(axis=2, keepdims=True) > 30
    return np.where(inside, pixels * share + 160 * (1 - share), pixels)


def test_a_good_photograph_is_gradable_and_told_of_its_field_alone() -> None:
    found = quality(RETINA)
    assert found.gradable and found.score >= 0.5 and found.flags == (Flag.FIELD_ASSUMED,)
    assert gain(found) == 1


@pytest.mark.parametrize("share", [0.5, 0.35])
def test_half_the_light_is_given_back(share: float) -> None:
    whole, dim = (read_pixels(pixels, CONFIG)[0] for pixels in (RETINA, (RETINA * share).astype(np.uint8)))
    ratio = whole.quality.vessel_contrast / CONFIG.vessel_contrast
    assert gain(dim.quality) * share * ratio == pytest.approx(1, abs=0.1)
    assert spread(dim) * ratio == pytest.approx(spread(whole), rel=0.12)


def spread(prepared: Prepared) -> float:
    """Standard deviation of the enhanced green channel, the rim left out."""
    inner = cv2.erode(prepared.fov_half.astype(np.uint8), np.ones((25, 25), np.uint8)) > 0
    return float(prepared.enhanced_half[inner, 1].astype(float).std())


@pytest.mark.parametrize(
    ("degraded", "flag"),
    [
        (RETINA * 0.12, Flag.DARK),
        (hazy(RETINA, 0.15), Flag.HAZY),
        (cv2.GaussianBlur(RETINA, (0, 0), 8), Flag.BLURRED),
        (cv2.resize(RETINA, (400, 400), interpolation=cv2.INTER_AREA), Flag.COARSE),
        (decode(encode(RETINA, "JPEG", quality=10), CONFIG).pixels, Flag.COARSE),
        (np.clip(RETINA.astype(float) * 4, 0, 255), Flag.BRIGHT),
    ],
)
def test_what_cannot_be_judged_is_called_by_its_name(degraded: np.ndarray, flag: Flag) -> None:
    found = quality(degraded)
    assert not found.gradable and found.score < 0.5
    assert flag in found.flags and found.detail is not None


def test_the_score_falls_with_every_step_of_blur() -> None:
    blurred = [quality(cv2.GaussianBlur(RETINA, (0, 0), sigma)) for sigma in (1, 2, 4, 8)]
    for scores in ([each.focus for each in blurred], [each.sharpness for each in blurred[:3]]):
        assert scores == sorted(scores, reverse=True)


def test_two_discs_are_told_and_none_alone_is_clean() -> None:
    pair = np.pad(np.hstack([RETINA, RETINA[:, ::-1]])[::2, ::2], ((20, 20), (20, 20), (0, 0)))
    found = quality(pair)
    assert Flag.MORE_DISCS in found.flags and not found.gradable


def test_a_grey_photograph_is_told() -> None:
    assert Flag.RED_FREE in quality(np.repeat(RETINA[:, :, 1:2], 3, axis=2)).flags


def test_swapped_channels_are_told() -> None:
    assert Flag.RED_FREE in quality(RETINA[:, :, ::-1]).flags


def test_pages_and_field_are_told_from_what_is_known() -> None:
    quarter = RETINA[::4, ::4]
    data = encode(RETINA, "MPO", quality=95, save_all=True, append_images=[Image.fromarray(quarter)])
    _, facts = read_bytes(data, replace(CONFIG, field_degrees=45.0))
    assert facts.quality.flags == (Flag.MORE_PAGES,)


def test_the_scale_is_pixels_for_each_degree() -> None:
    wide, usual = (read_pixels(RETINA, replace(CONFIG, field_degrees=degrees))[0] for degrees in (60.0, 50.0))
    assert wide.grid.scale / usual.grid.scale == pytest.approx(1.2, rel=0.01)
    with pytest.raises(ImageRefusedError, match="ultra-widefield") as caught:
        read_pixels(RETINA, replace(CONFIG, field_degrees=200.0))
    assert caught.value.reason is Reason.UNSUPPORTED


def test_what_its_owner_knows_of_a_photograph_decides_how_it_is_read(tmp_path: Path) -> None:
    folder = LocalStore(tmp_path)
    folder.put("eye.png", encode(RETINA, "PNG"))
    entry = folder.head("eye.png")
    for known, degrees in ((entry, 50.0), (replace(entry, field_degrees=45.0), 45.0)):
        _, facts = read_photograph(folder, known, CONFIG, lambda data: decode(data, CONFIG))
        assert (facts.fov.degrees, Flag.FIELD_ASSUMED in facts.quality.flags) == (degrees, known is entry)
    with pytest.raises(ImageRefusedError, match="line 3") as caught:
        read_photograph(folder, replace(entry, fault="line 3"), CONFIG, lambda data: decode(data, CONFIG))
    assert caught.value.reason is Reason.UNSUPPORTED


@pytest.mark.parametrize(
    ("text", "share", "colour"),
    [
        ("12.03.1961", 1 / 60, (255, 255, 255)),
        ("DOE^JOHN", 1 / 25, (0, 255, 0)),
        ("ID 4711 OD", 1 / 16, (255, 255, 0)),
    ],
)
def test_text_is_told_in_a_corner_and_on_the_retina(text: str, share: float, colour: tuple[int, int, int]) -> None:
    side = len(RETINA)
    for row, col in ((0.02, 0.02), (0.9, 0.02), (0.45, 0.4)):
        written = Image.fromarray(RETINA)
        font = ImageFont.load_default(share * side)
        ImageDraw.Draw(written).text((col * side, row * side), text, fill=colour, font=font)
        assert has_text(decode(encode(written, "JPEG", quality=85), CONFIG).pixels)


def test_what_is_told_of_text_is_a_flag_and_costs_no_verdict() -> None:
    written = Image.fromarray(RETINA)
    ImageDraw.Draw(written).text((20, 20), "12.03.1961", fill=(255, 255, 255), font=ImageFont.load_default(40))
    found = quality(np.asarray(written))
    assert (found.gradable, Flag.BURNT_IN_TEXT in found.flags, "text is written" in str(found.detail)) == (True,) * 3


@pytest.mark.parametrize("seed", range(2))
def test_bright_spots_frames_and_labels_are_no_text(seed: int) -> None:
    rng, drawn = np.random.default_rng(seed), RETINA.copy()
    for row, col, radius in zip(*rng.integers(300, 1100, (2, 40)), rng.integers(3, 25, 40), strict=True):
        cv2.circle(drawn, (int(col), int(row)), int(radius), (255, 250, 200), -1)
    cv2.rectangle(drawn, (0, 0), (1410, 1410), (255, 255, 255), 5)
    cv2.rectangle(drawn, (1200, 20), (1390, 160), (255, 255, 255), -1)
    assert not has_text(drawn)


def test_photographs_without_text_have_none() -> None:
    folder = idrid_folder()
    paths = [*sorted(folder.rglob("IDRiD_0[12].jpg")), *sorted((folder.parent / "hrf_healthy").glob("0[12]_h.jpg"))]
    assert len(paths) >= 2
    assert [path.name for path in paths if has_text(decode(path.read_bytes(), CONFIG).pixels)] == []
