"""Tiles, outlines and thumbnails of a photograph."""

from __future__ import annotations

import threading

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from photographs import encode, fundus_photograph, noise_photograph
from review_runs import dotted

from ma_cluster.config import DetectorConfig, ImageConfig
from ma_cluster.images.fundus import Fov
from ma_cluster.images.reading import enhance
from ma_cluster.lesions.findings import find_lesions
from ma_cluster.review.pictures import TILE_PX, Kept, View, build_pyramid, outlines, thumbnail


def whole(pyramid: object, view: View, level: int) -> np.ndarray:
    """A level put together from its tiles."""
    height, width = pyramid.levels[level].shape[:2]  # type: ignore[attr-defined]
    rows = []
    for row in range(-(-height // TILE_PX)):
        cols = range(-(-width // TILE_PX))
        tiles = [pyramid.tile(view, level, col, row) for col in cols]  # type: ignore[attr-defined]
        colours = "GRAY" if view is View.RED_FREE else "RGB"
        rows.append(np.concatenate([simplejpeg.decode_jpeg(tile, colours) for tile in tiles], axis=1))
    return np.concatenate(rows)


@settings(deadline=None, max_examples=6)
@given(st.integers(1, 1400), st.integers(1, 1400))
def test_tiles_put_together_are_the_level_and_the_first_level_is_one_tile(height: int, width: int) -> None:
    pixels = noise_photograph((height, width))
    pyramid = build_pyramid(pixels, Fov(height / 2, width / 2, float(min(height, width))))
    assert max(pyramid.levels[0].shape[:2]) <= TILE_PX
    assert pyramid.levels[-1] is pixels
    for level, expected in enumerate(pyramid.levels):
        found = whole(pyramid, View.COLOUR, level)
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).mean() < 8  # grey levels of noise in a JPEG
    for place in ((-1, 0), (0, -1), (99, 0), (0, 99)):
        with pytest.raises(IndexError):
            pyramid.tile(View.COLOUR, 0, *place)


def test_the_enhanced_view_is_what_the_networks_see_without_seams() -> None:
    side = 1200
    pixels, _ = dotted(side, 20)
    fov = Fov(side / 2, side / 2, side - 20.0)
    rows, cols = np.indices((side, side))
    disc = np.hypot(rows - fov.row, cols - fov.col) <= fov.diameter_px / 2
    config = ImageConfig()
    expected = enhance(pixels, disc, config.sigma_ratio * fov.diameter_px, config.contrast_gain)
    found = whole(build_pyramid(pixels, fov), View.ENHANCED, 2)
    inner = np.hypot(rows - fov.row, cols - fov.col) <= fov.diameter_px / 2 - 4
    assert np.abs(found.astype(int) - expected)[inner].mean() < 4
    assert found[~disc].mean() < 3


def test_the_red_free_view_uses_all_grey_levels_of_the_green_channel() -> None:
    fov = Fov(450.0, 450.0, 880.0)
    found = whole(build_pyramid(fundus_photograph((900, 900), fov), fov), View.RED_FREE, 1)
    inside = found[450 - 300 : 450 + 300, 450 - 300 : 450 + 300]
    assert np.ptp(inside) > 200


def test_an_outline_surrounds_its_lesion_and_no_other() -> None:
    _, mask = dotted(600, 12)
    lesions, _ = find_lesions(
        mask.astype(np.float32), None, 1.0, Fov(300.0, 300.0, 590.0), DetectorConfig(threshold=0.5)
    )
    rows = [{"bbox": list(lesion.bbox)} for lesion in lesions]
    for lesion, outline in zip(lesions, outlines(mask, rows), strict=True):
        inside = np.zeros(mask.shape, np.uint8)
        cv2.fillPoly(inside, [np.array(outline)[:, ::-1]], 1)
        top, left, bottom, right = lesion.bbox
        assert inside[top:bottom, left:right][mask[top:bottom, left:right]].all()
        assert (mask & (inside > 0)).sum() == lesion.area_px


def test_a_thumbnail_is_small_and_keeps_its_shape() -> None:
    small = simplejpeg.decode_jpeg(thumbnail(encode(noise_photograph((900, 1400)), "JPEG")))
    assert small.shape == (165, 256, 3)
    with pytest.raises(ValueError):
        thumbnail(b"no jpeg")


def test_what_is_kept_is_made_once_and_bounded() -> None:
    made: list[str] = []
    kept: Kept[bytes] = Kept(100, len)

    def make(name: str) -> bytes:
        made.append(name)
        return bytes(40)

    threads = [threading.Thread(target=kept.get, args=("a", lambda: make("a"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["a"]
    for name in ("b", "a", "c"):  # `b` has been unused for longest
        kept.get(name, lambda name=name: make(name))
    kept.get("a", lambda: make("a again"))
    kept.get("b", lambda: make("b again"))
    assert made == ["a", "b", "c", "b again"]
    assert len(kept.get("vast", lambda: bytes(1000))) == 1000


def test_a_failure_is_not_kept() -> None:
    kept: Kept[bytes] = Kept(100, len)
    with pytest.raises(ZeroDivisionError):
        kept.get("a", lambda: bytes(1 // 0))
    assert kept.get("a", lambda: b"x") == b"x"
