"""Two photographs of one eye whose registration is known: two smaller cameras look at one large photograph."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

from ma_cluster.config import KnownField
from ma_cluster.images.fundus import Fov

Photograph = UInt8[ndarray, "h w 3"]
SHARE = 0.7
"""Diameter of the smaller disc over that of the photograph's own, whose angle shrinks with it."""
FIELD = KnownField(50.0 * SHARE)
_MARGIN = 0.05  # dark surround, over the diameter


@dataclass(frozen=True, slots=True)
class Movement:
    """How the later camera looks from where the earlier one did; nothing by default."""

    shift: tuple[float, float] = (0.0, 0.0)
    """(rows, cols) over the disc's diameter; the retina that both show shrinks with it."""
    degrees: float = 0.0
    scale: float = 1.0
    bend: tuple[float, float] = (0.0, 0.0)
    """What the quadratic terms come to at the rim, (rows, cols) over the diameter."""
    gain: float = 1.0
    gamma: float = 1.0
    shade: float = 0.0
    """Change of light from the middle to the left and right rim."""
    blur: float = 0.0
    """Standard deviation over the diameter."""


@dataclass(frozen=True, slots=True)
class Camera:
    """The disc of a smaller camera on the large photograph, pixels."""

    fov: Fov
    shift: Float[ndarray, "2"]

    @property
    def diameter(self) -> float:
        return SHARE * self.fov.diameter_px

    @property
    def margin(self) -> float:
        """From the corner of the smaller photograph to the centre of its disc, less a radius."""
        return _MARGIN * self.diameter

    def side(self) -> int:
        return round(self.diameter + 2 * self.margin)

    def centres(self) -> tuple[Float[ndarray, "2"], Float[ndarray, "2"]]:
        """Of the earlier and the later disc on the large photograph."""
        middle = np.array([self.fov.row, self.fov.col])
        return middle - self.shift * self.diameter / 2, middle + self.shift * self.diameter / 2


def random_movement(rng: np.random.Generator) -> Movement:
    """Rotation to 15 degrees, shift to 30 % of the disc, scale 0.9 to 1.1, bend, light and blur."""
    towards, far = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.3)
    return Movement(
        shift=(far * np.sin(towards), far * np.cos(towards)),
        degrees=rng.uniform(-15, 15),
        scale=rng.uniform(0.9, 1.1),
        bend=(rng.uniform(-0.008, 0.008), rng.uniform(-0.008, 0.008)),
        gain=rng.uniform(0.75, 1.15),
        gamma=rng.uniform(0.85, 1.2),
        shade=rng.uniform(-0.2, 0.2),
        blur=rng.uniform(0, 1 / 2000),
    )


def two_shots(
    earlier: Photograph, later: Photograph, fov: Fov, movement: Movement, rng: np.random.Generator
) -> tuple[Photograph, Photograph]:
    """What both cameras give of the retina as it is at the earlier and at the later time."""
    camera = Camera(fov, np.array(movement.shift))
    side = camera.side()
    places = (
        np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), axis=-1).reshape(-1, 2).astype(float)
    )
    still = on_large(places, camera, Movement(shift=movement.shift), later=False)
    moved = on_large(places, camera, movement, later=True)
    first, second = (_seen(source, at.reshape(side, side, 2)) for source, at in ((earlier, still), (later, moved)))
    return _taken(first, camera, Movement(), rng), _taken(second, camera, movement, rng)


def on_large(
    places: Float[ndarray, "n 2"], camera: Camera, movement: Movement, *, later: bool
) -> Float[ndarray, "n 2"]:
    """(row, col) on a smaller photograph -> on the large one."""
    radius = camera.diameter / 2
    at = places - (radius + camera.margin)
    centre = camera.centres()[int(later)]
    if not later:
        return at + centre
    angle = np.radians(movement.degrees)
    turned = at @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    row, col = (at / radius).T
    bent = np.stack([movement.bend[0] * (row**2 + row * col), movement.bend[1] * (col**2 - row * col)], axis=1)
    return centre + movement.scale * turned + camera.diameter * bent


def on_earlier(places: Float[ndarray, "n 2"], fov: Fov, movement: Movement) -> Float[ndarray, "n 2"]:
    """(row, col) on the later smaller photograph -> on the earlier one."""
    camera = Camera(fov, np.array(movement.shift))
    return on_large(places, camera, movement, later=True) - camera.centres()[0] + camera.diameter / 2 + camera.margin


def _seen(source: Photograph, at: Float[ndarray, "h w 2"]) -> Photograph:
    onto = at.astype(np.float32)
    return cv2.remap(source, onto[:, :, 1], onto[:, :, 0], cv2.INTER_LINEAR)


def _taken(pixels: Photograph, camera: Camera, movement: Movement, rng: np.random.Generator) -> Photograph:
    """With the camera's light, focus, noise and dark surround."""
    middle, radius = camera.diameter / 2 + camera.margin, camera.diameter / 2
    rows, cols = np.indices(pixels.shape[:2], dtype=np.float32)
    light = movement.gain * (1 + movement.shade * (cols - middle) / radius)
    shown = 255 * (pixels.astype(np.float32) / 255) ** movement.gamma * light[:, :, None]
    if movement.blur:
        shown = cv2.GaussianBlur(shown, (0, 0), movement.blur * camera.diameter)
    shown += rng.normal(0, 1.5, pixels.shape[:2]).astype(np.float32)[:, :, None]
    inside = np.hypot(rows - middle, cols - middle) <= radius
    return np.clip(np.rint(np.where(inside[:, :, None], shown, 4)), 0, 255).astype(np.uint8)
