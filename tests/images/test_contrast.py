"""Contrast enhancement: even light becomes mid-grey, lesions keep their sign and gain, the surround leaks nowhere."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from jaxtyping import Bool, UInt8
from numpy import ndarray
from photographs import fundus_photograph

from ma_cluster.config import ImageConfig
from ma_cluster.images.fundus import Fov
from ma_cluster.images.reading import MID_GREY, Prepared, enhance, read_pixels

SIDE = 400
ROWS, COLS = np.indices((SIDE, SIDE))
DISTANCE = np.hypot(ROWS - 200, COLS - 200)
DISC = DISTANCE <= 190
SIGMA_PX = 18.0


def on_black(values: ndarray) -> UInt8[ndarray, "h w 3"]:
    return (np.clip(values, 0, 255) * DISC).astype(np.uint8)[:, :, None].repeat(3, axis=2)


@pytest.mark.parametrize("level", [40, 120, 250])
def test_a_flat_retina_becomes_mid_grey_up_to_its_very_rim(level: int) -> None:
    enhanced = enhance(on_black(np.full((SIDE, SIDE), level)), DISC, SIGMA_PX, 4.0)
    assert np.abs(enhanced[DISC].astype(int) - MID_GREY).max() <= 2


def test_the_outside_is_exactly_mid_grey() -> None:
    bright_outside = np.full((SIDE, SIDE, 3), 90, np.uint8)
    enhanced = enhance(bright_outside, DISC, SIGMA_PX, 4.0)
    assert (enhanced[~DISC] == MID_GREY).all()


def test_slow_changes_of_light_vanish() -> None:
    ramp = on_black(60 + 100 * COLS / SIDE)
    enhanced = enhance(ramp, DISC, SIGMA_PX, 4.0)
    inner = DISTANCE < 190 - 3 * SIGMA_PX
    assert np.abs(enhanced[inner].astype(int) - MID_GREY).max() <= 4


def test_a_small_dark_dot_keeps_its_contrast_times_the_gain() -> None:
    dot = np.hypot(ROWS - 230, COLS - 180) < 3
    enhanced = enhance(on_black(120 - 10.0 * dot), DISC, SIGMA_PX, 4.0)
    assert enhanced[230, 180, 1] == pytest.approx(MID_GREY - 4 * 10, abs=3)


def test_light_on_the_whole_retina_does_not_matter() -> None:
    motif = 90 + 20 * np.sin(ROWS / 5) * np.cos(COLS / 7)
    darker, brighter = (enhance(on_black(np.rint(motif) + more), DISC, SIGMA_PX, 4.0) for more in (0, 60))
    assert np.abs(darker[DISC].astype(int) - brighter[DISC]).max() <= 2


def test_the_reduced_grid_equals_the_formula_at_full_resolution() -> None:
    photograph = fundus_photograph((SIDE, SIDE), Fov(200.0, 200.0, 380.0), noise=0)
    enhanced = enhance(photograph, DISC, SIGMA_PX, 4.0)
    difference = np.abs(enhanced.astype(int) - formula(photograph, DISC, 4.0))[DISC]
    assert difference.max() <= 4  # a grey level of the mean, times the gain
    assert difference.mean() <= 0.5


def formula(rgb: UInt8[ndarray, "h w 3"], fov: Bool[ndarray, "h w"], gain: float) -> ndarray:
    """I' = gain (I - (G * I m) / (G * m)) + 128 to the letter, with OpenCV's kernel of 4 sigma and in float64."""
    reach = 2 * round(4 * SIGMA_PX) + 1
    blurred = [
        cv2.GaussianBlur(v, (reach, reach), SIGMA_PX, borderType=cv2.BORDER_CONSTANT)
        for v in (rgb * fov[:, :, None].astype(float), fov.astype(float))
    ]
    mean = blurred[0] / np.maximum(blurred[1], 1e-9)[:, :, None]
    return np.clip(gain * (rgb - mean) + MID_GREY, 0, 255)


def test_both_scales_are_prepared_on_grids_of_one_shape_and_its_half() -> None:
    prepared = prepared_photograph(700.0)
    height, width = prepared.fov_1x.shape
    assert prepared.enhanced_1x.shape == (height, width, 3)
    assert prepared.enhanced_half.shape == (height // 2, width // 2, 3)
    assert prepared.fov_half.shape == (height // 2, width // 2)
    assert (prepared.enhanced_1x[~prepared.fov_1x] == MID_GREY).all()
    assert (prepared.enhanced_half[~prepared.fov_half] == MID_GREY).all()
    assert prepared.shape == (740, 800)


def test_a_photograph_at_another_resolution_looks_the_same_to_the_networks() -> None:
    small, large = prepared_photograph(512.0), prepared_photograph(1024.0)
    side = min(small.fov_1x.shape[0], large.fov_1x.shape[0])
    difference = np.abs(small.enhanced_1x[:side, :side].astype(int) - large.enhanced_1x[:side, :side])
    assert difference.mean() < 3


def prepared_photograph(diameter_px: float) -> Prepared:
    shape, centre = (int(diameter_px) + 40, int(diameter_px) + 100), diameter_px / 2 + 20
    photograph = fundus_photograph(shape, Fov(centre, centre + 30, diameter_px), noise=0)
    config = ImageConfig(fov_diameter_px=512.0, largest_gain=1.0)  # which would enlarge the difference, too
    return read_pixels(photograph, config)[0]
