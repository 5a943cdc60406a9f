"""A fused probability map -> the lesions, and how they are shown: table, 1-bit mask, photograph with each one outlined.

Lesions are components above the threshold, measured on the photograph's grid.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8
from numpy import ndarray
from PIL import Image

from ma_cluster.config import DetectorConfig
from ma_cluster.images.fundus import Fov

OUTLINE_RGB = (64, 255, 64)  # absent from a retina, and visible to most of those who are colour-blind
JPEG_QUALITY = 90


@dataclass(frozen=True, slots=True)
class Lesion:
    """One microaneurysm. Positions and sizes in pixels of the upright photograph."""

    id: int
    """1, 2, ... from the surest (largest score) down."""
    row: float
    col: float
    """Centroid; pixel centres are at integers."""
    bbox: tuple[int, int, int, int]
    """top, left, bottom, right; bottom and right lie just outside."""
    area_px: int
    diameter_px: float
    """Of the disc of the same area."""
    score: float
    """How sure it is, 0..1: what the model's judge of whole candidates says; `score_max` of a model without one."""
    score_mean: float
    score_max: float
    """Mean and largest fused probability within the lesion, 0..1."""
    fov_distance_px: float
    """From the centre of the field of view to the centroid."""


def find_lesions(
    probability: Float32[ndarray, "h w"],
    judged: Float32[ndarray, "h w"] | None,
    smallest_px: float,
    fov: Fov,
    config: DetectorConfig,
) -> tuple[tuple[Lesion, ...], Bool[ndarray, "h w"]]:
    """Lesions and their mask.

    Components (8-connected) are formed on the photograph's grid, so mask and table agree to the pixel. Those that are
    too small, and those whose score is below `least_score`, are dropped from both.

    Args:
        probability: the fused map on the photograph's grid.
        judged: what the model's judge says of the candidates, on that grid; None of a model without one.
        smallest_px: least area of a lesion.
        fov: of the photograph.
        config: threshold and least score.
    """
    above = (probability >= config.threshold).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8)
    keep = [label for label in range(1, count) if stats[label, cv2.CC_STAT_AREA] >= smallest_px]
    lesions = []
    for label in keep:
        left, top, width, height = (int(value) for value in stats[label, :4])
        box = slice(top, top + height), slice(left, left + width)
        component = labels[box] == label
        lesion = _measure(component, probability[box], (top, left), fov)
        if judged is not None:
            lesion = replace(lesion, score=float(judged[box][component].max()))
        if lesion.score >= config.least_score:
            lesions.append(replace(lesion, id=label))
    lesions.sort(key=lambda lesion: (-lesion.score, lesion.row, lesion.col))
    kept = np.zeros(count, dtype=bool)
    kept[[lesion.id for lesion in lesions]] = True
    return tuple(replace(lesion, id=number) for number, lesion in enumerate(lesions, 1)), kept[labels]


def _measure(
    component: Bool[ndarray, "bh bw"], scores: Float32[ndarray, "bh bw"], corner: tuple[int, int], fov: Fov
) -> Lesion:
    """One component, cut out with its bounding box whose top left pixel is `corner`."""
    top, left = corner
    rows, cols = np.nonzero(component)
    row, col = top + rows.mean(), left + cols.mean()
    inside = scores[component]
    return Lesion(
        id=0,
        row=float(row),
        col=float(col),
        bbox=(top, left, top + component.shape[0], left + component.shape[1]),
        area_px=len(rows),
        diameter_px=float(2 * np.sqrt(len(rows) / np.pi)),
        score=float(inside.max()),
        score_mean=float(inside.mean()),
        score_max=float(inside.max()),
        fov_distance_px=float(np.hypot(row - fov.row, col - fov.col)),
    )


def draw_overlay(pixels: UInt8[ndarray, "h w 3"], mask: Bool[ndarray, "h w"]) -> UInt8[ndarray, "h w 3"]:
    """A copy of the photograph with a thin contour a few pixels outside each lesion, which stays visible."""
    thickness = max(1, round(min(mask.shape) / 1000))
    gap = 2 * thickness + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * gap + 1, 2 * gap + 1))
    grown = cv2.dilate(mask.astype(np.uint8), kernel)
    contours, _ = cv2.findContours(grown, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(pixels.copy(), contours, -1, OUTLINE_RGB, thickness, cv2.LINE_AA)


def encode_overlay(pixels: UInt8[ndarray, "h w 3"], mask: Bool[ndarray, "h w"]) -> bytes:
    """`draw_overlay` as a JPEG."""
    out = io.BytesIO()
    Image.fromarray(draw_overlay(pixels, mask)).save(out, format="JPEG", quality=JPEG_QUALITY)
    return out.getvalue()


def encode_mask(mask: Bool[ndarray, "h w"]) -> bytes:
    """The mask as a 1-bit PNG, white where there is a lesion."""
    out = io.BytesIO()
    Image.fromarray(mask).save(out, format="PNG")
    return out.getvalue()
