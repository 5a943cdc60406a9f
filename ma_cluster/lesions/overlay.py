"""What a person looks at: the mask as a 1-bit PNG, and the photograph with each lesion outlined."""

from __future__ import annotations

import io

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from numpy import ndarray
from PIL import Image

OUTLINE_RGB = (64, 255, 64)  # absent from a retina, and visible to most of those who are colour-blind
JPEG_QUALITY = 90


def draw_overlay(pixels: UInt8[ndarray, "h w 3"], mask: Bool[ndarray, "h w"]) -> UInt8[ndarray, "h w 3"]:
    """A copy of the photograph with a thin contour a few pixels outside each lesion, which stays visible."""
    thickness = max(1, round(min(mask.shape) / 1000))
    gap = 2 * thickness + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * gap + 1, 2 * gap + 1))
    grown = cv2.dilate(mask.astype(np.uint8), kernel)
    contours, _ = cv2.findContours(grown, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(pixels.copy(), contours, -1, OUTLINE_RGB, thickness, cv2.LINE_AA)


def encode_overlay(pixels: UInt8[ndarray, "h w 3"], mask: Bool[ndarray, "h w"]) -> bytes:
    """`draw_overlay` as a JPEG."""
    out = io.BytesIO()
    Image.fromarray(draw_overlay(pixels, mask)).save(out, format="JPEG", quality=JPEG_QUALITY)
    return out.getvalue()


def encode_mask(mask: Bool[ndarray, "h w"]) -> bytes:
    """The mask as a 1-bit PNG, white where there is a lesion."""
    out = io.BytesIO()
    Image.fromarray(mask).save(out, format="PNG")
    return out.getvalue()
