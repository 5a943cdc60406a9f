"""A photograph of a data set as training sees it: enhanced pixels, field of view and lesions on the grid of a scale.

Also the patches cut from it, augmented by the eight symmetries of the square and by gains of the channels. What is cut
and how it is augmented are numbers first (`Cuts`), so that the decision and the cutting may happen on different
machines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64, Shaped, UInt8
from numpy import ndarray

from ma_cluster.config import ImageConfig, Scale
from ma_cluster.images.contrast import MID_GREY, Prepared
from ma_cluster.images.datasets import Sample, decode_mask, read_object
from ma_cluster.images.fundus import half_scale_mask
from ma_cluster.images.patches import crop
from ma_cluster.images.pool import holds_place
from ma_cluster.images.reading import read_bytes

SYMMETRIES = 8
"""Flips and quarter turns of a square patch."""


@dataclass(frozen=True, slots=True)
class Annotated:
    """One photograph on the canonical grid of a scale; `lesion` is all False where nothing is annotated."""

    enhanced: UInt8[ndarray, "h w 3"]
    fov: Bool[ndarray, "h w"]
    lesion: Bool[ndarray, "h w"]
    proposed: Bool[ndarray, "h w"] | None = None
    """Where a hypothesis network suspects lesions; None where none was asked."""

    def marks(self) -> Marks:
        """A copy of the masks, which keeps nothing of the photograph in memory."""
        return Marks(self.fov.copy(), self.lesion.copy(), None if self.proposed is None else self.proposed.copy())


@dataclass(frozen=True, slots=True)
class Marks:
    """An `Annotated` without its pixels: all that is needed to choose what to cut."""

    fov: Bool[ndarray, "h w"]
    lesion: Bool[ndarray, "h w"]
    proposed: Bool[ndarray, "h w"] | None = None


@dataclass(frozen=True, slots=True)
class Cuts:
    """Patches as numbers: the centre of each as (image, row, col), its symmetry (0..7) and each channel's gain."""

    centres: Int32[ndarray, "n 3"]
    symmetries: Int32[ndarray, "n"]
    gains: Float64[ndarray, "n 3"]

    def __len__(self) -> int:
        return len(self.centres)

    def __getitem__(self, rows: slice | Int64[ndarray, "m"]) -> Cuts:
        return Cuts(self.centres[rows], self.symmetries[rows], self.gains[rows])


def load_annotated(
    sample: Sample, scale: Scale, config: ImageConfig, propose: Callable[[Prepared], Bool[ndarray, "h w"]] | None = None
) -> Annotated:
    """Fetch, decode, scale and enhance a sample, its mask alongside; `propose` says where lesions are suspected, at 1x.

    Raises:
        ImageRefusedError: the photograph cannot be used.
        StoreError: photograph or mask cannot be read.
    """
    prepared, _ = read_bytes(read_object(sample.image), config)
    if sample.mask is None:
        lesion = np.zeros(prepared.fov_1x.shape, dtype=bool)
    else:
        lesion = prepared.grid.crop_mask(decode_mask(read_object(sample.mask)))
    proposed = None if propose is None else propose(prepared)
    if scale == "1x":
        return Annotated(prepared.enhanced_1x, prepared.fov_1x, lesion, proposed)
    halved = None if proposed is None else half_scale_mask(proposed)
    return Annotated(prepared.enhanced_half, prepared.fov_half, half_scale_mask(lesion), halved)


def draw_cuts(centres: Int32[ndarray, "n 3"], rng: np.random.Generator, colour_jitter: float) -> Cuts:
    """An augmentation for each centre, one after the other."""
    symmetries, gains = np.empty(len(centres), np.int32), np.empty((len(centres), 3))
    for number in range(len(centres)):
        symmetries[number] = rng.integers(SYMMETRIES)
        gains[number] = draw_gains(rng, colour_jitter)
    return Cuts(centres, symmetries, gains)


def cut(
    photographs: Mapping[int, Annotated] | Sequence[Annotated], cuts: Cuts, size: int
) -> tuple[UInt8[ndarray, "n s s 3"], Bool[ndarray, "n s s"]]:
    """The augmented patches and their lesion masks; mid-grey and no lesion beyond a photograph's grid."""
    patches = np.empty((len(cuts), size, size, 3), np.uint8)
    lesions = np.empty((len(cuts), size, size), np.bool_)
    for number, (image, row, col) in enumerate(cuts.centres.tolist()):
        photograph, symmetry = photographs[image], int(cuts.symmetries[number])
        patch = turn(crop(photograph.enhanced, row, col, size, MID_GREY), symmetry)
        patches[number] = scale_contrast(patch, cuts.gains[number])
        lesions[number] = turn(crop(photograph.lesion, row, col, size, 0), symmetry)
    return patches, lesions


def lesion_free(photograph: Annotated | Marks, margin_px: int) -> Bool[ndarray, "h w"]:
    """Where healthy patches may come from: not within `margin_px` of an annotated lesion, and where a hypothesis
    network suspects one all the same; anywhere in the field of view where none was asked, or suspects nothing.
    """
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * margin_px + 1, 2 * margin_px + 1))
    free = photograph.fov & ~cv2.dilate(photograph.lesion.astype(np.uint8), kernel).astype(bool)
    if photograph.proposed is None or not holds_place(free & photograph.proposed):
        return free
    return free & photograph.proposed


def turn(patch: Shaped[ndarray, "s s ..."], symmetry: int) -> Shaped[ndarray, "s s ..."]:
    """One of the eight flips and quarter turns, numbered 0 (none) to 7."""
    turned = np.rot90(patch, symmetry % 4)
    return turned[:, ::-1] if symmetry >= 4 else turned


def draw_gains(rng: np.random.Generator, largest: float) -> Float64[ndarray, "3"]:
    """A factor within 1 +- `largest` for each channel."""
    return 1 + largest * rng.uniform(-1, 1, size=3)


def scale_contrast(patch: UInt8[ndarray, "s s 3"], gains: Float64[ndarray, "3"]) -> UInt8[ndarray, "s s 3"]:
    """Each channel's distance from mid-grey times its gain, clipped to 0..255."""
    scaled = (patch.astype(np.float32) - MID_GREY) * gains.astype(np.float32) + MID_GREY
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
