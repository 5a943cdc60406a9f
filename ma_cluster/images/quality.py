"""What can be judged on a photograph: light, haze, focus, resolution -> measures, a score, flags, gradable or not.

Each measure is held against a limit beyond which the networks lose more than about a quarter of the lesions that they
find on the undegraded photograph. One that is not gradable keeps its lesions, but none found on it means nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8
from numpy import ndarray

from ma_cluster.config import ImageConfig
from ma_cluster.errors import Flag
from ma_cluster.images.fundus import Fundus, half_scale, half_scale_mask

_WORDS = {
    Flag.DARK: "dim",
    Flag.BRIGHT: "overexposed",
    Flag.HAZY: "hazy",
    Flag.BLURRED: "out of focus",
    Flag.COARSE: "too coarse for small lesions, in pixels or by its compression",
    Flag.FIELD_ASSUMED: "its field is assumed to be the usual one",
    Flag.MORE_PAGES: "the file holds more pages, which are not read",
    Flag.MORE_DISCS: "the picture shows more discs, of which one is read",
    Flag.RED_FREE: "without colours, or with its channels in another order",
    Flag.BURNT_IN_TEXT: "text is written on it",
}
# Limit and good. Of the annotated lesions that `lite` outlines on five photographs of IDRiD these shares are outlined
# again when they are made worse and saved as JPEG (tests/benchmarks/bench_quality.py): brightness 0.5, 0.25, 0.12:
# 0.94, 0.83, 0.51 (vessel contrast 0.060, 0.030, 0.015); haze that leaves 0.5, 0.35, 0.2: 0.94, 0.92, 0.71 (0.060,
# 0.042, 0.024); defocus of 1/2000, 1/1000, 1/700, 1/500 of the diameter: 0.95, 0.82, 0.65, 0.43 (sharpness 0.34,
# 0.28, 0.25, 0.22); JPEG of quality 50, 30, 20, 8: 1, 0.72, 0.47, 0.27 (blocks up to 3.5 at 50 and 30, which it
# cannot tell apart: the file tells a quality of 30; from 6 and 16 on at 20 and 8); FOV of 1700, 1200, 900, 700
# pixels: 0.99, 0.86, 0.76, 0.62. Of those that it is sure of 0.55 are left at 900 pixels; as much is to be had from
# cameras of that resolution, so it is told from 1200 down, and is no limit above 900.
_CONTRAST = 0.035, 0.098
_FOCUS = 0.15, 0.2
_SHARPNESS = 0.28, 0.34
_DIAMETER_PX = 900.0, 2400.0  # of a FOV of the usual field
_UNPACKED = 1 / 6.0, 1 / 4.0  # of the inverse of blocks
_UNCLIPPED = 0.75, 0.95
_DARK_BRIGHTNESS = 0.25  # what lacks contrast is called dark below this mean of the green channel, hazy above it
_LEAST_REDNESS = 1.1  # a photograph whose red is darker than so many times its green has no colours: red-free, or grey
_TOLD = 0.6  # a measure whose grade is below is told by its flag
_MARGIN = 1 / 55  # of the FOV's diameter, left out along the rim: there the lens's shading is no vessel
_TEXT_PX = 1424.0  # the shorter side of the grid on which letters are looked for
_TEXT_CONTRAST = 60.0  # grey levels, of green or blue
_LETTER = 1 / 150, 1 / 12  # least and largest height over the shorter side
_STROKE = 1 / 40  # of the shorter side: no letter's stroke is wider
_LETTERS = 4  # that stand beside each other; of 274 photographs without text none shows more than two (measured)
_BANDS = 1 / 1700, 1 / 850, 1 / 340  # sigmas over the FOV's diameter: a microaneurysm's size lies between the last two


@dataclass(frozen=True, slots=True)
class Quality:
    """Measures of the green channel inside the FOV, where lesions and vessels show best, and what follows from them."""

    brightness: float
    """Mean, 0..1."""
    contrast: float
    """Standard deviation, 0..1."""
    vessel_contrast: float
    """By how much the darkest hundredth, vessels, is darker than the mean around it, 0..1."""
    sharpness: float
    """What structures of half a microaneurysm's size have of the contrast of those of its size: falls with blur and
    motion, whatever the light and the camera, and rises with noise."""
    focus: float
    """What structures of a microaneurysm's size have of the vessels' contrast: falls with blur, light aside."""
    score: float
    """The grade of the worst measure, 0..1: 0.5 at the limit of what can be judged, 1 where it is as it should be."""
    gradable: bool
    """Whether the lack of lesions would mean anything."""
    flags: tuple[Flag, ...]
    """What a person should know, in the closed list's order."""
    blocks: float = 1.0
    """How much more light changes between the 8 x 8 pixels that a JPEG packs together than within them."""

    @property
    def detail(self) -> str | None:
        """The flags in words."""
        return "; ".join(_WORDS[flag] for flag in self.flags) or None


def assess(fundus: Fundus, noticed: tuple[Flag, ...], config: ImageConfig) -> Quality:
    """Measure a photograph that lies on the canonical scale, and judge it.

    Args:
        fundus: the photograph.
        noticed: flags from its decoding.
        config: the limits.
    """
    half, fov = half_scale(fundus.canonical), half_scale_mask(fundus.canonical_fov)
    quarter, inside = half_scale(_even(half)), half_scale_mask(_even(fov))
    diameter_px = config.fov_diameter_px / 2  # on the 0.5x grid
    inner, inner_half = _inner(inside, _MARGIN * diameter_px / 2), _inner(fov, _MARGIN * diameter_px)
    if not inner.any() or not inner_half.any():
        return Quality(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, False, noticed)
    rgb = quarter[inner]
    green = rgb[:, 1].astype(np.float32) / 255
    mean = local_mean(quarter, inside, config.sigma_ratio * diameter_px / 2)[:, :, 1]
    vessels = max(0.0, float(np.percentile((mean - quarter[:, :, 1])[inner], 99)) / 255)
    details, spots = _structures(half[:, :, 1], inner_half, diameter_px)
    focus, sharpness = (above / below if below > 0 else 0.0 for above, below in ((spots, vessels), (details, spots)))
    blocks = _blocks(fundus)
    clipped = float((green >= 250 / 255).mean())
    grades = {
        Flag.DARK if green.mean() < _DARK_BRIGHTNESS else Flag.HAZY: _grade(vessels, *_CONTRAST),
        Flag.BRIGHT: _grade(1 - clipped, *_UNCLIPPED),
        Flag.BLURRED: min(_grade(focus, *_FOCUS), _grade(sharpness, *_SHARPNESS)),
        Flag.COARSE: min(
            _grade(config.fov_diameter_px / fundus.grid.scale, *_DIAMETER_PX), _grade(1 / blocks, *_UNPACKED)
        ),
    }
    score = min(grades.values())
    told = {flag for flag, grade in grades.items() if grade < _TOLD} | set(noticed)
    if exposure_gain(float(green.mean()), vessels, config) > 1:
        told.add(next(iter(grades)))
    told |= {Flag.MORE_DISCS} if fundus.discs > 1 else set()
    told |= {Flag.FIELD_ASSUMED} if config.field_degrees == 0 else set()
    told |= {Flag.BURNT_IN_TEXT} if has_text(fundus.pixels) else set()
    told |= {Flag.RED_FREE} if rgb[:, 0].mean() < _LEAST_REDNESS * rgb[:, 1].mean() else set()
    return Quality(
        brightness=float(green.mean()),
        contrast=float(green.std()),
        vessel_contrast=vessels,
        sharpness=sharpness,
        focus=focus,
        score=score,
        gradable=score >= 0.5 and Flag.MORE_DISCS not in told,
        flags=tuple(flag for flag in Flag if flag in told),
        blocks=blocks,
    )


def exposure_gain(brightness: float, vessel_contrast: float, config: ImageConfig) -> float:
    """The factor that brings the vessels of a dim or hazy photograph to their usual contrast; 1 for any other.

    Between both it rises within an eighth of the limit, so that no photograph stands on an edge.
    """
    if vessel_contrast <= 0 or brightness <= 0:
        return 1.0
    dim = 1 - math.sqrt(brightness * vessel_contrast) / config.least_exposure
    hazy = 1 - min(vessel_contrast / config.least_contrast, vessel_contrast / brightness / config.least_depth)
    share = min(1.0, 8 * max(dim, hazy, 0.0))
    gain = min(config.vessel_contrast / vessel_contrast, config.largest_gain)
    return 1 + share * max(0.0, gain - 1)


def _structures(green: UInt8[ndarray, "h w"], inner: Bool[ndarray, "h w"], diameter_px: float) -> tuple[float, float]:
    """Contrast of dark structures of half a microaneurysm's size and of its size, 0..1: the darkest hundredth."""
    light = green.astype(np.float32)
    fine, middle, coarse = (cv2.GaussianBlur(light, (0, 0), share * diameter_px) for share in _BANDS)
    pairs = (middle - fine, coarse - middle)
    details, spots = (max(0.0, float(np.percentile(band[inner], 99)) / 255) for band in pairs)
    return details, spots


def _blocks(fundus: Fundus) -> float:
    """Change of the green channel from one pixel to the next in the middle of the field, along the eighth of the lines
    where it is largest, over that along the others; the smaller one of rows and columns.
    """
    grid = fundus.grid
    rows, cols = (
        slice(first + size // 4, first + 3 * size // 4)
        for first, size in ((grid.top, grid.height), (grid.left, grid.width))
    )
    green = fundus.pixels[rows, cols, 1].astype(np.int16)
    found = []
    for axis in (0, 1):
        change = np.abs(np.diff(green, axis=axis)).mean(axis=1 - axis)
        phases = sorted(float(change[phase::8].mean()) for phase in range(8))
        found.append(phases[-1] / max(sum(phases[:-1]) / 7, 1e-3))
    return max(1.0, min(found))


def has_text(rgb: UInt8[ndarray, "h w 3"]) -> bool:
    """Whether bright letters stand in a row anywhere on a photograph, as names and dates that were written on it do.

    A letter is a connected stroke that is brighter than what is around it, and no wider than `_STROKE`, of a letter's
    height and width; a row is of letters of about one height, on one line, no more than a letter apart. Exudates and
    reflexes are such strokes, too, but not in rows. Dark letters on a bright plate are not looked for.
    """
    ratio = min(1.0, _TEXT_PX / min(rgb.shape[:2]))
    size = round(rgb.shape[1] * ratio), round(rgb.shape[0] * ratio)
    light = cv2.resize(rgb[:, :, 1:].max(axis=2), size, interpolation=cv2.INTER_AREA)
    kernel = np.ones((max(5, round(_STROKE * min(size))),) * 2, np.uint8)
    strokes = cv2.morphologyEx(light, cv2.MORPH_TOPHAT, kernel) >= _TEXT_CONTRAST
    boxes = cv2.connectedComponentsWithStats(strokes.astype(np.uint8), connectivity=8)[2][1:]
    width, height, share = boxes[:, 2], boxes[:, 3], boxes[:, 4] / (boxes[:, 2] * boxes[:, 3])
    shaped = (height >= max(7.0, _LETTER[0] * min(size))) & (height <= _LETTER[1] * min(size))
    shaped &= (width <= 1.6 * height) & (share >= 0.12) & ((share <= 0.85) | (width <= 0.35 * height))
    return _longest_row(boxes[shaped]) >= _LETTERS


def _longest_row(boxes: Int[ndarray, "n 5"]) -> int:
    """Of boxes (left, top, width, height, area) the most that stand in a row, from the left to the right."""
    boxes = boxes[boxes[:, 0].argsort()]
    rows = np.ones(len(boxes), dtype=int)
    for number, (left, top, _, height, _) in enumerate(boxes):
        before = boxes[:number]
        gap, taller = left - before[:, 0] - before[:, 2], np.maximum(before[:, 3], height)
        beside = (gap <= 1.2 * taller) & (gap >= -0.3 * taller)
        alike = np.minimum(before[:, 3], height) >= 0.6 * taller
        level = np.abs(before[:, 1] + before[:, 3] - top - height) <= 0.25 * taller
        rows[number] += rows[:number][beside & alike & level].max(initial=0)
    return int(rows.max(initial=0))


def _grade(measure: float, limit: float, good: float) -> float:
    """0.5 at the limit, 1 where it is good, and linear below, between and up to there."""
    return min(1.0, 0.5 * measure / limit if measure < limit else 0.5 + 0.5 * (measure - limit) / (good - limit))


def local_mean(rgb: UInt8[ndarray, "h w 3"], fov: Bool[ndarray, "h w"], sigma_px: float) -> Float32[ndarray, "h w 3"]:
    """G * I over the FOV alone, (G * (I m)) / (G * m) with m its mask, so that the dark surround does not darken it.

    It is computed on a grid reduced until sigma is about 8 pixels there; the difference to full resolution is under
    one grey level.

    Args:
        rgb: canonical photograph at any scale.
        fov: its field of view.
        sigma_px: standard deviation of G, pixels of this grid.
    """
    height, width = fov.shape
    step = max(1, int(sigma_px // 8))
    size = -(-width // step), -(-height // step)
    weight = cv2.resize(fov.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    masked = rgb * fov[:, :, None]
    light = cv2.resize(masked, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    sigma = sigma_px / step
    blurred = cv2.GaussianBlur(light, (0, 0), sigma, borderType=cv2.BORDER_CONSTANT)
    weights = cv2.GaussianBlur(weight, (0, 0), sigma, borderType=cv2.BORDER_CONSTANT)
    mean = blurred / np.maximum(weights, 1e-3)[:, :, None]
    return cv2.resize(mean, (width, height), interpolation=cv2.INTER_LINEAR)


def _even(image: ndarray) -> ndarray:
    """Without a last row and column that would have no partner at half the scale."""
    return image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2]


def _inner(fov: Bool[ndarray, "h w"], margin_px: float) -> Bool[ndarray, "h w"]:
    side = 2 * round(margin_px) + 1
    kernel = np.ones((side, side), np.uint8)
    return cv2.erode(fov.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0) > 0
