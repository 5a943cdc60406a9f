"""A photograph of a data set as training sees it: enhanced pixels, field of view and lesions on the grid of a scale."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from numpy import ndarray

from ma_cluster.config import ImageConfig, Scale
from ma_cluster.images.augment import SYMMETRIES, jitter, turn
from ma_cluster.images.contrast import MID_GREY, prepare
from ma_cluster.images.datasets import Sample, decode_mask, read_object
from ma_cluster.images.fundus import half_scale_mask, read_fundus
from ma_cluster.images.patches import crop


@dataclass(frozen=True, slots=True)
class Annotated:
    """One photograph on the canonical grid of a scale; `lesion` is all False where nothing is annotated."""

    enhanced: UInt8[ndarray, "h w 3"]
    fov: Bool[ndarray, "h w"]
    lesion: Bool[ndarray, "h w"]


def load_annotated(sample: Sample, scale: Scale, config: ImageConfig) -> Annotated:
    """Fetch, decode, scale and enhance a sample, its mask alongside.

    Raises:
        ImageRefusedError: the photograph cannot be used.
        StoreError: photograph or mask cannot be read.
    """
    fundus = read_fundus(read_object(sample.image), config)
    prepared = prepare(fundus, config)
    if sample.mask is None:
        lesion = np.zeros(prepared.fov_1x.shape, dtype=bool)
    else:
        lesion = fundus.grid.crop_mask(decode_mask(read_object(sample.mask)))
    if scale == "1x":
        return Annotated(prepared.enhanced_1x, prepared.fov_1x, lesion)
    return Annotated(prepared.enhanced_half, prepared.fov_half, half_scale_mask(lesion))


def cut(
    photograph: Annotated, centre: tuple[int, int], size: int, rng: np.random.Generator, colour_jitter: float
) -> tuple[UInt8[ndarray, "s s 3"], Bool[ndarray, "s s"]]:
    """An augmented training patch and its lesion mask around (row, col); mid-grey and no lesion beyond the grid."""
    row, col = centre
    symmetry = int(rng.integers(SYMMETRIES))
    patch = turn(crop(photograph.enhanced, row, col, size, MID_GREY), symmetry)
    return jitter(patch, rng, colour_jitter), turn(crop(photograph.lesion, row, col, size, 0), symmetry)


def lesion_free(photograph: Annotated, margin_px: int) -> Bool[ndarray, "h w"]:
    """The field of view without every pixel within `margin_px` of an annotated lesion."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * margin_px + 1, 2 * margin_px + 1))
    return photograph.fov & ~cv2.dilate(photograph.lesion.astype(np.uint8), kernel).astype(bool)
