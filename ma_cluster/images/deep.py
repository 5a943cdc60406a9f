"""Samples of more than 8 bits, which Pillow cuts to their upper eight: read by OpenCV, and scaled by their range.

12 bits in 16 are common: what a file declares is the container's range, not that of what it holds.
"""

from __future__ import annotations

import re

import numpy as np
from jaxtyping import Shaped, UInt8
from numpy import ndarray
from PIL import Image

from ma_cluster.errors import ImageRefusedError, Reason
from ma_cluster.images.containers import EXPORT_CURE, Page, truncated

_DEEP_BYTES = 2**30  # of samples of more than 8 bits: OpenCV holds them twice
_STRIPE = 256  # rows scaled at a time
_JPEG_2000_HEADER = re.compile(rb"\xff\x4f\xff\x51.{38}(.)", re.DOTALL)  # up to the depth of the first component
_PPM_HEADER = re.compile(rb"P6(?:(?:\s|#[^\r\n]*[\r\n])+\d+){2}(?:\s|#[^\r\n]*[\r\n])+(\d{1,5})\s")


def deep_pixels(image: Image.Image, data: bytes) -> UInt8[ndarray, "h w 3"] | None:
    """Of a JPEG 2000 of more than 8 bits, or a PPM of any range but 255, which Pillow reads a pixel at a time; None of
    what Pillow reads well.

    Raises:
        ImageRefusedError: truncated, corrupt or unsupported.
    """
    header = _JPEG_2000_HEADER.search(data) if image.format == "JPEG2000" else None
    if header is not None and header[1][0] & 0x7F >= 8:  # bits less one; the upper bit is of the sign
        image.load()  # OpenCV does not ask whether it is whole
        return to_8_bits(deep_samples(data))
    header = _PPM_HEADER.match(data) if image.format == "PPM" else None
    if header is None or (top := int(header[1])) == 255:
        return None
    (width, height), kind = image.size, np.dtype(np.uint8 if top < 256 else ">u2")
    if len(data) < header.end() + 3 * width * height * kind.itemsize:
        raise truncated()
    samples = np.frombuffer(data, kind, 3 * width * height, header.end()).reshape(height, width, 3)
    return to_8_bits(samples.astype(kind.newbyteorder("=")), top if top < 0xFFFF else None)


def deep_samples(data: bytes, page: Page | None = None) -> Shaped[ndarray, "..."]:
    """Samples of more than 8 bits as they are stored, (h, w) or (h, w, channels), colours in the order R, G, B.

    Raises:
        ImageRefusedError: unsupported or corrupt.
    """
    import cv2  # a child that never meets such a file starts sooner

    if page is not None:
        kind = f"a TIFF of {page.samples} x {page.bits} bits"
        if page.planes_apart and page.samples > 1:
            raise ImageRefusedError(Reason.UNSUPPORTED, f"{kind} whose planes lie apart is not read; {EXPORT_CURE}")
        if page.width * page.height * page.samples * page.bits > 8 * _DEEP_BYTES:
            raise ImageRefusedError(Reason.TOO_LARGE, f"{kind} and so many pixels is not read; {EXPORT_CURE}")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # it would write to the log of the fleet
    buffer, index = np.frombuffer(data, np.uint8), 0 if page is None else page.index
    try:
        found, images = cv2.imdecodemulti(buffer, cv2.IMREAD_UNCHANGED, range=(index, index + 1))
    except cv2.error as error:
        raise ImageRefusedError(Reason.CORRUPT, "the samples cannot be decoded; fetch it again") from error
    if not found:
        raise ImageRefusedError(
            Reason.UNSUPPORTED, f"samples of more than 8 bits, packed so, are not read; {EXPORT_CURE}"
        )
    samples = images[0]
    return samples if samples.ndim == 2 else samples[:, :, [2, 1, 0, *range(3, samples.shape[2])]]


def to_8_bits(samples: Shaped[ndarray, "..."], declared_top: int | None = None) -> UInt8[ndarray, "h w 3"]:
    """Scale samples so that the white of their range is 255.

    The range is the declared one, else the smallest of 8, 10, 12, ... 32 bits that holds the samples: nobody
    photographs a retina at a quarter of a range. Floats up to 1 are shares of white.

    Raises:
        ImageRefusedError: unsupported, where no range is plausible.
    """
    grey = samples.ndim == 2
    low, high = float(samples.min()), float(samples.max())
    if not np.isfinite([low, high]).all():
        raise ImageRefusedError(Reason.UNSUPPORTED, f"{samples.dtype} samples that are no numbers; {EXPORT_CURE}")
    top = 1.0
    if samples.dtype.kind != "f" or high > 2:
        bits = max(8, 2 * -(-int(high).bit_length() // 2))
        if samples.dtype.kind == "i":
            bits = min(bits, 8 * samples.dtype.itemsize - 1)
        top = float(declared_top) if declared_top is not None and declared_top >= high else 2.0**bits - 1
    if low < -0.02 * top:
        raise ImageRefusedError(
            Reason.UNSUPPORTED,
            f"{samples.dtype} samples from {low:g} to {high:g}: their range is unknown; {EXPORT_CURE}",
        )
    out = np.empty((*samples.shape[:2], 3), np.uint8)
    for row in range(0, len(out), _STRIPE):
        part = samples[row : row + _STRIPE]
        part = part[:, :, None] if grey else part[:, :, :1] if part.shape[2] == 2 else part[:, :, :3]
        out[row : row + _STRIPE] = np.clip(np.rint(part * (255.0 / top)), 0, 255)
    if not grey and samples.shape[2] in (2, 4) and samples[:, :, -1].any():
        out[samples[:, :, -1] == 0] = 0  # transparency lies over black
    return out
