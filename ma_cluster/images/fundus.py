"""Upright 8-bit RGB of a photograph -> `Fundus`: its field of view found, resampled to the canonical scale.

Cameras differ in resolution; networks do not forgive it. The field of view (FOV) is a disc of known angle, so its
diameter is the scale. Every answer goes back to the photograph's own pixels through `Grid`, exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray

from ma_cluster.config import ImageConfig
from ma_cluster.errors import ImageRefusedError, Reason
from ma_cluster.images.decode import check_size

_NOT_AN_EYE = (
    "no field of view found: not a fundus photograph, or one without the dark surround of the lens's disc, "
    "which --no-surround with --field-degrees reads"
)


@dataclass(frozen=True, slots=True)
class Fov:
    """The camera's disc on the photograph's upright grid: centre (row, col) and diameter, pixels, subpixel."""

    row: float
    col: float
    diameter_px: float
    degrees: float = 50.0
    """The angle that the diameter shows."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The map between a photograph's grid and the canonical 1x grid.

    The box rows [top, top + height) x cols [left, left + width) of the photograph is resampled to
    `canonical_height` x `canonical_width`. Pixel centres are at integers, so with s = canonical / original size

        canonical = (original + 0.5 - top) * s - 0.5        0   1   2   3     original, s = 1/2
                                                            '-0-'   '-1-'     0.5 -> 0, 2.5 -> 1
    """

    top: int
    left: int
    height: int
    width: int
    canonical_height: int
    canonical_width: int

    @property
    def scale(self) -> float:
        """Canonical pixels for each original pixel."""
        return self.canonical_height / self.height

    @property
    def reach_px(self) -> int:
        """How far apart the canonical pixels can lie that `uncrop` takes one value from: 0 where it only crops."""
        if (self.height, self.width) == (self.canonical_height, self.canonical_width):
            return 0
        return math.ceil(max(1.0, self.scale)) + 1

    def to_canonical(self, rows: Float[ndarray, "n 2"]) -> Float[ndarray, "n 2"]:
        """(row, col) on the photograph -> (row, col) on the canonical grid."""
        return (rows + 0.5 - self._origin) * self._factors - 0.5

    def to_original(self, rows: Float[ndarray, "n 2"]) -> Float[ndarray, "n 2"]:
        """(row, col) on the canonical grid -> (row, col) on the photograph."""
        return (rows + 0.5) / self._factors + self._origin - 0.5

    @property
    def _origin(self) -> Float[ndarray, "2"]:
        return np.array([self.top, self.left], dtype=float)

    @property
    def _factors(self) -> Float[ndarray, "2"]:
        return np.array([self.canonical_height / self.height, self.canonical_width / self.width])

    def crop(self, image: ndarray) -> ndarray:
        """The box of a photograph-sized array (h w or h w c) resampled to the canonical grid."""
        box = image[self.top : self.top + self.height, self.left : self.left + self.width]
        return _resample(box, self.canonical_height, self.canonical_width)

    def crop_mask(self, mask: Bool[ndarray, "h w"]) -> Bool[ndarray, "ch cw"]:
        """A photograph-sized mask on the canonical grid: a pixel is set where it is covered by half or more."""
        return self.crop(mask.astype(np.uint8) * 255) >= 128

    def uncrop(self, image: ndarray, shape: tuple[int, int]) -> ndarray:
        """A canonical array (uint8 or float, h w) on the photograph's grid of `shape`; 0 outside the box."""
        out = np.zeros(shape, dtype=image.dtype)
        box = _resample(image, self.height, self.width)
        out[self.top : self.top + self.height, self.left : self.left + self.width] = box
        return out


@dataclass(frozen=True, slots=True)
class Fundus:
    """A photograph ready for contrast enhancement. `pixels` is upright, as a viewer shows it."""

    pixels: UInt8[ndarray, "h w 3"]
    fov: Fov
    grid: Grid
    canonical: UInt8[ndarray, "ch cw 3"]
    canonical_fov: Bool[ndarray, "ch cw"]
    discs: int = 1
    """How many discs of about this size the photograph shows."""

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the photograph, pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]


def locate(pixels: UInt8[ndarray, "h w 3"], config: ImageConfig) -> Fundus:
    """Find the FOV of an upright photograph and resample its box to the canonical scale.

    Raises:
        ImageRefusedError: too_small, no_fov, or unsupported where the field is wider than a fundus camera's.
    """
    height, width = pixels.shape[:2]
    check_size(width, height, config)
    if config.field_degrees > config.max_field_degrees:
        detail = f"a field of {config.field_degrees:g} degrees: ultra-widefield photographs are not read"
        raise ImageRefusedError(Reason.UNSUPPORTED, detail)
    fov, mask, discs = _search(pixels, config)
    grid = _grid(fov, (height, width), config)
    canonical = grid.crop(pixels)
    full = cv2.resize(mask.astype(np.uint8) * 255, (width, height), interpolation=cv2.INTER_LINEAR)
    return Fundus(pixels, fov, grid, canonical, grid.crop(full) >= 128, discs)


def find_fov(pixels: UInt8[ndarray, "h w 3"], config: ImageConfig) -> tuple[Fov, Bool[ndarray, "sh sw"]]:
    """The disc of the camera, and its visible part as a mask on a grid of at most `fov_search_px` a side.

    Raises:
        ImageRefusedError: no_fov.
    """
    fov, mask, _ = _search(pixels, config)
    return fov, mask


def _search(pixels: UInt8[ndarray, "h w 3"], config: ImageConfig) -> tuple[Fov, Bool[ndarray, "sh sw"], int]:
    """The largest disc, its visible part, and how many there are; the whole photograph where it has no surround.

    Where none is found, once more without a margin of the photograph: a frame or a label that runs along its edge
    joins what it touches.
    """
    height, width = pixels.shape[:2]
    ratio = min(1.0, config.fov_search_px / max(height, width))
    small = _resample(pixels, max(1, round(height * ratio)), max(1, round(width * ratio)))
    factors = height / small.shape[0], width / small.shape[1]
    degrees = config.field_degrees or config.fov_degrees
    if config.no_surround:
        whole = Fov((height - 1) / 2, (width - 1) / 2, float(max(height, width)), degrees)
        return whole, np.ones(small.shape[:2], dtype=bool), 1
    try:
        (row, col, radius), hull, discs = _disc(small, config)
    except ImageRefusedError:
        margin = round(config.fov_margin * min(small.shape[:2]))
        bare = np.zeros_like(small)
        bare[margin:-margin, margin:-margin] = small[margin:-margin, margin:-margin]
        (row, col, radius), hull, discs = _disc(bare, config)
    rows, cols = np.indices(hull.shape)
    fov = Fov(
        row=(row + 0.5) * factors[0] - 0.5,
        col=(col + 0.5) * factors[1] - 0.5,
        diameter_px=(2 * radius + 1) * (factors[0] + factors[1]) / 2,
        degrees=degrees,
    )
    return fov, hull & (np.hypot(rows - row, cols - col) <= radius - config.fov_rim_px), discs


def _disc(
    small: UInt8[ndarray, "h w 3"], config: ImageConfig
) -> tuple[tuple[float, float, float], Bool[ndarray, "h w"], int]:
    """Row, column and radius of the largest disc, the hull of its visible part, and how many discs there are.

    The visible part is the convex hull of the largest bright component; a circle is fitted to the round part of its
    border (many cameras cut the disc straight at the top and the bottom), twice, the second time without outliers.

    Raises:
        ImageRefusedError: no_fov.
    """
    component, discs = _bright_component(small, config)
    hull = _convex(component)
    arc = _arc(hull, config.fov_cut_px)
    if len(arc) < config.fov_min_arc_px:
        raise ImageRefusedError(Reason.NO_FOV, _NOT_AN_EYE)
    row, col, radius = _fit_circle(arc)
    off = np.abs(np.hypot(arc[:, 0] - row, arc[:, 1] - col) - radius)
    kept = arc[off <= max(config.fov_outlier_px, config.fov_outlier_share * radius)]
    if len(kept) < config.fov_min_arc_share * len(arc):
        raise ImageRefusedError(Reason.NO_FOV, _NOT_AN_EYE)
    row, col, radius = _fit_circle(kept)
    rows, cols = np.indices(hull.shape)
    distance = np.hypot(rows - row, cols - col)
    inside = ((distance <= radius) & hull).sum() / hull.sum()
    partial = hull.sum() < config.fov_min_disc * np.pi * radius**2 or hull.mean() < config.fov_min_photograph
    core = hull & (distance <= config.fov_core * radius)
    if inside < config.fov_min_inside or partial or small[core].std() < config.fov_min_texture:
        raise ImageRefusedError(Reason.NO_FOV, _NOT_AN_EYE)
    return (row, col, radius), hull, discs


def half_scale(canonical: UInt8[ndarray, "h w c"]) -> UInt8[ndarray, "hh hw c"]:
    """The 0.5x grid: each pixel the mean of 2 x 2 of the 1x grid, whose sides are even."""
    return _resample(canonical, canonical.shape[0] // 2, canonical.shape[1] // 2)


def half_scale_mask(mask: Bool[ndarray, "h w"]) -> Bool[ndarray, "hh hw"]:
    """A mask on the 0.5x grid: set where two or more of the four pixels are."""
    return _resample(mask.astype(np.uint8) * 255, mask.shape[0] // 2, mask.shape[1] // 2) >= 127


def _bright_component(small: UInt8[ndarray, "h w 3"], config: ImageConfig) -> tuple[Bool[ndarray, "h w"], int]:
    """Largest component brighter than the surround, holes filled, and the number of components of about that size.

    The brightest channel sees dark retinas best.
    """
    kernel = (config.fov_kernel_px, config.fov_kernel_px)
    bright = cv2.GaussianBlur(small.max(axis=2), kernel, 0)
    surround = float(np.percentile(bright, config.fov_dark_percentile))
    if surround > config.fov_max_surround:
        raise ImageRefusedError(Reason.NO_FOV, _NOT_AN_EYE)
    contrast = float(np.percentile(bright, config.fov_bright_percentile)) - surround
    threshold = surround + max(config.fov_min_contrast, config.fov_contrast_share * contrast)
    mask = (bright > threshold).astype(np.uint8)
    mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones(kernel, np.uint8))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    if count < 2:
        raise ImageRefusedError(Reason.NO_FOV, _NOT_AN_EYE)
    areas = stats[1:, cv2.CC_STAT_AREA]
    largest = 1 + int(areas.argmax())
    contours, _ = cv2.findContours((labels == largest).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = cv2.drawContours(np.zeros_like(mask), contours, -1, 1, cv2.FILLED)
    return filled.astype(bool), int((areas >= config.fov_second_disc * areas.max()).sum())


def _convex(mask: Bool[ndarray, "h w"]) -> Bool[ndarray, "h w"]:
    """The convex hull: dark retina at the rim, which the threshold misses, belongs to the FOV."""
    hull = cv2.convexHull(np.argwhere(mask)[:, ::-1].astype(np.int32))
    return cv2.fillConvexPoly(np.zeros(mask.shape, np.uint8), hull, 1).astype(bool)


def _arc(hull: Bool[ndarray, "h w"], cut_px: int) -> Float[ndarray, "n 2"]:
    """(row, col) of the hull's border pixels, without the straight sides where a camera cut the disc.

    Such a side lies on the hull's bounding box, be it the photograph's edge or a black band added to it later.
    """
    filled = hull.astype(np.uint8)
    border = np.argwhere(filled - cv2.erode(filled, np.ones((3, 3), np.uint8)))
    if len(border) == 0:  # the hull fills the photograph
        return border.astype(float)
    first, last = border.min(axis=0), border.max(axis=0)
    return border[((border > first + cut_px) & (border < last - cut_px)).all(axis=1)].astype(float)


def _fit_circle(points: Float[ndarray, "n 2"]) -> tuple[float, float, float]:
    """Least-squares circle (Kasa 1976): r^2 + c^2 = 2 r0 r + 2 c0 c + k is linear in r0, c0 and k."""
    system = np.column_stack([2 * points, np.ones(len(points))])
    (row, col, constant), *_ = np.linalg.lstsq(system, (points**2).sum(axis=1), rcond=None)
    return float(row), float(col), float(np.sqrt(max(constant + row**2 + col**2, 0.0)))


def _grid(fov: Fov, shape: tuple[int, int], config: ImageConfig) -> Grid:
    """The FOV's box and its canonical size, with even sides so that the 0.5x grid is exactly half."""
    radius = fov.diameter_px / 2 + 1
    top, bottom = (int(np.clip(v, 0, shape[0])) for v in (np.floor(fov.row - radius), np.ceil(fov.row + radius) + 1))
    left, right = (int(np.clip(v, 0, shape[1])) for v in (np.floor(fov.col - radius), np.ceil(fov.col + radius) + 1))
    height, width = bottom - top, right - left
    scale = config.fov_diameter_px / fov.diameter_px * fov.degrees / config.fov_degrees
    if abs(scale - 1) <= config.scale_tolerance:
        height, width = height - height % 2, width - width % 2
        return Grid(top, left, height, width, height, width)
    canonical = [max(2, 2 * round(side * scale / 2)) for side in (height, width)]
    return Grid(top, left, height, width, *canonical)


def _resample(image: ndarray, height: int, width: int) -> ndarray:
    """Area average to shrink, linear to grow; both keep pixel centres where `Grid` says they are."""
    if image.shape[:2] == (height, width):
        return image
    shrink = height * width < image.shape[0] * image.shape[1]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR)
