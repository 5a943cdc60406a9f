"""What can be judged on a photograph: light, haze, focus, resolution -> measures, a score, flags, gradable or not.

Each measure is held against the limit at which the networks find less than 0.8 of the lesions that they find on the
undegraded photograph. A photograph that is not gradable keeps its lesions, but none found on it means nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8
from numpy import ndarray

from ma_cluster.config import ImageConfig
from ma_cluster.errors import Flag
from ma_cluster.images.fundus import Fundus, half_scale, half_scale_mask

_WORDS = {
    Flag.DARK: "dim",
    Flag.BRIGHT: "overexposed",
    Flag.HAZY: "hazy",
    Flag.BLURRED: "out of focus",
    Flag.COARSE: "too coarse for small lesions",
    Flag.FIELD_ASSUMED: "its field is assumed to be the usual one",
    Flag.MORE_PAGES: "the file holds more pages, which are not read",
    Flag.MORE_DISCS: "the picture shows more discs, of which one is read",
    Flag.RED_FREE: "without colours",
    Flag.BURNT_IN_TEXT: "text is written on it",
}
_MARGIN_PX = 31  # on the quarter grid, left out along the rim: there the lens's shading is no vessel
_BAND_PX = 2.0, 5.0  # sigmas on the 0.5x grid: structures of a microaneurysm's size lie between


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
    """Standard deviation of the Laplacian on the 0.5x grid, 0..1: falls with blur, rises with noise."""
    focus: float
    """What structures of a microaneurysm's size have of the vessels' contrast: falls with blur, light aside."""
    score: float
    """The worst measure, 0..1: 0.5 at the limit of what can be judged, 1 at twice that."""
    gradable: bool
    """Whether the lack of lesions would mean anything."""
    flags: tuple[Flag, ...]
    """What a person should know, in the closed list's order."""

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
    inner, inner_half = _inner(inside, _MARGIN_PX), _inner(fov, 2 * _MARGIN_PX - 1)
    if not inner.any() or not inner_half.any():
        return Quality(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, False, noticed)
    rgb = quarter[inner]
    green = rgb[:, 1].astype(np.float32) / 255
    mean = local_mean(quarter, inside, config.sigma_ratio * config.fov_diameter_px / 4)[:, :, 1]
    vessels = max(0.0, float(np.percentile((mean - quarter[:, :, 1])[inner], 99)) / 255)
    fine, coarse = (cv2.GaussianBlur(half[:, :, 1].astype(np.float32), (0, 0), sigma) for sigma in _BAND_PX)
    spots = max(0.0, float(np.percentile((coarse - fine)[inner_half], 99)) / 255)
    focus = spots / vessels if vessels > 0 else 0.0
    # How far each measure is above its limit; what it is called below that.
    dim = Flag.DARK if green.mean() < config.dark_brightness else Flag.HAZY
    margins = {
        dim: vessels / config.gradable_contrast,
        Flag.BRIGHT: config.gradable_clipped / max(float((green >= 250 / 255).mean()), 1e-6),
        Flag.BLURRED: focus / config.gradable_focus,
        Flag.COARSE: config.gradable_enlargement / fundus.grid.scale,
    }
    score = min(1.0, min(margins.values()) / 2)
    told = {flag for flag, margin in margins.items() if margin < 1.5} | set(noticed)
    told |= {Flag.MORE_DISCS} if fundus.discs > 1 else set()
    told |= {Flag.FIELD_ASSUMED} if config.field_degrees is None else set()
    told |= {Flag.RED_FREE} if rgb[:, 0].mean() < config.least_redness * rgb[:, 1].mean() else set()
    return Quality(
        brightness=float(green.mean()),
        contrast=float(green.std()),
        vessel_contrast=vessels,
        sharpness=float(cv2.Laplacian(half[:, :, 1], cv2.CV_32F)[inner_half].std() / 255),
        focus=focus,
        score=score,
        gradable=score >= 0.5 and Flag.MORE_DISCS not in told,
        flags=tuple(flag for flag in Flag if flag in told),
    )


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


def _inner(fov: Bool[ndarray, "h w"], side_px: int) -> Bool[ndarray, "h w"]:
    kernel = np.ones((side_px, side_px), np.uint8)
    return cv2.erode(fov.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0) > 0
