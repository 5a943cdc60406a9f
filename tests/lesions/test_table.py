"""Lesions measured on arrays small enough to write out; and how they are shown."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ma_cluster.config import DetectorConfig
from ma_cluster.images.fundus import Fov, Grid
from ma_cluster.lesions.findings import OUTLINE_RGB, draw_overlay, encode_mask, encode_overlay, find_lesions

CONFIG = DetectorConfig(threshold=0.5)
FOV = Fov(row=3.0, col=4.0, diameter_px=10.0)


def test_a_lesion_is_measured_in_pixels_of_the_photograph():
    probability = np.zeros((8, 10), np.float32)
    probability[2:4, 5:8] = 0.6
    probability[3, 7] = 0.9
    (lesion,), mask = find_lesions(probability, None, 2.0, FOV, CONFIG)
    assert (lesion.row, lesion.col) == (2.5, 6.0)
    assert lesion.bbox == (2, 5, 4, 8)
    assert lesion.area_px == 6 == mask.sum()
    assert lesion.diameter_px == pytest.approx(2 * np.sqrt(6 / np.pi))
    assert lesion.score_max == pytest.approx(0.9)
    assert lesion.score_mean == pytest.approx((5 * 0.6 + 0.9) / 6)
    assert lesion.fov_distance_px == pytest.approx(np.hypot(0.5, 2.0))


def test_lesions_are_numbered_from_the_surest_and_specks_are_dropped_from_mask_and_table():
    probability = np.zeros((8, 10), np.float32)
    probability[0, 0:2] = 0.7
    probability[6, 4:7] = 0.8
    probability[3, 3] = 0.99
    lesions, mask = find_lesions(probability, None, 2.0, FOV, CONFIG)
    assert [(lesion.id, lesion.row) for lesion in lesions] == [(1, 6.0), (2, 0.0)]
    assert not mask[3, 3]


def test_pixels_that_touch_at_a_corner_are_one_lesion():
    probability = np.zeros((8, 10), np.float32)
    probability[2, 2] = probability[3, 3] = 0.7
    lesions, _ = find_lesions(probability, None, 2.0, FOV, CONFIG)
    assert [lesion.area_px for lesion in lesions] == [2]


def test_the_threshold_itself_counts_as_lesion():
    probability = np.full((8, 10), 0.5, np.float32)
    lesions, _ = find_lesions(probability, None, 2.0, FOV, CONFIG)
    assert [lesion.area_px for lesion in lesions] == [80]


def test_a_place_without_a_sure_pixel_is_outlined_but_not_called():
    probability = np.zeros((8, 10), np.float32)
    probability[0:2, 0:3] = 0.7
    probability[5:7, 4:7] = 0.6
    probability[6, 5] = 0.9
    sensitive, _ = find_lesions(probability, None, 2.0, FOV, CONFIG)
    default, mask = find_lesions(probability, None, 2.0, FOV, replace(CONFIG, least_score=0.8))
    assert (
        [(lesion.id, lesion.row) for lesion in default]
        == [(1, 5.5)]
        == [(lesion.id, lesion.row) for lesion in sensitive[:1]]
    )
    assert len(sensitive) == 2 and mask.sum() == 6


def test_a_judge_of_candidates_decides_what_is_called_where_there_is_one():
    probability, judged = np.zeros((8, 10), np.float32), np.zeros((8, 10), np.float32)
    probability[0:2, 0:3] = 0.95
    probability[5:7, 4:7] = 0.6
    judged[0:3, 0:3] = 0.3
    judged[4:6, 4:5] = 0.7
    (called,), mask = find_lesions(probability, judged, 2.0, FOV, replace(CONFIG, least_score=0.5))
    assert (called.row, called.score) == (5.5, pytest.approx(0.7))
    assert called.score_max == pytest.approx(0.6)
    assert mask.sum() == 6


def test_no_lesion_gives_an_empty_table():
    lesions, mask = find_lesions(np.zeros((8, 10), np.float32), None, 2.0, FOV, CONFIG)
    assert lesions == ()
    assert not mask.any()


def test_positions_go_back_through_the_grid():
    # the photograph's box at (2, 4) is seen at twice its size
    grid = Grid(top=2, left=4, height=8, width=10, canonical_height=16, canonical_width=20)
    probability = np.zeros((16, 20), np.float32)
    probability[4:8, 6:10] = 1.0
    (lesion,), mask = find_lesions(grid.uncrop(probability, (20, 30)), None, 2.0, FOV, CONFIG)
    assert (lesion.row, lesion.col) == (2 + 2.5, 4 + 3.5)
    assert lesion.area_px == 4
    assert mask.shape == (20, 30)


def test_a_lesion_is_outlined_but_none_of_its_pixels_is_hidden():
    pixels = np.full((300, 300, 3), 90, np.uint8)
    mask = np.zeros((300, 300), bool)
    mask[100:112, 150:165] = True
    overlay = draw_overlay(pixels, mask)
    assert (overlay[mask] == 90).all()
    coloured = np.abs(overlay.astype(int) - OUTLINE_RGB).max(axis=2) < 60  # a smoothed line
    assert coloured.sum() > 40
    assert (pixels == 90).all()


def test_without_lesions_the_overlay_is_the_photograph():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    assert (draw_overlay(pixels, np.zeros((60, 70), bool)) == pixels).all()


def test_a_mask_survives_its_png_and_takes_one_bit_a_pixel():
    mask = np.random.default_rng(0).random((123, 77)) < 0.2
    with Image.open(io.BytesIO(encode_mask(mask))) as image:
        assert image.mode == "1"
        assert (np.asarray(image) == mask).all()


def test_an_overlay_is_a_jpeg_of_the_photographs_size():
    pixels = np.full((60, 70, 3), 90, np.uint8)
    with Image.open(io.BytesIO(encode_overlay(pixels, np.zeros((60, 70), bool)))) as image:
        assert (image.format, image.size) == ("JPEG", (70, 60))
