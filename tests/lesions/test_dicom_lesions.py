"""The same lesions whatever transfer syntax a photograph comes in: a piece of 15 degrees, by the model that ships."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from dicom_files import LOSSLESS, LOSSY, dicom_file
from jaxtyping import UInt8
from numpy import ndarray
from photographs import encode

from ma_cluster.config import ImageConfig, KnownField
from ma_cluster.images.fundus import find_fov
from ma_cluster.images.phantom import PhantomConfig, draw_phantom
from ma_cluster.images.sample import retina
from ma_cluster.lesions.detector import Detector
from ma_cluster.lesions.findings import Detection

DEGREES = 15.0  # at its scale a tenth of the pixels of a whole photograph: a second of a core


@pytest.fixture(scope="module")
def piece() -> UInt8[ndarray, "h w 3"]:
    """A disc of the CC0 photograph, with a dozen lesions drawn."""
    whole = retina()
    fov = find_fov(whole, ImageConfig())[0]
    many = PhantomConfig(
        dots=150, haemorrhages=0, fragments=0, exudates=0, dot_density=(0.2, 0.34), dot_diameter_px=(15.0, 28.0)
    )
    drawn = draw_phantom(whole, fov, np.random.default_rng(3), many).pixels
    radius = round(fov.diameter_px * DEGREES / fov.degrees / 2)
    top, left = round(fov.row) - 2 * radius - 20, round(fov.col) - radius - 20
    cut = drawn[top : top + 2 * radius + 40, left : left + 2 * radius + 40].copy()
    rows, cols = np.indices(cut.shape[:2])
    cut[np.hypot(rows - radius - 20, cols - radius - 20) > radius] = 2
    return cut


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector.load("lite", threads=1)


@pytest.fixture(scope="module")
def of_png(detector: Detector, piece: ndarray) -> Detection:
    found = detector.knowing(KnownField(DEGREES)).detect(encode(piece, "PNG"))
    assert len(found.lesions) >= 10
    return found


def detect(detector: Detector, piece: ndarray, kind: str) -> Detection:
    """The header tells the field."""
    found = detector.detect(dicom_file(piece, kind, HorizontalFieldOfView=DEGREES))
    assert found.fov.degrees == DEGREES
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_syntaxes_give_the_mask_of_the_png(
    detector: Detector, piece: ndarray, of_png: Detection, kind: str
) -> None:
    found = detect(detector, piece, kind)
    np.testing.assert_array_equal(found.mask, of_png.mask)
    assert found.lesions == of_png.lesions


@pytest.mark.parametrize("kind", LOSSY)
def test_lossy_syntaxes_give_the_lesions_of_the_png(
    detector: Detector, piece: ndarray, of_png: Detection, kind: str
) -> None:
    found = detect(detector, piece, kind)
    same = [
        one
        for one, other in product(of_png.lesions, found.lesions)
        if np.hypot(one.row - other.row, one.col - other.col) <= one.diameter_px / 2
    ]
    assert abs(len(found.lesions) - len(of_png.lesions)) <= 1
    assert len(same) >= len(of_png.lesions) - 1, "of eleven; which are lost are the faintest"
    overlap = 2 * (found.mask & of_png.mask).sum() / (found.mask.sum() + of_png.mask.sum())
    assert overlap > 0.85
