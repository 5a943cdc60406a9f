"""A photograph of a data set as training sees it: enhanced pixels, field of view and lesions on the grid of a scale.

Also the patches cut from it, augmented by the eight symmetries of the square and by gains of the channels, and where
asked by any rotation, zoom and more of light (`Changes`). What is cut and how it is augmented are numbers first
(`Cuts`), so that the decision and the cutting may happen on different machines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64, Shaped, UInt8
from numpy import ndarray

from ma_cluster.config import HgnConfig, ImageConfig, Scale
from ma_cluster.images.datasets import Sample, decode_mask, kind_of, read_object
from ma_cluster.images.fundus import half_scale_mask
from ma_cluster.images.patches import crop, holds_place
from ma_cluster.images.reading import MID_GREY, Prepared, read_bytes

SYMMETRIES = 8
"""Flips and quarter turns of a square patch."""
UNKNOWN = 3
"""Bits from a kind, which is not the first of four, to the one that says that nobody looked for it."""
_BLUR_PX, _NOISE = (0.3, 1.0), (1.0, 6.0)  # standard deviations: least and largest


@dataclass(frozen=True, slots=True)
class Annotated:
    """One photograph on the canonical grid of a scale; `lesion` is all False where nothing is annotated."""

    enhanced: UInt8[ndarray, "h w 3"]
    fov: Bool[ndarray, "h w"]
    lesion: Bool[ndarray, "h w"]
    proposed: Bool[ndarray, "h w"] | None = None
    """Where a hypothesis network suspects lesions; None where none was asked."""
    kinds: UInt8[ndarray, "h w"] | None = None
    """Lesions of all kinds, bit k for kind k of KINDS, bit 0 as in `lesion`, and bit UNKNOWN + k where nobody looked
    for kind k; None where others are not asked for."""

    def marks(self) -> Marks:
        """A copy of the masks, which keeps nothing of the photograph in memory."""
        proposed, kinds = (None if mask is None else mask.copy() for mask in (self.proposed, self.kinds))
        return Marks(self.fov.copy(), self.lesion.copy(), proposed, kinds)


@dataclass(frozen=True, slots=True)
class Marks:
    """An `Annotated` without its pixels: all that is needed to choose what to cut."""

    fov: Bool[ndarray, "h w"]
    lesion: Bool[ndarray, "h w"]
    proposed: Bool[ndarray, "h w"] | None = None
    kinds: UInt8[ndarray, "h w"] | None = None


@dataclass(frozen=True, slots=True)
class Changes:
    """What else is changed of patches, as numbers of each."""

    degrees: Float64[ndarray, "n"]
    """It is rotated by."""
    zooms: Float64[ndarray, "n"]
    """It is magnified by."""
    offsets: Float64[ndarray, "n 3"]
    """Grey levels added to each channel."""
    blurs: Float64[ndarray, "n"]
    """Standard deviation of the Gaussian it is blurred by, pixels; 0: it is not."""
    noises: Float64[ndarray, "n"]
    """Standard deviation of the noise, grey levels."""
    seeds: Int64[ndarray, "n"]
    """Of the noise."""

    def __getitem__(self, rows: slice | Int64[ndarray, "m"]) -> Changes:
        return Changes(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True, slots=True)
class Cuts:
    """Patches as numbers: the centre of each as (image, row, col), its symmetry (0..7) and each channel's gain."""

    centres: Int32[ndarray, "n 3"]
    symmetries: Int32[ndarray, "n"]
    gains: Float64[ndarray, "n 3"]
    changes: Changes | None = None

    def __len__(self) -> int:
        return len(self.centres)

    def __getitem__(self, rows: slice | Int64[ndarray, "m"]) -> Cuts:
        changes = None if self.changes is None else self.changes[rows]
        return Cuts(self.centres[rows], self.symmetries[rows], self.gains[rows], changes)


def load_annotated(
    sample: Sample,
    scale: Scale,
    config: ImageConfig,
    propose: Callable[[Prepared], Bool[ndarray, "h w"]] | None = None,
    kinds: Sequence[str] = (),
) -> Annotated:
    """Fetch, decode, scale and enhance a sample, its mask alongside.

    Args:
        sample: photograph and masks.
        scale: of the grid.
        config: of the image.
        propose: says where lesions are suspected, at 1x.
        kinds: of lesions, in the order of their bits; the first is the microaneurysm.

    Raises:
        ImageRefusedError: the photograph cannot be used.
        StoreError: photograph or mask cannot be read.
        UsageError: they are of different sizes.
    """
    prepared, _ = read_bytes(read_object(sample.image), config)
    if sample.mask is None:
        lesion = np.zeros(prepared.fov_1x.shape, dtype=bool)
    else:
        lesion = prepared.grid.crop_mask(decode_mask(read_object(sample.mask), prepared.shape))
    proposed = None if propose is None else propose(prepared)
    annotated = Annotated(prepared.enhanced_1x, prepared.fov_1x, lesion, proposed)
    if scale == "0.5x":
        halved = None if proposed is None else half_scale_mask(proposed)
        annotated = Annotated(prepared.enhanced_half, prepared.fov_half, half_scale_mask(lesion), halved)
    if len(kinds) < 2:
        return annotated
    marked, masks = annotated.lesion.astype(np.uint8), {kind_of(url): url for url in sample.other_masks}
    for bit, kind in enumerate(kinds):
        if kind in masks:
            mask = prepared.grid.crop_mask(decode_mask(read_object(masks[kind]), prepared.shape))
            marked |= (mask if scale == "1x" else half_scale_mask(mask)).astype(np.uint8) << bit
        elif bit and not sample.others_known:
            marked |= np.uint8(1 << UNKNOWN + bit)
    return replace(annotated, kinds=marked)


def draw_cuts(centres: Int32[ndarray, "n 3"], rng: np.random.Generator, colour_jitter: float) -> Cuts:
    """An augmentation for each centre, one after the other."""
    symmetries, gains = np.empty(len(centres), np.int32), np.empty((len(centres), 3))
    for number in range(len(centres)):
        symmetries[number] = rng.integers(SYMMETRIES)
        gains[number] = draw_gains(rng, colour_jitter)
    return Cuts(centres, symmetries, gains)


def plain_cuts(centres: Int32[ndarray, "n 3"]) -> Cuts:
    """Patches as they are, without augmentation."""
    return Cuts(centres, np.zeros(len(centres), np.int32), np.ones((len(centres), 3)))


def changed(cuts: Cuts, rng: np.random.Generator, config: HgnConfig) -> Cuts:
    """The same cuts with all changes that a config asks for; as they are where it asks for none."""
    count = len(cuts)
    geometry, light = config.any_rotation or config.zoom > 1, config.offset or config.blur_share or config.noise_share
    if not (geometry or light or config.contrast_low < config.contrast_high):
        return cuts
    changes = Changes(
        degrees=rng.uniform(0, 360 * config.any_rotation, count),
        zooms=np.exp(rng.uniform(-1, 1, count) * np.log(config.zoom)),
        offsets=rng.uniform(-config.offset, config.offset, (count, 3)),
        blurs=rng.uniform(*_BLUR_PX, count) * (rng.random(count) < config.blur_share),
        noises=rng.uniform(*_NOISE, count) * (rng.random(count) < config.noise_share),
        seeds=rng.integers(2**62, size=count),
    )
    contrast = rng.uniform(config.contrast_low, config.contrast_high, (count, 1))
    return Cuts(cuts.centres, cuts.symmetries, cuts.gains * contrast, changes)


def cut(
    photographs: Mapping[int, Annotated] | Sequence[Annotated], cuts: Cuts, size: int
) -> tuple[UInt8[ndarray, "n s s 3"], UInt8[ndarray, "n s s"]]:
    """The augmented patches and the lesions in them; mid-grey and no lesion beyond a photograph's grid.

    Returns:
        The patches; and the bits of `Annotated.kinds` at each pixel.
    """
    patches = np.empty((len(cuts), size, size, 3), np.uint8)
    lesions = np.empty((len(cuts), size, size), np.uint8)
    for number, (image, row, col) in enumerate(cuts.centres.tolist()):
        photograph, symmetry, changes = photographs[image], int(cuts.symmetries[number]), cuts.changes
        marked = planes(photograph)
        if changes is None:
            patch, marks = crop(photograph.enhanced, row, col, size, MID_GREY), crop(marked, row, col, size, 0)
            patches[number] = scale_contrast(turn(patch, symmetry), cuts.gains[number])
        else:
            placed = _placed((row, col), size, changes.degrees[number], changes.zooms[number])
            patch = _warp(photograph.enhanced, placed, size, cv2.INTER_LINEAR, MID_GREY)
            marks = _warp(marked, placed, size, cv2.INTER_NEAREST, 0)
            patches[number] = _relit(turn(patch, symmetry), cuts.gains[number], changes, number)
        lesions[number] = turn(marks, symmetry)
    return patches, lesions


def planes(photograph: Annotated) -> UInt8[ndarray, "h w"]:
    """The bits of `Annotated.kinds`, as far as they are known of a photograph."""
    return photograph.lesion.view(np.uint8) if photograph.kinds is None else photograph.kinds


def _placed(centre: Sequence[int], size: int, degrees: float, zoom: float) -> Float64[ndarray, "2 3"]:
    """From (col, row) of the photograph to those of a patch, whose pixel (size // 2, size // 2) is the centre."""
    row, col = centre
    matrix = np.asarray(cv2.getRotationMatrix2D((float(col), float(row)), float(degrees), float(zoom)))
    matrix[:, 2] += (size // 2 - col, size // 2 - row)
    return matrix


def _warp(image: ndarray, placed: Float64[ndarray, "2 3"], size: int, how: int, fill: int) -> ndarray:
    side, edge, beyond = (size, size), cv2.BORDER_CONSTANT, (fill,) * 3
    return np.asarray(cv2.warpAffine(image, placed, side, flags=how, borderMode=edge, borderValue=beyond))


def _relit(
    patch: UInt8[ndarray, "s s 3"], gains: Float64[ndarray, "3"], changes: Changes, number: int
) -> UInt8[ndarray, "s s 3"]:
    """Gains, blur, noise and shift."""
    light = _amplified(patch, gains)
    if changes.blurs[number]:
        light = cv2.GaussianBlur(light, (0, 0), float(changes.blurs[number]))
    if changes.noises[number]:
        noise = np.random.default_rng(changes.seeds[number]).standard_normal(light.shape, np.float32)
        light = light + np.float32(changes.noises[number]) * noise
    return _rounded(light + changes.offsets[number].astype(np.float32))


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
    return _rounded(_amplified(patch, gains))


def _amplified(patch: UInt8[ndarray, "s s 3"], gains: Float64[ndarray, "3"]) -> Float32[ndarray, "s s 3"]:
    return (patch.astype(np.float32) - MID_GREY) * gains.astype(np.float32) + MID_GREY


def _rounded(light: Float32[ndarray, "s s 3"]) -> UInt8[ndarray, "s s 3"]:
    return np.clip(np.rint(light), 0, 255).astype(np.uint8)
