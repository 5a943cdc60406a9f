"""Which eye the picture shows, on a real left eye, its mirror image, and pictures that show too little."""

from __future__ import annotations

import numpy as np
import pytest
from jaxtyping import UInt8
from numpy import ndarray
from photographs import fundus_photograph

from ma_cluster.config import ImageConfig
from ma_cluster.images.fundus import Fov, locate
from ma_cluster.images.laterality import LEAST_CONFIDENCE, Side, tell_eye
from ma_cluster.images.sample import retina

RETINA = retina()  # a left eye
SMALL = ImageConfig(fov_diameter_px=512.0)


def told(pixels: UInt8[ndarray, "h w 3"], config: ImageConfig = SMALL) -> Side:
    side = tell_eye(locate(pixels, config), config.fov_diameter_px)
    assert side is not None
    return side


def test_a_left_eye_and_its_mirror_image_are_told_apart() -> None:
    left, right = told(RETINA), told(np.ascontiguousarray(RETINA[:, ::-1]))
    assert (left.eye, right.eye) == ("L", "R")
    assert min(left.confidence, right.confidence) >= LEAST_CONFIDENCE
    assert left.confidence == pytest.approx(right.confidence, abs=0.02)


def test_the_disc_is_found_where_it_is_and_the_fovea_beside_it() -> None:
    side = told(RETINA)
    row, col = (round(value) for value in side.disc)
    around = RETINA[row - 40 : row + 40, col - 40 : col + 40, 1].mean()
    assert around > 1.5 * RETINA[300:1100, 300:1100, 1].mean()
    assert side.fovea[1] > side.disc[1] + 300


def test_the_scale_of_the_canonical_grid_does_not_matter() -> None:
    small, large = told(RETINA), told(RETINA, ImageConfig(fov_diameter_px=1400.0))
    assert small.eye == large.eye
    np.testing.assert_allclose(small.disc, large.disc, atol=25)


def test_a_blank_disc_tells_nothing() -> None:
    fov = Fov(300.0, 300.0, 560.0)
    rows, cols = np.indices((600, 600))
    nerve = np.hypot(rows - 300, cols - 440) < 45  # painted over: no bright disc, no vessels
    blank = fundus_photograph((600, 600), fov)
    blank[nerve] = blank[300, 300]
    assert told(blank).confidence < LEAST_CONFIDENCE
