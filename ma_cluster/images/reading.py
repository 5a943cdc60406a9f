"""The one way from a photograph to network input, with what is said of its quality. No Ray in here.

    object -> `read_photograph` -> bytes -> `read_bytes` -> upright RGB -> `read_pixels` -> Prepared, Facts

Whatever goes wrong comes back as that photograph's ImageError. Only the decoder sees the bytes; from its pixels on
nothing depends on what a stranger has written.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import UInt8
from numpy import ndarray

from ma_cluster.config import ImageConfig, KnownField
from ma_cluster.errors import (
    Flag,
    ImageFailedError,
    ImageRefusedError,
    ObjectChangedError,
    ObjectMissingError,
    Reason,
    StoreError,
    UsageError,
)
from ma_cluster.images.contrast import Prepared, prepare
from ma_cluster.images.decode import Decoded
from ma_cluster.images.decode import decode as decode_here
from ma_cluster.images.fundus import Fov, locate
from ma_cluster.images.quality import Quality, assess
from ma_cluster.storage.manifest import Source
from ma_cluster.storage.store import Entry

Decode = Callable[[bytes], Decoded]


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a photograph once it is read, without its pixels."""

    height: int
    width: int
    fov: Fov
    quality: Quality
    seconds: dict[str, float]
    """Wall time of the stages fetch (where it was fetched), decode and prepare."""


def read_photograph(source: Source, entry: Entry, config: ImageConfig, decode: Decode) -> tuple[Prepared, Facts]:
    """Fetch the object that was planned and read it.

    Raises:
        ImageError: as `read_bytes` raises it; unsupported, where the manifest says something of it that cannot be.
        ImageFailedError: missing, where there was no such object from the start; changed, where it is not the one that
            was planned; store_error, where the store failed.
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
        config: how it becomes network input.
        decode: who decodes bytes that nobody vouches for; by default this process does.

    Raises:
        ImageError: as the decoder raises it.
        ImageRefusedError: its content cannot be scored.
    """
    began = time.perf_counter()
    photograph = decode_here(data, config) if decode is None else decode(data)
    decoded = time.perf_counter()
    prepared, facts = read_pixels(photograph.pixels, config, photograph.flags)
    return prepared, dataclasses.replace(facts, seconds={"decode": decoded - began} | facts.seconds)


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
    return prepared, Facts(*prepared.shape, prepared.fov, quality, {"prepare": time.perf_counter() - began})


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
        raise ImageFailedError(Reason.STORE_ERROR, str(error)) from error
    if not entry.etag:
        raise ImageFailedError(Reason.CHANGED, "it was not there when the archive was planned")
    if len(data) != entry.size:  # of a store that sends no checksum, whose Content-Length says too little
        raise ImageFailedError(Reason.STORE_ERROR, f"{len(data)} bytes came, {entry.size} were listed")
    return data
