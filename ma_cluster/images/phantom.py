"""A photograph -> the same photograph with microaneurysms of known truth, and with things that only look like them.

Blood takes light away in proportion to what is there, so every mark is a map of optical density that the pixels are
multiplied by: the retina's own texture and shading stay, and pixels under no mark stay as they are to the bit. Lengths
in the config are pixels of the canonical 1x grid; the field of view says how many pixels of the photograph that is.

Figures marked [M] were measured on IDRiD's training part: 1,088 annotated microaneurysms of 22 photographs, each
against the ring 5 to 14 pixels outside its annotation. Those marked [U] are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from numpy import ndarray

from ma_cluster.config import ImageConfig
from ma_cluster.images.fundus import Fov

Range = tuple[float, float]
Colour = tuple[float, float, float]

_CANONICAL_FOV_PX = ImageConfig().fov_diameter_px
_BLOOD = (0.25, 1.0, 0.8)  # density in R, G and B over that in G [M]
_EXUDATE = (0.3, 1.0, 0.5)  # yellow: it returns light, so its density is negative
_FIELD = 0.92  # marks stay within this share of the FOV's radius: 95 % of microaneurysms lie there [M]
_VESSEL_PX = 80.0  # wider than any vessel, narrower than the fovea
_VESSEL_DARKNESS = 0.92  # of the surround's green; the finest vessels pass, as microaneurysms may lie beside them
_DISC_BRIGHTNESS = 1.5  # of the FOV's median green
_DISC_MARGIN_PX = 60.0  # the pigmented crescent around the disc
_TRIES = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class PhantomConfig:
    """How many marks are drawn, and the ranges their sizes and densities come from (log-uniform within each)."""

    dots: int = 20
    """Microaneurysms."""
    haemorrhages: int = 4
    """Dark blots with a ragged outline."""
    fragments: int = 4
    """Short curved dark lines, as of a vessel that comes up and dives again."""
    exudates: int = 3
    """Bright yellow dots."""
    dot_diameter_px: Range = (11.0, 28.0)
    """The nominal 60 to 125 micrometres; quartiles 14, 18 and 23 pixels [M]."""
    dot_axis_ratio: Range = (0.78, 1.0)
    """Short over long axis; quartiles 0.82, 0.88 and 0.93 [M]."""
    dot_density: Range = (0.08, 0.34)
    """Natural logarithm of the ring's green over the dot's, unblurred; blurred, quartiles 0.10, 0.14 and 0.19 [M]."""
    haemorrhage_diameter_px: Range = (36.0, 85.0)
    """Diameter of the disc of the same area [U]."""
    haemorrhage_density: Range = (0.15, 0.40)
    """Natural logarithm of the surround's green over the blot's [U]."""
    fragment_length_px: Range = (45.0, 120.0)
    """From end to end along the line [U]."""
    fragment_width_px: Range = (7.0, 13.0)
    """Width at the line's middle [U]."""
    fragment_density: Range = (0.10, 0.25)
    """Natural logarithm of the surround's green over the line's [U]."""
    exudate_diameter_px: Range = (8.0, 20.0)
    """Diameter of the disc of the same area [U]."""
    exudate_brightness: Range = (0.15, 0.40)
    """Natural logarithm of the dot's green over the ring's [U]."""
    softness_px: float = 3.0
    """Standard deviation of the blur of every outline: a dot's edge falls from 90 to 10 % within 9 pixels [M]."""
    fov_diameter_px: float = _CANONICAL_FOV_PX
    """FOV diameter of the grid that the lengths above are given on, pixels."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple) and not 0 < value[0] <= value[1]:
                raise ValueError(f"phantom.{field.name} must be (low, high) with 0 < low <= high")
            if isinstance(value, int) and value < 0:
                raise ValueError(f"phantom.{field.name} must not be negative")
        if self.softness_px <= 0 or self.fov_diameter_px <= 0:
            raise ValueError("phantom.softness_px and phantom.fov_diameter_px must be above 0")


@dataclass(frozen=True, slots=True)
class Dot:
    """One drawn microaneurysm. Lengths and positions in pixels of the photograph, pixel centres at integers."""

    row: float
    col: float
    diameter_px: float
    density: float


@dataclass(frozen=True, slots=True)
class Phantom:
    """The photograph with everything drawn, and its truth: pixels that a microaneurysm covers by half or more."""

    pixels: UInt8[ndarray, "h w 3"]
    truth: Bool[ndarray, "h w"]
    dots: tuple[Dot, ...]


@dataclass(frozen=True, slots=True)
class _Mark:
    """Something to draw: its outline as signed distance (negative inside) of offsets (rows, cols) from its centre."""

    outline: Callable[[ndarray, ndarray], ndarray]
    radius_px: float
    density: float
    colour: Colour
    rim_px: float = 1.0
    """Width of the ramp at the border, half of it outside: 1 is antialiasing alone, more a blot thinner at its edge."""
    dot_diameter_px: float | None = None


def draw_phantom(pixels: UInt8[ndarray, "h w 3"], fov: Fov, rng: np.random.Generator, config: PhantomConfig) -> Phantom:
    """Draw marks at random places of the retina: off the optic disc and the larger vessels, none over another.

    Marks that find no free place are left out, so `dots` may be fewer than asked for on a small or crowded retina.
    """
    scale = fov.diameter_px / config.fov_diameter_px
    softness = config.softness_px * scale
    halo = _halo(softness) + 1.0
    room = _room(pixels, fov, scale)
    drawn, truth, dots = pixels.copy(), np.zeros(pixels.shape[:2], dtype=bool), []
    taken: list[tuple[float, float, float]] = []
    for mark in _marks(rng, config, scale):
        reach = mark.radius_px + halo
        place = _free_place(room, taken, reach, rng)
        if place is None:
            continue
        taken.append((*place, reach))
        box, cover = _stamp(drawn, mark, place, softness)
        if mark.dot_diameter_px is not None:
            truth[box] |= cover >= 0.5
            dots.append(Dot(*place, mark.dot_diameter_px, mark.density))
    return Phantom(drawn, truth, tuple(dots))


def _marks(rng: np.random.Generator, config: PhantomConfig, scale: float) -> Iterator[_Mark]:
    """The large ones first, while there is room for them."""
    for _ in range(config.haemorrhages):
        diameter = scale * _pick(rng, config.haemorrhage_diameter_px)
        blot = _blot(rng, diameter, (0.6, 1.0), 0.14, (_pick(rng, config.haemorrhage_density), _BLOOD))
        rim = diameter * rng.uniform(0.2, 0.5)
        yield replace(blot, rim_px=rim, radius_px=blot.radius_px + rim / 2)
    for _ in range(config.fragments):
        yield _fragment(rng, config, scale)
    for _ in range(config.exudates):
        diameter = scale * _pick(rng, config.exudate_diameter_px)
        yield _blot(rng, diameter, (0.7, 1.0), 0.10, (-_pick(rng, config.exudate_brightness), _EXUDATE))
    for _ in range(config.dots):
        diameter = scale * _pick(rng, config.dot_diameter_px)
        shade = _pick(rng, config.dot_density), _BLOOD
        yield replace(_blot(rng, diameter, config.dot_axis_ratio, 0.04, shade), dot_diameter_px=diameter)


def _blot(
    rng: np.random.Generator,
    diameter_px: float,
    axis_ratio: Range,
    raggedness: float,
    shade: tuple[float, Colour],
) -> _Mark:
    """An ellipse with the area of a disc of `diameter_px`, its border waved by harmonics 3 to 8 of that amplitude."""
    ratio, tilt = np.sqrt(_pick(rng, axis_ratio)), rng.uniform(0, np.pi)
    orders = np.arange(3, 9)
    waves, phases = raggedness * rng.normal(size=6) * 2 / orders, rng.uniform(0, 2 * np.pi, 6)
    radius = diameter_px / 2

    def outline(rows: ndarray, cols: ndarray) -> ndarray:
        angle = np.arctan2(rows, cols)
        ellipse = 1 / np.hypot(np.cos(angle - tilt) * ratio, np.sin(angle - tilt) / ratio)
        wave = (waves * np.cos(orders * angle[..., None] + phases)).sum(axis=-1)
        return np.hypot(rows, cols) - radius * ellipse * np.maximum(1 + wave, 0.3)

    return _Mark(outline, radius / ratio * (1 + np.abs(waves).sum()), *shade)


def _fragment(rng: np.random.Generator, config: PhantomConfig, scale: float) -> _Mark:
    """An arc, tapered to its ends: points half a pixel apart, the outline at their half width.

    s runs from -1 to 1 along the arc and `turning` is the angle between its ends:

        heading = tilt + turning s / 2        half width = width / 2 (1 - 0.6 s^2)
    """
    length, width = (scale * _pick(rng, span) for span in (config.fragment_length_px, config.fragment_width_px))
    tilt, turning = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.8) * rng.choice([-1, 1])
    along = np.linspace(-1, 1, max(3, int(2 * length)))
    heading, step = tilt + turning * along / 2, length / len(along)
    rows, cols = np.cumsum(np.sin(heading)) * step, np.cumsum(np.cos(heading)) * step
    rows, cols = rows - (rows.min() + rows.max()) / 2, cols - (cols.min() + cols.max()) / 2
    half_width = width / 2 * (1 - 0.6 * along**2)

    def outline(at_rows: ndarray, at_cols: ndarray) -> ndarray:
        return (np.hypot(at_rows[..., None] - rows, at_cols[..., None] - cols) - half_width).min(axis=-1)

    radius = float((np.hypot(rows, cols) + half_width).max())
    return _Mark(outline, radius, _pick(rng, config.fragment_density), _BLOOD)


def _room(pixels: UInt8[ndarray, "h w 3"], fov: Fov, scale: float) -> Float32[ndarray, "h w"]:
    """Distance of each pixel to the nearest one where nothing may be drawn, pixels."""
    green = cv2.GaussianBlur(pixels[:, :, 1], (0, 0), 4 * scale).astype(np.float32)
    rows, cols = np.ogrid[: green.shape[0], : green.shape[1]]
    field = np.hypot(rows - fov.row, cols - fov.col) < _FIELD * fov.diameter_px / 2
    field[[0, -1]] = field[:, [0, -1]] = False
    if not field.any():
        return np.zeros(green.shape, np.float32)
    typical = float(np.median(green[field]))
    bright = cv2.blur(green, (_odd(40 * scale),) * 2) > _DISC_BRIGHTNESS * typical
    disc = cv2.dilate(bright.astype(np.uint8), np.ones((_odd(2 * _DISC_MARGIN_PX * scale),) * 2, np.uint8))
    surround = cv2.morphologyEx(green, cv2.MORPH_CLOSE, np.ones((_odd(_VESSEL_PX * scale),) * 2, np.uint8))
    retina = field & (green > 0.3 * typical) & (green > _VESSEL_DARKNESS * surround) & (disc == 0)
    return cv2.distanceTransform(retina.astype(np.uint8), cv2.DIST_L2, 5)


def _free_place(
    room: Float32[ndarray, "h w"], taken: list[tuple[float, float, float]], reach: float, rng: np.random.Generator
) -> tuple[float, float] | None:
    """A subpixel (row, col) with nothing forbidden or taken within `reach`; None after some hundred tries."""
    candidates = np.flatnonzero(room > reach + 1)
    if len(candidates) == 0:
        return None
    others = np.array(taken, dtype=float).reshape(-1, 3)
    for pixel in candidates[rng.integers(len(candidates), size=_TRIES)]:
        row, col = np.array(divmod(int(pixel), room.shape[1])) + rng.uniform(-0.5, 0.5, 2)
        if np.all(np.hypot(others[:, 0] - row, others[:, 1] - col) > others[:, 2] + reach):
            return float(row), float(col)
    return None


def _stamp(
    pixels: UInt8[ndarray, "h w 3"], mark: _Mark, place: tuple[float, float], softness: float
) -> tuple[tuple[slice, slice], Float[ndarray, "bh bw"]]:
    """Multiply a mark into the pixels, in place; its box and the share of each pixel there that it covers."""
    reach = int(np.ceil(mark.radius_px)) + _halo(softness) + 1
    top, left = (round(value) - reach for value in place)
    box = slice(top, top + 2 * reach + 1), slice(left, left + 2 * reach + 1)
    rows, cols = np.mgrid[box]
    # Half a pixel either side of the border stands for the share covered: exact for a straight border along the grid.
    cover = np.clip(0.5 - mark.outline(rows - place[0], cols - place[1]) / mark.rim_px, 0, 1)
    soft = cv2.GaussianBlur(cover, (2 * _halo(softness) + 1,) * 2, softness)
    passed = np.exp(-mark.density * soft[:, :, None] * np.array(mark.colour))
    pixels[box] = np.clip(np.rint(pixels[box] * passed), 0, 255).astype(np.uint8)
    return box, cover


def _halo(softness: float) -> int:
    """Pixels beyond its outline that a mark's blur reaches."""
    return int(np.ceil(3 * softness))


def _odd(length: float) -> int:
    return 2 * int(length / 2) + 1


def _pick(rng: np.random.Generator, span: Range) -> float:
    """Log-uniform: small and faint ones are as many as in the measured quartiles."""
    return float(np.exp(rng.uniform(*np.log(span))))
