"""Which eye a photograph shows, told from the picture: the optic disc lies nasally of the fovea.

    canonical photograph, reduced -> how much each place looks like the disc (bright, crossed by upright vessels)
        -> with a fovea, dark and without vessels, on its left (a right eye) or on its right (a left eye)
        -> the better pair, by how much, and on which side of the field the disc lies -> eye, confidence

There is always a better pair, however little is seen: below LEAST_CONFIDENCE it counts for nothing, and the eye stays
unknown (`archive.outcomes.identify`).

Constants are shares of the diameter of a field of 50 degrees. Those of the logistic are fitted on IDRiD's 362
photographs: 355 of them are told right, and of 320 that are sure 318. Of HRF's 15 healthy ones, which are of another
camera and fitted nothing, all are told right (tests/benchmarks/bench_turnover.py laterality).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8
from numpy import ndarray

from ma_cluster.images.acquisition import Laterality
from ma_cluster.images.fundus import Fundus

LEAST_CONFIDENCE = 0.95
"""Below it the eye is not known: a wrong side is worse than none."""
_DIAMETER_PX = 213.0  # of the field on the reduced grid: the disc is some 26 pixels wide
_VESSEL, _BLOT = 0.035, 0.08  # wider than a vessel; wider than a patch of exudates, narrower than the disc
_NEAR, _AROUND, _FAR = 0.03, 0.1, 0.12  # standard deviations: of the disc, of what is around it, of the light
_MOST_BRIGHT = 0.25  # of the light around: brighter is no more like a disc
_UPRIGHT = 0.6  # weight of upright vessels beside brightness
_FOVEA = 0.30, 0.03  # from the disc's centre, sideways and down
_REACH = 0.04  # about where the fovea is looked for
_MARGIN_ODDS, _SIDE_ODDS, _MIDDLE = 1.8, 9.4, 0.15  # logistic: of the better pair's lead; of the disc's place, beyond


@dataclass(frozen=True, slots=True)
class Side:
    """What the picture tells, sure or not. Positions (row, col) are pixels of the upright photograph."""

    eye: Laterality
    confidence: float
    """Probability that it is this eye, 0.5..1."""
    disc: tuple[float, float]
    fovea: tuple[float, float]
    """Where they are taken to be."""


def tell_eye(fundus: Fundus, diameter_px: float) -> Side | None:
    """The eye that a photograph shows; None where it shows too little of any.

    Args:
        fundus: on the canonical grid.
        diameter_px: of the usual field on that grid.
    """
    height, width = (max(1, round(side * _DIAMETER_PX / diameter_px)) for side in fundus.canonical_fov.shape)
    rgb = cv2.resize(fundus.canonical, (width, height), interpolation=cv2.INTER_AREA)
    share = cv2.resize(fundus.canonical_fov.astype(np.uint8) * 255, (width, height), interpolation=cv2.INTER_AREA)
    fov = share >= 128
    core, inner = _eroded(fov, 0.09), _eroded(fov, 0.12)
    if not inner.any():
        return None
    disc_like, fovea_like = _likeness(rgb, fov, core, inner)
    best = {eye: _best_pair(disc_like, fovea_like, core, towards) for eye, towards in _TOWARDS.items()}
    alone = np.unravel_index(int(np.where(core, disc_like, -np.inf).argmax()), core.shape)
    cols = np.flatnonzero(fov.any(axis=0))
    aside = (alone[1] - cols.mean()) / _DIAMETER_PX
    beyond = math.copysign(max(0.0, abs(aside) - _MIDDLE), aside)
    odds = _MARGIN_ODDS * (best["R"][0] - best["L"][0]) + _SIDE_ODDS * beyond
    eye: Laterality = "R" if odds > 0 else "L"
    row, col = best[eye][1]
    places = np.array([(row, col), (row + _FOVEA[1] * _DIAMETER_PX, col + _TOWARDS[eye] * _FOVEA[0] * _DIAMETER_PX)])
    factors = np.array(fundus.canonical_fov.shape) / np.array(fov.shape)
    disc, fovea = fundus.grid.to_original((places + 0.5) * factors - 0.5).tolist()
    return Side(eye, 1 / (1 + math.exp(-abs(odds))), (disc[0], disc[1]), (fovea[0], fovea[1]))


_TOWARDS: dict[Laterality, int] = {"R": -1, "L": 1}
"""Where the fovea lies, seen from the disc: to the left on a photograph of a right eye."""


def _likeness(
    rgb: UInt8[ndarray, "h w 3"], fov: Bool[ndarray, "h w"], core: Bool[ndarray, "h w"], inner: Bool[ndarray, "h w"]
) -> tuple[Float32[ndarray, "h w"], Float32[ndarray, "h w"]]:
    """How much each place looks like a disc, and like a fovea, in standard deviations over the field."""
    green = rgb[:, :, 1].astype(np.float32)
    light = np.where(fov, green / np.maximum(_mean(green, fov, _FAR), 8), 1).astype(np.float32)
    filled = cv2.morphologyEx(light, cv2.MORPH_CLOSE, _round(_VESSEL))
    blots = cv2.morphologyEx(filled, cv2.MORPH_OPEN, _round(_BLOT))
    bright = np.minimum(_mean(blots, fov, _NEAR) - _mean(blots, fov, _AROUND), _MOST_BRIGHT)
    vessels = np.maximum(0, filled - light) * _eroded(fov, 0.05)
    smooth = cv2.GaussianBlur(light, (0, 0), 0.8)
    across, down = (np.abs(cv2.Sobel(smooth, cv2.CV_32F, *order)) for order in ((1, 0), (0, 1)))
    window = _odd(0.1), _odd(0.24)
    upright = cv2.blur(vessels * across / (across + down + 1e-3), window)
    disc_like = _standard(bright, core) + _UPRIGHT * _standard(upright, core)
    dark = _standard(_mean(filled, fov, _FAR) - _mean(filled, fov, _VESSEL), inner)
    fovea_like = np.clip(dark, -1, 3) * inner
    smoothed = cv2.GaussianBlur(np.where(core, disc_like, -9).astype(np.float32), (0, 0), 0.01 * _DIAMETER_PX)
    return smoothed, cv2.dilate(fovea_like.astype(np.float32), _round(2 * _REACH))


def _best_pair(
    disc_like: Float32[ndarray, "h w"], fovea_like: Float32[ndarray, "h w"], core: Bool[ndarray, "h w"], towards: int
) -> tuple[float, tuple[float, float]]:
    """The largest likeness of a disc with the fovea on one side of it, and where that disc is."""
    shift = np.array([[1, 0, -towards * _FOVEA[0]], [0, 1, -_FOVEA[1]]]) * [1, 1, _DIAMETER_PX]
    beside = cv2.warpAffine(fovea_like, shift, fovea_like.shape[::-1], borderValue=0)
    pair = np.where(core, disc_like + beside, -np.inf)
    row, col = np.unravel_index(int(pair.argmax()), pair.shape)
    return float(pair[row, col]), (float(row), float(col))


def _mean(image: Float32[ndarray, "h w"], fov: Bool[ndarray, "h w"], sigma: float) -> Float32[ndarray, "h w"]:
    """Gaussian mean over the field alone."""
    weight = fov.astype(np.float32)
    blurred, weights = (cv2.GaussianBlur(each, (0, 0), sigma * _DIAMETER_PX) for each in (image * weight, weight))
    return blurred / np.maximum(weights, 1e-3)


def _standard(image: Float32[ndarray, "h w"], where: Bool[ndarray, "h w"]) -> Float32[ndarray, "h w"]:
    values = image[where]
    return (image - values.mean()) / (values.std() + np.float32(1e-6))


def _eroded(fov: Bool[ndarray, "h w"], share: float) -> Bool[ndarray, "h w"]:
    kernel = _round(share)
    return cv2.erode(fov.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0) > 0


def _round(share: float) -> UInt8[ndarray, "k k"]:
    side = 2 * round(share * _DIAMETER_PX / 2) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)).astype(np.uint8)


def _odd(share: float) -> int:
    return int(share * _DIAMETER_PX) | 1
