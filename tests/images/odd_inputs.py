"""Photographs as cameras and hospitals give them, and the containers that Pillow's writers do not write."""

from __future__ import annotations

import gzip
import struct
import zlib
from base64 import b64encode
from dataclasses import dataclass

import cv2
import numpy as np
from photographs import encode
from PIL import Image

from ma_cluster.config import ImageConfig
from ma_cluster.errors import Flag, Reason
from ma_cluster.images.fundus import find_fov

PNG_BODY = 33
"""Bytes of a PNG's signature and header: chunks may go in from here on."""
KIND = {"u": 1, "i": 2, "f": 3}  # the sample formats of TIFF
NO_KIND = bytes(128) + b"DICM" + struct.pack("<HH2sH20s", 2, 16, b"UI", 20, b"1.2.840.10008.1.2.1\0") + bytes(20_000)
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


@dataclass(frozen=True)
class Odd:
    """A file, and what is right for it."""

    data: bytes
    like: str | None = None
    """The file that it is to be read as; None where it has an answer of its own."""
    reason: Reason | None = None
    """Why it is refused; None where it is scored."""
    says: str = ""
    """What its words hold, a pattern."""
    flags: frozenset[Flag] = frozenset()
    """What is told of it beside what every photograph is told."""
    gradable: bool = True


def reduced(pixels: np.ndarray, diameter_px: int) -> np.ndarray:
    """A photograph cut to its disc, which is then so wide."""
    fov, _ = find_fov(pixels, ImageConfig())
    ratio, edge = diameter_px / fov.diameter_px, 0.53 * fov.diameter_px
    rows, cols = (slice(max(0, round(at - edge)), round(at + edge)) for at in (fov.row, fov.col))
    return cv2.resize(pixels[rows, cols], None, fx=ratio, fy=ratio, interpolation=cv2.INTER_AREA)


def odd_photographs(base: np.ndarray) -> dict[str, Odd]:
    """Every kind, made from one good photograph whose disc is 1,000 pixels wide."""
    grey = cv2.cvtColor(base, cv2.COLOR_RGB2GRAY)
    jpeg, png = encode(base, "JPEG", quality=95), encode(base, "PNG")
    references = {
        "base.png": Odd(png),
        "base.jpg": Odd(jpeg),
        "grey8.png": Odd(encode(Image.fromarray(grey), "PNG"), flags=frozenset({Flag.RED_FREE})),
    }
    return references | _metadata(png) | _depths(base, grey) | _damaged(base, jpeg) | _pages(base) | _seen(base)


def _metadata(png: bytes) -> dict[str, Odd]:
    packed = zlib.compress(b"<x:xmpmeta>" + b"history of edits " * 90_000 + b"</x:xmpmeta>")
    chunks: dict[str, tuple[bytes, bytes, int | None]] = {
        "png_exif.png": (b"eXIf", b"\0\x08\0\x02\x01\x12\0\x03" + bytes(20), None),
        "png_itxt.png": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed, None),
        "png_icc.png": (b"iCCP", b"big\0\0" + zlib.compress(bytes(2_000_000)), None),
        "png_text_crc.png": (b"tEXt", b"a\0bcd", 0),
    }
    return {name: Odd(png_with(png, *chunk), like="base.png") for name, chunk in chunks.items()}


def _depths(base: np.ndarray, grey: np.ndarray) -> dict[str, Odd]:
    red_free = frozenset({Flag.RED_FREE})
    grey12 = grey.astype(np.uint16) * 16
    planes = tiff(base.astype(np.uint16) * 257, planes_apart=True)
    height, width = base.shape[:2]
    jp2 = cv2.imencode(".jp2", cv2.cvtColor(base.astype(np.uint16) * 16, cv2.COLOR_RGB2BGR))[1].tobytes()
    ppm = b"P6 %d %d\n# of a camera\n65535\n" % (width, height) + (base * np.uint16(16)).astype(">u2").tobytes()
    white_is_zero = tiff(65535 - grey.astype(np.uint16) * 257, tags={262: 0})
    hidden = [np.full_like(grey, value) for value in (0, 128)]
    return {
        "rgb12in16.tif": Odd(tiff(base.astype(np.uint16) * 16), like="base.png"),
        "rgb12in16.jp2": Odd(jp2, like="base.png"),
        "rgb12in16.ppm": Odd(ppm, like="base.png"),
        "rgb12.ppm": Odd(ppm.replace(b"65535", b"4095", 1), like="base.png"),
        "cut.ppm": Odd(ppm[:-1], reason=Reason.TRUNCATED, says="fetch it again"),
        "rgb_signed16.tif": Odd(tiff(base.astype(np.int16) * 128), like="base.png"),
        "grey16_white_is_zero.tif": Odd(white_is_zero, like="grey8.png", flags=red_free),
        "rgba_hidden.png": Odd(encode(np.dstack([base, hidden[0]]), "PNG"), like="base.png"),
        "rgba_half_hidden.png": Odd(encode(np.dstack([base, hidden[1]]), "PNG"), like="base.png"),
        "rgb_float.tif": Odd(tiff((base / 255).astype(np.float32)), like="base.png"),
        "grey12in16.tif": Odd(tiff(grey12), like="grey8.png", flags=red_free),
        "grey12in16.png": Odd(encode(Image.fromarray(grey12), "PNG"), like="grey8.png", flags=red_free),
        "grey_float01.tif": Odd(tiff((grey / 255).astype(np.float32)), like="grey8.png", flags=red_free),
        "rgb16_planar.tif": Odd(planes, reason=Reason.UNSUPPORTED, says="16 bits whose planes lie apart"),
    }


def _damaged(base: np.ndarray, jpeg: bytes) -> dict[str, Odd]:
    no_image, other_way = Reason.NOT_AN_IMAGE, "fetch it again as binary"
    profile = b"\xff\xe2" + struct.pack(">H", 116) + b"ICC_PROFILE\0\2\5" + bytes(100)  # the second part of five
    page = "<!DOCTYPE html><title>Anmeldung nötig</title>".encode()
    progressive, webp = encode(base, "JPEG", quality=95, progressive=True), encode(base, "WEBP", quality=95)
    return {
        "jpeg12.jpg": Odd(jpeg_frame(jpeg, 0xC1, 12), reason=Reason.UNSUPPORTED, says="12 bits"),
        "IM0001.dcm": Odd(DICOM, reason=Reason.CORRUPT, says="DICOM"),
        "IM0002.dcm": Odd(NO_KIND, reason=Reason.UNSUPPORTED, says="DICOM: a file that names no kind"),
        "IMG_2041.HEIC": Odd(HEIC, reason=Reason.UNSUPPORTED, says="HEIC"),
        "IMG_2042.avif": Odd(AVIF, reason=Reason.UNSUPPORTED, says="AVIF"),
        "packed.jpg": Odd(gzip.compress(jpeg), reason=Reason.NOT_AN_IMAGE, says="unpack it"),
        "half_a_profile.jpg": Odd(jpeg[:2] + profile + jpeg[2:], like="base.jpg"),
        "page.jpg": Odd(page, reason=no_image, says="text, such as a web page"),
        "pointer.jpg": Odd(b"version https://git-lfs.github.com/spec/v1\n", reason=no_image, says="text"),
        "base64.jpg": Odd(b64encode(jpeg), reason=no_image, says="text"),
        "zeros.jpg": Odd(bytes(50_000), reason=no_image, says="zeros"),
        "line_before.jpg": Odd(b"\r\n" + jpeg, reason=no_image, says="other bytes before it"),
        "as_text.png": Odd(encode(base, "PNG").replace(b"\r\n", b"\n"), reason=no_image, says=other_way),
        "as_utf8.jpg": Odd(jpeg.decode("latin-1").encode(), reason=no_image, says=other_way),
        "noise.bin": Odd(bytes(range(256)) * 9, reason=no_image, says="no known image format in 2304 bytes"),
        "cut.webp": Odd(webp[: len(webp) // 2], reason=Reason.TRUNCATED, says="fetch it again"),
        "cut.tif": Odd(tiff(base)[:100_000], reason=Reason.TRUNCATED, says="fetch it again"),
        "cut_eoi.jpg": Odd(jpeg_with_end(jpeg, 0.6), reason=Reason.TRUNCATED, says="fetch it again"),
        "hole.jpg": Odd(jpeg_with_hole(jpeg, 8192), reason=Reason.TRUNCATED, says="fetch it again"),
        "progressive_40.jpg": Odd(jpeg_with_end(progressive, 0.4), reason=Reason.TRUNCATED, says="scans"),
    }


def _pages(base: np.ndarray) -> dict[str, Odd]:
    other, small = base[:, ::-1], Image.fromarray(base[::4, ::4].copy())
    more = frozenset({Flag.MORE_PAGES})
    mpo = encode(base, "MPO", quality=95, save_all=True, append_images=[small])
    side_by_side = encode(np.hstack([base, other]), "JPEG", quality=95)
    return {
        "IMG_0001.JPG": Odd(mpo, like="base.jpg", flags=more),
        "preview_first.tif": Odd(tiff(base[::2, ::2], base), like="base.png", flags=more),
        "thumb_first.tif": Odd(tiff(base[::5, ::5], base), like="base.png", flags=more),
        "od_os.tif": Odd(tiff(base, other), reason=Reason.UNSUPPORTED, says="2 pages.*save each page"),
        "side_by_side.jpg": Odd(side_by_side, flags=frozenset({Flag.MORE_DISCS}), gradable=False),
    }


def _seen(base: np.ndarray) -> dict[str, Odd]:
    """Light, focus, field and resolution; drawings that touch the disc and the picture's edge."""
    height, width = base.shape[:2]
    lit = base.max(axis=2, keepdims=True) > 25
    hazy = np.where(lit, base * 0.25 + 120, base)
    dim = {
        "dark50.jpg": (base * 0.5, Flag.DARK, True),
        "dark25.jpg": (base * 0.25, Flag.DARK, False),
        "haze.jpg": (hazy, Flag.HAZY, False),
        "blur.jpg": (cv2.GaussianBlur(base, (0, 0), 6), Flag.BLURRED, False),
        "coarse.jpg": (cv2.resize(base, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA), Flag.COARSE, False),
    }
    label = cv2.rectangle(base.copy(), (width - 180, 0), (width - 30, 150), (255, 255, 255), -1)
    frame = cv2.rectangle(base.copy(), (0, 0), (width - 1, height - 1), (255, 255, 255), 5)
    seen = {
        name: Odd(encode(pixels.astype(np.uint8), "JPEG", quality=95), flags=frozenset({flag}), gradable=gradable)
        for name, (pixels, flag, gradable) in dim.items()
    }
    written = cv2.putText(base.copy(), "DOE 12.03.1961", (20, 40), cv2.FONT_HERSHEY_SIMPLEX, 1.0, (255, 255, 255), 2)
    text = frozenset({Flag.BURNT_IN_TEXT})
    drawn = {"text.png": Odd(encode(written, "PNG"), like="base.png", flags=text)}
    drawn |= {"label_rim.png": Odd(encode(label, "PNG")), "frame.png": Odd(encode(frame, "PNG"), like="base.png")}
    return seen | drawn
