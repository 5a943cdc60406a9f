"""Bytes of a photograph -> upright 8-bit RGB. The header is judged before a pixel is decoded.

Pillow decodes, since OpenCV returns a truncated JPEG half grey as if it were whole; but samples of more than 8 bits,
which Pillow cuts to their upper eight, are read by OpenCV, and libjpeg's warnings, which both keep to themselves, are
asked of simplejpeg.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, ImageCms, UnidentifiedImageError

from ma_cluster.config import ImageConfig
from ma_cluster.errors import Flag, ImageRefusedError, Reason
from ma_cluster.images.acquisition import Acquisition
from ma_cluster.images.containers import (
    DICOM,
    JPEG,
    PNG,
    TIFF,
    check_jpeg,
    read_tiff,
    refuse_damage,
    refuse_foreign,
    split_png,
    truncated,
    what_it_is,
)
from ma_cluster.images.deep import deep_pixels, deep_samples, to_8_bits

FORMATS = ("JPEG", "MPO", "PNG", "TIFF", "BMP", "WEBP", "JPEG2000", "PPM")
_UNSEEN = 3  # grey levels that a colour profile may change without being applied
# libjpeg's mean step at quality 38; at 50 (58) `lite` loses no outline, at 30 (96) 28 % (benchmarks/bench_quality.py)
_COARSE_STEP = 75.0
_METADATA_ERRORS = (OSError, SyntaxError, ValueError, struct.error, IndexError, TypeError, KeyError, EOFError)
_DECODE_ERRORS = (*_METADATA_ERRORS, zlib.error, OverflowError, AttributeError, RuntimeError)


@dataclass(frozen=True, slots=True)
class Decoded:
    """A photograph as it lay in the file."""

    pixels: UInt8[ndarray, "h w 3"]
    """Upright."""
    flags: tuple[Flag, ...] = ()
    """more_pages, where the file holds other pictures, too; burnt_in_text, where it says so; coarse, where it is a JPEG
    whose steps leave little of small lesions."""
    acquisition: Acquisition | None = None
    """What a DICOM file says of its taking; None of other files."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """What a container holds: 8-bit RGB as it is stored, and what it takes to show it."""

    pixels: UInt8[ndarray, "h w 3"]
    orientation: int
    """EXIF's, 1..8; anything else is upright."""
    profile: bytes | None
    """An ICC profile."""
    more_pages: bool
    acquisition: Acquisition | None = None
    coarse: bool = False


def decode(data: bytes, config: ImageConfig) -> Decoded:
    """Decode a photograph.

    Raises:
        ImageRefusedError: not_an_image, unsupported, too_large, too_small, truncated or corrupt.
    """
    if len(data) > config.max_bytes:
        raise ImageRefusedError(Reason.TOO_LARGE, f"{len(data)} bytes, the limit is {config.max_bytes}")
    refuse_foreign(data)
    read = _reader(data)
    with warnings.catch_warnings():
        # Pillow's own limits and hints: ours are below, and damaged EXIF is no reason to refuse pixels.
        warnings.simplefilter("ignore")
        try:
            stored = read(data, config)
        except _DECODE_ERRORS as error:
            raise _decode_refusal(error) from error
        pixels = _upright(_to_srgb(stored.pixels, stored.profile), stored.orientation)
    acquisition = stored.acquisition
    noticed = {
        Flag.COARSE: stored.coarse,
        Flag.MORE_PAGES: stored.more_pages,
        Flag.BURNT_IN_TEXT: acquisition is not None and acquisition.burnt_in_annotation is True,
    }
    return Decoded(pixels, tuple(flag for flag, told in noticed.items() if told), acquisition)


def read_size(data: bytes) -> tuple[int, int]:
    """Width and height of a photograph as it is stored, by its header alone.

    Raises:
        ImageRefusedError: it does not tell.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if data.startswith(*DICOM):
                from ma_cluster.images.dicom import dicom_size

                return dicom_size(data)
            return _open(data).size
        except _DECODE_ERRORS as error:
            raise _decode_refusal(error) from error


def _reader(data: bytes) -> Callable[[bytes, ImageConfig], _Stored]:
    if data.startswith(*DICOM):
        return _read_dicom
    return _read_tiff if data.startswith(TIFF) else _read_png if data.startswith(PNG) else _read_other


def check_size(width: int, height: int, config: ImageConfig) -> None:
    """Refuse a photograph by its sides.

    Raises:
        ImageRefusedError: too_large or too_small.
    """
    if width * height > config.max_pixels:
        raise ImageRefusedError(Reason.TOO_LARGE, f"{width} x {height} pixels, the limit is {config.max_pixels}")
    if min(width, height) < config.min_side_px:
        raise ImageRefusedError(Reason.TOO_SMALL, f"{width} x {height} pixels, a side under {config.min_side_px}")


def _read_dicom(data: bytes, config: ImageConfig) -> _Stored:
    from ma_cluster.images.dicom import read_dicom  # a child that never meets such a file starts sooner

    photograph = read_dicom(data, config)
    acquisition = photograph.acquisition
    return _Stored(photograph.pixels, 1, None, acquisition.frames > 1, acquisition, photograph.coarse)


def _read_tiff(data: bytes, config: ImageConfig) -> _Stored:
    page, pages = read_tiff(data)
    check_size(page.width, page.height, config)
    if page.bits > 8:
        samples = deep_samples(data, page)
        pixels = to_8_bits(samples, page.declared_top)
        if page.white_is_zero and samples.ndim == 2:
            pixels = 255 - pixels
        return _Stored(pixels, page.orientation, page.profile, pages > 1)
    image = _open(data)
    image.seek(page.index)
    image.load()  # which turns it upright
    return _Stored(_to_rgb(image), 1, page.profile, pages > 1)


def _read_png(data: bytes, config: ImageConfig) -> _Stored:
    parts = split_png(data)
    if parts.size is not None:
        check_size(*parts.size, config)
    image = _open(parts.data)
    image.load()  # those of 16 bits, too: OpenCV asks for no check sums
    orientation = _orientation(lambda: _exif(parts.exif))
    pixels = to_8_bits(deep_samples(parts.data)) if parts.deep else _to_rgb(image)
    return _Stored(pixels, orientation, parts.profile, parts.animated)


def _read_other(data: bytes, config: ImageConfig) -> _Stored:
    is_jpeg = data.startswith(JPEG)
    if is_jpeg and (declared := check_jpeg(data)) is not None:
        check_size(*declared, config)
    if data.startswith(b"RIFF") and int.from_bytes(data[4:8], "little") + 7 > len(
        data
    ):  # a WebP; the last byte may pad
        raise truncated()
    image = _open(data)
    check_size(*image.size, config)
    pixels = deep_pixels(image, data)
    if pixels is None:
        image.load()
        pixels = _to_rgb(image)
    if is_jpeg:
        refuse_damage(data)
    more_pages = getattr(image, "n_frames", 1) > 1
    profile = image.info.get("icc_profile")
    return _Stored(pixels, _orientation(image.getexif), profile, more_pages, coarse=is_coarse(image))


def is_coarse(image: Image.Image) -> bool:
    """Whether it is a JPEG whose first table, that of the brightness, has larger steps than lesions bear."""
    steps: list[int] = getattr(image, "quantization", {}).get(0, [])
    return sum(steps) > _COARSE_STEP * len(steps)


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        if data.startswith((JPEG, PNG, *TIFF)):
            raise ImageRefusedError(Reason.CORRUPT, "the header is damaged or cut off; fetch it again") from error
        raise ImageRefusedError(Reason.NOT_AN_IMAGE, what_it_is(data)) from error
    except Image.DecompressionBombError as error:
        raise ImageRefusedError(Reason.TOO_LARGE, "the header declares more pixels than any camera gives") from error
    if image.format not in FORMATS:
        known = ", ".join(FORMATS)
        raise ImageRefusedError(Reason.UNSUPPORTED, f"format {image.format}; convert it to one of {known}")
    return image


def _decode_refusal(error: Exception) -> ImageRefusedError:
    """Pillow has no type for "the data ends early"; its message says so."""
    text = str(error).lower()
    if isinstance(error, EOFError) or any(
        word in text for word in ("truncated", "end of file", "unexpected end", "eof", "not enough data")
    ):
        return truncated()
    return ImageRefusedError(Reason.CORRUPT, f"the image cannot be decoded ({type(error).__name__})")


def _to_rgb(image: Image.Image) -> UInt8[ndarray, "h w 3"]:
    """8-bit RGB from any mode: transparency over black, CMYK and palettes converted."""
    if image.mode.startswith("I") or image.mode == "F":
        return to_8_bits(np.asarray(image))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        if np.ptp(np.asarray(rgba)[:, :, 3]) == 0:  # what is everywhere the same hides nothing
            rgba.putalpha(255)
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _to_srgb(pixels: UInt8[ndarray, "h w 3"], profile: bytes | None) -> UInt8[ndarray, "h w 3"]:
    """The colours that a profile means, where they differ visibly; a profile that cannot be used is passed by."""
    if not profile:
        return pixels
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), "RGB", "RGB"
        )
        levels = np.linspace(0, 255, 9).astype(np.uint8)
        cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
        shown = np.asarray(ImageCms.applyTransform(Image.fromarray(cube), transform))
        if np.abs(shown.astype(int) - cube).max() <= _UNSEEN:
            return pixels
        return np.asarray(ImageCms.applyTransform(Image.fromarray(pixels), transform))
    except (ImageCms.PyCMSError, *_METADATA_ERRORS):
        return pixels


def _exif(data: bytes | None) -> Image.Exif:
    exif = Image.Exif()
    exif.load(data or b"")
    return exif


def _orientation(read_exif: Callable[[], Image.Exif]) -> int:
    try:
        return int(read_exif().get(0x0112, 1))
    except _METADATA_ERRORS:
        return 1


def _upright(pixels: UInt8[ndarray, "h w 3"], orientation: int) -> UInt8[ndarray, "uh uw 3"]:
    """Undo an EXIF orientation: transposed from 5 on, then turned by its flips."""
    if not 2 <= orientation <= 8:
        return pixels
    turned = pixels.swapaxes(0, 1) if orientation >= 5 else pixels
    down, left = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(turned[:: -1 if down else 1, :: -1 if left else 1])
