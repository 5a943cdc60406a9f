"""Bytes of a photograph -> upright 8-bit RGB. The header is judged before a pixel is decoded.

Pillow decodes, since OpenCV returns a truncated JPEG half grey as if it were whole.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, ImageOps, UnidentifiedImageError

from ma_cluster.config import ImageConfig
from ma_cluster.errors import ImageRefusedError, Reason

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "JPEG2000", "PPM")
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_SIGNATURES = (_JPEG, _PNG, b"II*\0", b"MM\0*")
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError, TypeError, KeyError)


def decode(data: bytes, config: ImageConfig) -> UInt8[ndarray, "h w 3"]:
    """Decode a photograph.

    Raises:
        ImageRefusedError: not_an_image, unsupported, too_large, too_small, truncated or corrupt.
    """
    if len(data) > config.max_bytes:
        raise ImageRefusedError(Reason.TOO_LARGE, f"{len(data)} bytes, the limit is {config.max_bytes}")
    with warnings.catch_warnings():
        # Pillow's own limits and hints: ours are below, and damaged EXIF is no reason to refuse pixels.
        warnings.simplefilter("ignore")
        image = _open(data, config)
        check_size(*image.size, config)
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
            return _to_rgb(upright)
        except _DECODE_ERRORS as error:
            raise _decode_refusal(error) from error


def check_size(width: int, height: int, config: ImageConfig) -> None:
    """Refuse a photograph by its sides.

    Raises:
        ImageRefusedError: too_large or too_small.
    """
    if width * height > config.max_pixels:
        raise ImageRefusedError(Reason.TOO_LARGE, f"{width} x {height} pixels, the limit is {config.max_pixels}")
    if min(width, height) < config.min_side_px:
        raise ImageRefusedError(Reason.TOO_SMALL, f"{width} x {height} pixels, a side under {config.min_side_px}")


def _open(data: bytes, config: ImageConfig) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        if data.startswith(_SIGNATURES):  # a TIFF's directory may lie at its end
            if (declared := _declared_size(data)) is not None:
                check_size(*declared, config)
            raise ImageRefusedError(Reason.CORRUPT, "the header is damaged or cut off; fetch it again") from error
        raise ImageRefusedError(Reason.NOT_AN_IMAGE, f"no known image format in {len(data)} bytes") from error
    except Image.DecompressionBombError as error:
        raise ImageRefusedError(Reason.TOO_LARGE, "the header declares more pixels than any camera gives") from error
    except _DECODE_ERRORS as error:
        raise ImageRefusedError(Reason.CORRUPT, f"the header cannot be read ({type(error).__name__})") from error
    if image.format not in FORMATS:
        known = ", ".join(FORMATS)
        raise ImageRefusedError(Reason.UNSUPPORTED, f"format {image.format}; convert it to one of {known}")
    return image


def _decode_refusal(error: Exception) -> ImageRefusedError:
    """Pillow has no type for "the data ends early"; its message says so."""
    text = str(error).lower()
    if isinstance(error, EOFError) or any(
        word in text for word in ("truncated", "end of file", "unexpected end", "eof")
    ):
        return ImageRefusedError(Reason.TRUNCATED, "the data ends before the image does; fetch it again")
    return ImageRefusedError(Reason.CORRUPT, f"the image cannot be decoded ({type(error).__name__})")


def _to_rgb(image: Image.Image) -> UInt8[ndarray, "h w 3"]:
    """8-bit RGB from any mode: transparency over black, 16-bit and float ranges scaled, CMYK and palettes converted."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image, dtype=np.float64)
        top = 65535.0 if grey.max(initial=0) > 255 else 255.0
        grey8 = np.clip(np.rint(grey * (255.0 / top)), 0, 255).astype(np.uint8)
        return np.repeat(grey8[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _declared_size(data: bytes) -> tuple[int, int] | None:
    """Width and height that a PNG or JPEG declares, be the rest missing; None where it does not come so far."""
    if data.startswith(_PNG) and data[12:16] == b"IHDR" and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return width, height
    at = 2
    while data.startswith(_JPEG) and at + 9 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header: precision, height, width
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        at += 2 + length
    return None
