"""The one way from a photograph to network input, with what is said of its quality. No Ray in here.

    object -> `read_photograph` -> bytes -> `read_bytes` -> upright RGB -> `read_pixels` -> Prepared, Facts

The last step enhances the local contrast: evenly lit, lesions at full contrast, at both scales. Whatever goes wrong
comes back as that photograph's ImageError. Only the decoder sees the bytes; from its pixels on nothing depends on what
a stranger has written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import cv2
from jaxtyping import Bool, UInt8
from numpy import ndarray

from ma_cluster.config import ImageConfig, KnownField
from ma_cluster.errors import (
    Flag,
    ImageFailedError,
    ImageRefusedError,
    ObjectChangedError,
    ObjectMissingError,
    Reason,
    SourceLostError,
    StoreError,
    UsageError,
)
from ma_cluster.images.acquisition import Acquisition
from ma_cluster.images.decode import Decoded
from ma_cluster.images.decode import decode as decode_here
from ma_cluster.images.fundus import Fov, Fundus, Grid, half_scale, half_scale_mask, locate
from ma_cluster.images.laterality import Side, tell_eye
from ma_cluster.images.quality import Quality, assess, exposure_gain, local_mean
from ma_cluster.storage.manifest import Source
from ma_cluster.storage.store import Entry

MID_GREY = 128
Decode = Callable[[bytes], Decoded]


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


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a photograph once it is read, without its pixels."""

    height: int
    width: int
    fov: Fov
    quality: Quality
    seconds: dict[str, float]
    """Wall time of the stages fetch (where it was fetched), decode and prepare."""
    acquisition: Acquisition | None = None
    """What a DICOM file says of the patient, the eye and the day; None of other files."""
    side: Side | None = None
    """Which eye the picture shows; None where it cannot be told."""
    sha256: str | None = None
    """Of the encoded photograph's bytes."""


def read_photograph(source: Source, entry: Entry, config: ImageConfig, decode: Decode) -> tuple[Prepared, Facts]:
    """Fetch the object that was planned and read it.

    Raises:
        ImageError: as `read_bytes` raises it; unsupported, where the manifest says something of it that cannot be.
        ImageFailedError: missing, where there was no such object from the start; changed, where it is not the one that
            was planned; store_error, where the store failed.
        SourceLostError: store_error, where the store does not tell of it any more either.
    """
    if entry.fault and entry.etag:
        raise ImageRefusedError(Reason.UNSUPPORTED, entry.fault)
    if entry.fault:
        raise ImageFailedError(Reason.MISSING, entry.fault)
    config = KnownField(entry.field_degrees, entry.no_surround).told(config)
    began = time.perf_counter()
    data = _fetch(source, entry, config)
    seconds = {"fetch": time.perf_counter() - began}
    prepared, facts = read_bytes(data, config, decode)
    return prepared, dataclasses.replace(facts, seconds=seconds | facts.seconds)


def read_bytes(data: bytes, config: ImageConfig, decode: Decode | None = None) -> tuple[Prepared, Facts]:
    """Decode an encoded photograph, find its FOV and enhance it.

    Args:
        data: its bytes.
        config: how it becomes network input; a field that it does not know is the one that a DICOM file tells.
        decode: who decodes bytes that nobody vouches for; by default this process does.

    Raises:
        ImageError: as the decoder raises it.
        ImageRefusedError: its content cannot be scored.
    """
    began = time.perf_counter()
    photograph = decode_here(data, config) if decode is None else decode(data)
    decoded, acquisition = time.perf_counter(), photograph.acquisition
    if acquisition is not None and not config.field_degrees:
        config = KnownField(acquisition.field_degrees).told(config)
    prepared, facts = read_pixels(photograph.pixels, config, photograph.flags)
    seconds = {"decode": decoded - began} | facts.seconds
    sha256 = hashlib.sha256(data).hexdigest()
    return prepared, dataclasses.replace(facts, seconds=seconds, acquisition=acquisition, sha256=sha256)


def read_pixels(
    pixels: UInt8[ndarray, "h w 3"], config: ImageConfig, noticed: tuple[Flag, ...] = ()
) -> tuple[Prepared, Facts]:
    """Find the FOV of an upright photograph, judge it and enhance it; `noticed` are flags from its decoding.

    Raises:
        ImageRefusedError: too_small or no_fov.
    """
    began = time.perf_counter()
    fundus = locate(pixels, config)
    quality = assess(fundus, noticed, config)
    prepared = prepare(fundus, quality, config)
    side = tell_eye(fundus, config.fov_diameter_px)
    seconds = {"prepare": time.perf_counter() - began}
    return prepared, Facts(*prepared.shape, prepared.fov, quality, seconds, side=side)


def _fetch(source: Source, entry: Entry, config: ImageConfig) -> bytes:
    try:
        data = source.get(entry.key, max_bytes=config.max_bytes, etag=entry.etag or None)
    except UsageError as error:  # a row of a manifest that leads to no store
        raise ImageFailedError(Reason.MISSING, str(error)) from error
    except ObjectMissingError as error:
        raise ImageFailedError(Reason.CHANGED if entry.etag else Reason.MISSING, str(error)) from error
    except ObjectChangedError as error:
        raise ImageFailedError(Reason.CHANGED, str(error)) from error
    except StoreError as error:
        lost = entry.etag and not _is_told_of(source, entry)
        raise (SourceLostError if lost else ImageFailedError)(Reason.STORE_ERROR, str(error)) from error
    if not entry.etag:
        raise ImageFailedError(Reason.CHANGED, "it was not there when the archive was planned")
    if (
        entry.size and len(data) != entry.size
    ):  # of a store that sends no checksum, whose Content-Length says too little
        raise ImageFailedError(Reason.STORE_ERROR, f"{len(data)} bytes came, {entry.size} were listed")
    return data


def _is_told_of(source: Source, entry: Entry) -> bool:
    """Whether a source tells of a photograph that it does not give: then the fault is of that photograph alone."""
    try:
        source.head(entry.key)
    except StoreError:
        return False
    return True


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
