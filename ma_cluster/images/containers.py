"""What an encoded photograph says of itself before a pixel is decoded: its kind, its pages, whether it is whole.

Pillow opens a 12-bit file as if it had 8 bits, a preview as if it were the photograph, and a JPEG with a hole without
a word; one broken chunk of metadata costs it the picture. So the containers are looked at here first.
"""

from __future__ import annotations

import io
import logging
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from PIL.TiffImagePlugin import ImageFileDirectory_v2

from ma_cluster.errors import ImageRefusedError, Reason

try:
    import simplejpeg
except ImportError:  # a machine that trains and has torch, but not all of ours
    simplejpeg = None

log = logging.getLogger(__name__)
JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
DICOM = b"DICM", 128
"""What a DICOM file holds, and where."""
EXPORT_CURE = "export it as JPEG, PNG or TIFF of 8 bits"
_FOREIGN = (
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (0, b"II\xbc", "JPEG XR"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"AT&TFORM", "DjVu"),
    (0, b"CMDb", "Heidelberg E2E"),
    (0, b"FOCT", "Topcon FDA"),
    (0, b"FUJIFILMCCD-RAW", "a camera's raw file"),
    (0, b"IIRO", "a camera's raw file"),
    (0, b"IIRS", "a camera's raw file"),
    (0, b"IIU\0", "a camera's raw file"),
    (0, b"FOVb", "a camera's raw file"),
    (0, b"\0MRM", "a camera's raw file"),
    (6, b"HEAPCCDR", "a camera's raw file"),
    (8, b"CR\x02", "a camera's raw file"),
)
_PACKED = (b"\x1f\x8b", b"PK\3\4", b"7z\xbc\xaf", b"Rar!", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")
_BRANDS = {
    "AVIF": ("avif", "avis"),
    "HEIC": ("heic", "heix", "heim", "heis", "hevc", "hevx", "hevm", "hevs", "mif1", "msf1", "mif2"),
    "a camera's raw file": ("crx ",),
    "a film": ("isom", "iso2", "mp41", "mp42", "qt  ", "M4V ", "3gp4", "3gp5"),
}
_OTHER_JPEGS = {0xC3: "lossless JPEG", 0xF7: "JPEG-LS"} | dict.fromkeys(
    (0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF), "hierarchical or lossless JPEG"
)
_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})  # the kinds of JPEG that are read
_WHOLE = (1 << 64) - 1  # a bit for each coefficient of a block
_NEXT_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")  # stuffed bytes and restarts belong to the pixels
_LOOK = 512  # bytes that tell what a file is
_TEXT = bytes([*range(9, 14), *range(32, 127), *range(128, 256)])  # whatever its encoding
_MOST_PAGES = 1000
_SAME_SIZE = 0.7
"""A page whose sides are this share of the largest one's or more is a second photograph, not a preview of it."""
_LARGEST_METADATA = 2**20  # bytes, unpacked
_CFA, _LINEAR_RAW = 32803, 34892  # photometric interpretations of raw files


def refuse_foreign(data: bytes) -> None:
    """Raises ImageRefusedError: unsupported, or not_an_image, where the bytes are of a known kind that is not read; by
    its name.
    """
    if data.startswith(_PACKED):
        raise ImageRefusedError(Reason.NOT_AN_IMAGE, "a packed file (gzip, ZIP, ...) is not read; unpack it")
    name = next((name for at, magic, name in _FOREIGN if data.startswith(magic, at)), None)
    if data[4:8] == b"ftyp":
        length = min(int.from_bytes(data[:4], "big"), 256)
        found = {data[at : at + 4].decode("latin-1") for at in (8, *range(16, length, 4))}
        name = next((name for name, brands in _BRANDS.items() if found & set(brands)), "an ISO media file")
    elif b"%PDF-" in data[:1024]:
        name = "PDF"
    if name is not None:
        raise ImageRefusedError(Reason.UNSUPPORTED, f"{name} is not read; {EXPORT_CURE}")


def what_it_is(data: bytes) -> str:
    """What lies where a photograph should, of bytes that no format begins with."""
    begin = data[:_LOOK]
    if any(data.find(magic, 1, 8) > 0 for magic in (JPEG, PNG)):
        return "an image with other bytes before it; cut them off, or fetch it again"
    if begin.startswith((b"\x89PNG\n", b"\xc3\xbf\xc3\x98", b"\xc2\x89PNG", b"\xef\xbf\xbd")):
        return "an image that was changed on its way, as text is; fetch it again as binary"
    if not begin.strip(b"\0"):
        return "zeros, as an unfinished copy leaves them; fetch it again"
    if not begin.translate(None, _TEXT):
        return "text, such as a web page or a message of a server, instead of an image; fetch it again"
    return f"no known image format in {len(data)} bytes"


def check_jpeg(data: bytes) -> tuple[int, int] | None:
    """A JPEG's width and height, None where it does not come so far; of a kind that is read, with all its scans.

    Raises:
        ImageRefusedError: unsupported, or truncated where scans are missing though an end marker is there.
    """
    size, scans, known = None, 0, dict[int, int]()  # the coefficients at full precision, a bit each, by component
    for marker, body in _jpeg_segments(data):
        if marker in _OTHER_JPEGS:
            raise ImageRefusedError(Reason.UNSUPPORTED, f"{_OTHER_JPEGS[marker]} is not read; {EXPORT_CURE}")
        if marker in _FRAMES and not known and len(body) >= 6 + 3 * body[5]:
            if body[0] != 8:
                raise ImageRefusedError(Reason.UNSUPPORTED, f"a JPEG of {body[0]} bits is not read; {EXPORT_CURE}")
            size = int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big")
            known = dict.fromkeys(body[6 : 6 + 3 * body[5] : 3], 0)
        if marker == 0xDA and body and len(body) >= 4 + 2 * body[0]:
            scans += 1
            components = body[1 : 1 + 2 * body[0] : 2]
            first, last, precision = body[1 + 2 * body[0] : 4 + 2 * body[0]]
            if precision & 15 == 0 and first <= last < 64:
                scanned = _WHOLE >> (63 - last) & _WHOLE << first
                known |= {c: known[c] | scanned for c in components if c in known}
    if scans and any(scanned & _WHOLE != _WHOLE for scanned in known.values()):
        raise ImageRefusedError(Reason.TRUNCATED, "the last scans of the JPEG are missing; fetch it again")
    return size


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Markers with their segments up to the first end marker; what lies behind it belongs to other pictures."""
    at = 2
    while (match := _NEXT_MARKER.search(data, at)) and match[1] != b"\xd9":
        at = match.end()
        if match[1] not in b"\x01\xd8":
            length = int.from_bytes(data[at : at + 2], "big")
            yield match[1][0], data[at + 2 : at + length]
            at += length


def refuse_damage(data: bytes) -> None:
    """Raises ImageRefusedError: truncated or corrupt, where libjpeg warns of what it fills in.

    An eighth of the size is enough: every coefficient is read for it. Without simplejpeg only what Pillow notices is
    refused, and the log says so once.
    """
    if simplejpeg is None:
        _say_what_is_not_noticed()
        return
    data = data.replace(b"ICC_PROFILE\0", b"ICC_profile\0")  # of which libjpeg warns where a part of it is missing
    try:
        colours = simplejpeg.decode_jpeg_header(data)[2]
        simplejpeg.decode_jpeg(data, "CMYK" if colours in ("CMYK", "YCCK") else "GRAY", min_height=1, min_width=1)
    except ValueError as error:
        padding = re.search(r"(\d+) extraneous bytes before marker 0xd9", str(error).lower())
        if padding and bytes(int(padding[1])) + b"\xff\xd9" in data:
            return  # zeros before the end marker, which some cameras write
        if (refusal := jpeg_refusal(error)) is not None:
            raise refusal from error


@cache
def _say_what_is_not_noticed() -> None:
    log.warning("simplejpeg is not installed: a JPEG that is damaged in its middle is read as if it were whole")


def jpeg_refusal(error: ValueError) -> ImageRefusedError | None:
    """What a warning of libjpeg's costs a photograph; None where it is not of damage."""
    text = str(error).lower()
    if "premature end" in text:
        return truncated()
    if "corrupt" in text:
        return ImageRefusedError(Reason.CORRUPT, "the JPEG is damaged in its middle; fetch it again")
    return None


def truncated() -> ImageRefusedError:
    """The refusal of a file that is not all there."""
    return ImageRefusedError(Reason.TRUNCATED, "the data end before the image does; fetch it again")


@dataclass(frozen=True, slots=True)
class PngParts:
    """A PNG without its metadata, and the metadata that matters; None where it is missing or damaged."""

    data: bytes
    size: tuple[int, int] | None
    """Width and height, where it comes so far."""
    deep: bool
    """16 bits a sample."""
    animated: bool
    exif: bytes | None
    profile: bytes | None


def split_png(data: bytes) -> PngParts:
    """Take a PNG's critical chunks (and tRNS) from the rest: what is wrong with a text costs no photograph."""
    kept, found, at = [PNG], {}, len(PNG)
    while at + 12 <= len(data):
        (length,), kind = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        end = at + 12 + length
        if not kind[:1].islower() or kind == b"tRNS":
            kept.append(data[at:end])
        elif kind in (b"eXIf", b"iCCP", b"acTL") and end <= len(data):
            body = data[at + 8 : end - 4]
            if zlib.crc32(kind + body) == int.from_bytes(data[end - 4 : end], "big"):
                found[kind] = body
        at = end
    kept.append(data[at:])
    profile = _unpacked(found[b"iCCP"].partition(b"\0")[2][1:]) if b"iCCP" in found else None
    size = struct.unpack(">II", data[16:24]) if data[12:16] == b"IHDR" and len(data) >= 24 else None
    return PngParts(b"".join(kept), size, data[24:25] == b"\x10", b"acTL" in found, found.get(b"eXIf"), profile)


def _unpacked(data: bytes) -> bytes | None:
    unpacker = zlib.decompressobj()
    try:
        unpacked = unpacker.decompress(data, _LARGEST_METADATA)
    except zlib.error:
        return None
    return unpacked if unpacker.eof else None


@dataclass(frozen=True, slots=True)
class Page:
    """One directory of a TIFF."""

    index: int
    width: int
    height: int
    bits: int
    samples: int
    planes_apart: bool
    preview: bool
    """It says of itself that it is a reduced copy or a mask of another page."""
    orientation: int
    declared_top: int | None
    """The largest sample value, where one is declared."""
    white_is_zero: bool
    profile: bytes | None


def read_tiff(data: bytes) -> tuple[Page, int]:
    """The page that is the photograph, the largest one, and the number of pages.

    Raises:
        ImageRefusedError: unsupported, where it is a camera's raw file or a second page is a photograph of its own;
            truncated; corrupt, where no page can be read.
    """
    pages: list[tuple[Page, ImageFileDirectory_v2]] = []
    for directory in _directories(data):
        if _is_raw(data, directory):
            raise ImageRefusedError(Reason.UNSUPPORTED, f"a camera's raw file is not read; {EXPORT_CURE}")
        if directory.get(256) and directory.get(257):
            pages.append((_page(directory, len(pages)), directory))
    if not pages and _directory(data).next >= len(data):  # many writers put it at the end
        raise truncated()
    if not pages:
        raise ImageRefusedError(Reason.CORRUPT, "no page of the TIFF can be read; fetch it again")
    best, directory = max(pages, key=lambda pair: (not pair[0].preview, pair[0].width * pair[0].height))
    others = [page for page, _ in pages if page is not best and not page.preview]
    if any(min(page.width / best.width, page.height / best.height) >= _SAME_SIZE for page in others):
        raise ImageRefusedError(
            Reason.UNSUPPORTED,
            f"{len(pages)} pages, more than one of them a photograph; save each page as its own file",
        )
    offsets, counts = (_numbers(directory, tags) for tags in ((273, 324), (279, 325)))
    if any(offset + count > len(data) for offset, count in zip(offsets, counts, strict=False)):
        raise truncated()
    return best, len(pages)


def _directories(data: bytes) -> Iterator[ImageFileDirectory_v2]:
    """The pages' directories in order."""
    at, seen = _directory(data).next, set[int]()
    while at and at not in seen and len(seen) < _MOST_PAGES:
        seen.add(at)
        yield (directory := _directory(data, at))
        at = directory.next


def _directory(data: bytes, at: int | None = None) -> ImageFileDirectory_v2:
    """The directory at a place of the file; without one, only where the first is."""
    directory = ImageFileDirectory_v2(data[:16] if b"+" in data[2:4] else data[:8])
    if at is not None:
        file = io.BytesIO(data)
        file.seek(at)
        directory.load(file)
    return directory


def _is_raw(data: bytes, directory: ImageFileDirectory_v2) -> bool:
    """Whether it is of a camera's raw file, whose sensor data lie in a directory below that of its preview."""
    below = [_directory(data, int(at)) for at in _numbers(directory, (330,))[:8]]
    return 50706 in directory or any(one.get(262) in (_CFA, _LINEAR_RAW) for one in (directory, *below))


def _page(directory: ImageFileDirectory_v2, index: int) -> Page:
    tops = [top for top in _numbers(directory, (281, 341)) if top > 0 and (int(top) + 1) & int(top) == 0]
    return Page(
        index=index,
        width=int(directory[256]),
        height=int(directory[257]),
        bits=max((int(bits) for bits in _numbers(directory, (258,))), default=1),
        samples=int(directory.get(277, 1)),
        planes_apart=directory.get(284, 1) == 2,
        preview=bool(int(directory.get(254, 0)) & 5),
        orientation=int(directory.get(274, 1)),
        declared_top=int(max(tops)) if tops else None,
        white_is_zero=directory.get(262) == 0,
        profile=directory.get(34675),
    )


def _numbers(directory: ImageFileDirectory_v2, tags: tuple[int, ...]) -> tuple[Any, ...]:
    """The values of the first of these tags that is there."""
    value = next((directory[tag] for tag in tags if tag in directory), ())
    return value if isinstance(value, tuple) else (value,)
