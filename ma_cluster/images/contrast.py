"""Local contrast enhancement: a `Fundus` -> `Prepared`, evenly lit, lesions at full contrast, at both scales."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
from jaxtyping import Bool, UInt8
from numpy import ndarray

from ma_cluster.config import ImageConfig
from ma_cluster.images.fundus import Fov, Fundus, Grid, half_scale, half_scale_mask
from ma_cluster.images.quality import Quality, exposure_gain, local_mean

MID_GREY = 128


def enhance(
    rgb: UInt8[ndarray, "h w 3"], fov: Bool[ndarray, "h w"], sigma_px: float, gain: float
) -> UInt8[ndarray, "h w 3"]:
    """I' = gain I - gain (G * I) + 128 for each channel, clipped to 0..255; 128 outside the FOV (van Grinsven 2016).

    Args:
        rgb: canonical photograph at either scale.
        fov: its field of view.
        sigma_px: standard deviation of G, pixels of this grid.
        gain: alpha, without unit.
    """
    mean = local_mean(rgb, fov, sigma_px)
    enhanced = cv2.addWeighted(rgb, gain, mean, -gain, MID_GREY, dtype=cv2.CV_8U)
    enhanced[~fov] = MID_GREY
    return enhanced


@dataclass(frozen=True, slots=True)
class Prepared:
    """A photograph as the networks see it: enhanced on the 1x and the 0.5x grid, with its field of view on both.

    `pixels` is the upright photograph itself, for the overlay and for the way back from the canonical grid.
    """

    pixels: UInt8[ndarray, "ph pw 3"]
    enhanced_1x: UInt8[ndarray, "h w 3"]
    fov_1x: Bool[ndarray, "h w"]
    enhanced_half: UInt8[ndarray, "hh hw 3"]
    fov_half: Bool[ndarray, "hh hw"]
    fov: Fov
    grid: Grid
    quality: Quality

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the photograph, pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]


def prepare(fundus: Fundus, quality: Quality, config: ImageConfig) -> Prepared:
    """Enhance both scales of a photograph; sigma is the same share of the FOV's diameter at each.

    The gain is larger where the photograph is dim or hazy: at half its brightness it has the lesions of the whole one.
    """
    sigma = config.sigma_ratio * config.fov_diameter_px
    half, fov_half = half_scale(fundus.canonical), half_scale_mask(fundus.canonical_fov)
    gain = config.contrast_gain * exposure_gain(quality.brightness, quality.vessel_contrast, config)
    return Prepared(
        pixels=fundus.pixels,
        enhanced_1x=enhance(fundus.canonical, fundus.canonical_fov, sigma, gain),
        fov_1x=fundus.canonical_fov,
        enhanced_half=enhance(half, fov_half, sigma / 2, gain),
        fov_half=fov_half,
        fov=fundus.fov,
        grid=fundus.grid,
        quality=quality,
    )
