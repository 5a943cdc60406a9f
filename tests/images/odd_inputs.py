"""Containers that Pillow's writers do not write: TIFF samples of any type, PNG chunks of any content, odd headers."""

from __future__ import annotations

import struct
import zlib

import numpy as np

PNG_BODY = 33
"""Bytes of a PNG's signature and header: chunks may go in from here on."""
KIND = {"u": 1, "i": 2, "f": 3}  # the sample formats of TIFF
DICOM = bytes(128) + b"DICM" + bytes(4000)
HEIC = struct.pack(">I4s4sI4s", 20, b"ftyp", b"heic", 0, b"mif1") + bytes(4000)
AVIF = struct.pack(">I4s4sI4s", 20, b"ftyp", b"avif", 0, b"mif1") + bytes(4000)


def png_chunk(kind: bytes, body: bytes, crc: int | None = None) -> bytes:
    """A chunk of a PNG, with a check sum of choice."""
    return (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) if crc is None else crc)
    )


def png_with(png: bytes, kind: bytes, body: bytes, crc: int | None = None) -> bytes:
    """A PNG with one chunk more."""
    return png[:PNG_BODY] + png_chunk(kind, body, crc) + png[PNG_BODY:]


def jpeg_with_end(jpeg: bytes, share: float) -> bytes:
    """A JPEG cut at a share of its length, an end marker glued on."""
    return jpeg[: int(len(jpeg) * share)] + b"\xff\xd9"


def jpeg_with_hole(jpeg: bytes, length: int) -> bytes:
    """A JPEG with zeros in its middle."""
    half = len(jpeg) // 2
    return jpeg[:half] + bytes(length) + jpeg[half + length :]


def jpeg_frame(jpeg: bytes, marker: int, bits: int = 8) -> bytes:
    """A JPEG whose frame header is of another kind and depth."""
    at = jpeg.index(b"\xff\xc0")
    return jpeg[: at + 1] + bytes([marker]) + jpeg[at + 2 : at + 4] + bytes([bits]) + jpeg[at + 5 :]


def tiff(*pages: np.ndarray, planes_apart: bool = False, tags: dict[int, int] | None = None) -> bytes:
    """An uncompressed little-endian TIFF, a strip for each page (or plane). `tags` are added to every page."""
    out, link = bytearray(b"II*\0\0\0\0\0"), 4
    for page in pages:
        samples = page.shape[2] if page.ndim == 3 else 1
        planes = np.moveaxis(page, 2, 0) if planes_apart else page[None]
        offsets = []
        for plane in planes:
            offsets.append(len(out))
            out += plane.tobytes() + bytes(plane.nbytes % 2)
        values = {256: [page.shape[1]], 257: [page.shape[0]], 258: [8 * page.itemsize] * samples, 259: [1]}
        values |= {262: [2 if samples > 1 else 1], 273: offsets, 277: [samples], 278: [page.shape[0]]}
        values |= {279: [planes[0].nbytes] * len(planes), 284: [2 if planes_apart else 1]}
        values |= {339: [KIND[page.dtype.kind]] * samples} | {tag: [value] for tag, value in (tags or {}).items()}
        struct.pack_into("<I", out, link, len(out) + sum(4 * len(v) for v in values.values() if len(v) > 1))
        link = _write_directory(out, values)
    return bytes(out)


def _write_directory(out: bytearray, values: dict[int, list[int]]) -> int:
    """Append long values, then the directory; where the link to the next one lies."""
    entries = b""
    for tag, numbers in sorted(values.items()):
        body = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            place = len(out)
            out += body
            body = struct.pack("<I", place)
        entries += struct.pack("<HHI", tag, 4, len(numbers)) + body
    out += struct.pack("<H", len(values)) + entries + bytes(4)
    return len(out) - 4
