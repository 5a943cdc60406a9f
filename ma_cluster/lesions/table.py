"""A fused probability map -> the lesion table: components above the threshold, measured on the photograph's grid."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
from jaxtyping import Bool, Float32
from numpy import ndarray

from ma_cluster.config import DetectorConfig
from ma_cluster.images.fundus import Fov, Grid


@dataclass(frozen=True, slots=True)
class Lesion:
    """One microaneurysm. Positions and sizes in pixels of the upright photograph."""

    id: int
    """1, 2, ... from the surest (largest score_max) down."""
    row: float
    col: float
    """Centroid; pixel centres are at integers."""
    bbox: tuple[int, int, int, int]
    """top, left, bottom, right; bottom and right lie just outside."""
    area_px: int
    diameter_px: float
    """Of the disc of the same area."""
    score_mean: float
    score_max: float
    """Mean and largest fused probability within the lesion, 0..1."""
    fov_distance_px: float
    """From the centre of the field of view to the centroid."""


def find_lesions(
    probability: Float32[ndarray, "ch cw"], grid: Grid, fov: Fov, shape: tuple[int, int], config: DetectorConfig
) -> tuple[tuple[Lesion, ...], Bool[ndarray, "h w"]]:
    """Lesions and their mask on the photograph's grid.

    Components (8-connected) are formed after the way back, so mask and table agree to the pixel. Those under
    `min_area_px`, counted on the canonical grid, and those whose surest pixel is below `least_score` are dropped from
    both.
    """
    scores = grid.uncrop(probability, shape)
    above = (scores >= config.threshold).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8)
    smallest = config.min_area_px / grid.scale**2
    keep = [label for label in range(1, count) if stats[label, cv2.CC_STAT_AREA] >= smallest]
    lesions = []
    for label in keep:
        left, top, width, height = (int(value) for value in stats[label, :4])
        box = slice(top, top + height), slice(left, left + width)
        lesion = _measure(labels[box] == label, scores[box], (top, left), fov)
        if lesion.score_max >= config.least_score:
            lesions.append(replace(lesion, id=label))
    lesions.sort(key=lambda lesion: (-lesion.score_max, lesion.row, lesion.col))
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
        score_mean=float(inside.mean()),
        score_max=float(inside.max()),
        fov_distance_px=float(np.hypot(row - fov.row, col - fov.col)),
    )
