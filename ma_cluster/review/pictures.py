"""What the page shows of a photograph: tiles of a pyramid, outlines of its lesions, a thumbnail.

source -> sandboxed decoder -> pyramid of halved photographs -> JPEG tiles of a view, made when they are asked for
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, TypeVar

import cv2
import numpy as np
import simplejpeg
from jaxtyping import Bool, Float32, UInt8
from numpy import ndarray

from ma_cluster.config import ImageConfig
from ma_cluster.errors import ObjectMissingError, StoreError
from ma_cluster.images.datasets import decode_mask
from ma_cluster.images.fundus import Fov
from ma_cluster.images.reading import MID_GREY
from ma_cluster.storage.store import Store

TILE_PX = 512
_QUALITY = 90
_MEAN_LEVELS = 3  # the local mean is taken on a grid 8 times as coarse: it varies slowly
_THUMBNAIL_PX = 256
_THUMBNAIL_QUALITY = 80
_Value = TypeVar("_Value")


class View(StrEnum):
    """How a photograph is shown."""

    COLOUR = "colour"
    RED_FREE = "red-free"
    """Its green channel, stretched: vessels and blood are darkest there."""
    ENHANCED = "enhanced"
    """Evenly lit and with more contrast, as the networks see it."""


@dataclass
class Pyramid:
    """A photograph and its halves; level 0 fits a tile, the last is the photograph itself."""

    levels: list[UInt8[ndarray, "_ _ 3"]]
    fov: Fov
    _mean: Float32[ndarray, "_ _ 3"] | None = None
    _stretch: tuple[float, float] | None = None
    _making: threading.Lock = field(default_factory=threading.Lock)

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return sum(level.nbytes for level in self.levels)

    def tile(self, view: View, level: int, col: int, row: int) -> bytes:
        """A tile as a JPEG; raises IndexError where there is none."""
        if not 0 <= level < len(self.levels):
            raise IndexError
        whole = self.levels[level]
        top, left = row * TILE_PX, col * TILE_PX
        pixels = whole[top : top + TILE_PX, left : left + TILE_PX]
        if min(row, col) < 0 or pixels.size == 0:
            raise IndexError
        if view is View.RED_FREE:
            return _encode(self._red_free(pixels)[:, :, None], "GRAY")
        if view is View.ENHANCED:
            pixels = self._enhanced(pixels, level, (top, left))
        return _encode(pixels, "RGB")

    def _red_free(self, pixels: UInt8[ndarray, "h w 3"]) -> UInt8[ndarray, "h w"]:
        with self._making:
            if self._stretch is None:
                green = self.levels[0][:, :, 1]
                inside = green[_disc(green.shape, self.fov, self._scale(0))]
                low, high = np.percentile(inside if inside.size else green, (0.5, 99.5))
                self._stretch = float(low), max(float(high), float(low) + 1)
        low, high = self._stretch
        table = np.clip((np.arange(256) - low) * 255 / (high - low), 0, 255).astype(np.uint8)
        return cv2.LUT(pixels[:, :, 1], table)

    def _enhanced(
        self, pixels: UInt8[ndarray, "h w 3"], level: int, corner: tuple[int, int]
    ) -> UInt8[ndarray, "h w 3"]:
        config, base = ImageConfig(), max(0, len(self.levels) - 1 - _MEAN_LEVELS)
        with self._making:
            if self._mean is None:
                coarse = self.levels[base].astype(np.float32)
                disc = _disc(coarse.shape[:2], self.fov, self._scale(base)).astype(np.float32)
                sigma = max(0.5, config.sigma_ratio * self.fov.diameter_px * self._scale(base))
                weight = cv2.GaussianBlur(disc, (0, 0), sigma) + 1e-6
                self._mean = cv2.GaussianBlur(coarse * disc[:, :, None], (0, 0), sigma) / weight[:, :, None]
        ratio = self._scale(base) / self._scale(level)
        height, width = pixels.shape[:2]
        turn = np.array([[ratio, 0, ratio * (corner[1] + 0.5) - 0.5], [0, ratio, ratio * (corner[0] + 0.5) - 0.5]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        mean = cv2.warpAffine(self._mean, turn, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
        gain = config.contrast_gain
        shown = np.clip(gain * (pixels.astype(np.float32) - mean) + MID_GREY, 0, 255).astype(np.uint8)
        outside = ~_disc((height, width), self.fov, self._scale(level), corner)
        shown[outside] = 0
        return shown

    def _scale(self, level: int) -> float:
        return float(0.5 ** (len(self.levels) - 1 - level))


def build_pyramid(pixels: UInt8[ndarray, "h w 3"], fov: Fov) -> Pyramid:
    """Halve a photograph until it fits a tile. A pixel of a half is the mean of four."""
    levels = [pixels]
    while max(levels[-1].shape[:2]) > TILE_PX:
        height, width = (-(-side // 2) for side in levels[-1].shape[:2])
        levels.append(cv2.resize(levels[-1], (width, height), interpolation=cv2.INTER_AREA))
    return Pyramid(levels[::-1], fov)


def _disc(shape: tuple[int, ...], fov: Fov, scale: float, corner: tuple[int, int] = (0, 0)) -> Bool[ndarray, "h w"]:
    """The field of view on a part of a level."""
    rows, cols = np.ogrid[: shape[0], : shape[1]]
    away = (rows + corner[0] - fov.row * scale) ** 2 + (cols + corner[1] - fov.col * scale) ** 2
    return np.asarray(away <= (0.5 * fov.diameter_px * scale) ** 2)


def _encode(pixels: UInt8[ndarray, "h w c"], colours: str) -> bytes:
    sampling = "444" if colours == "RGB" else "Gray"  # a lesion of a few pixels differs by its colour, too
    return bytes(
        simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), _QUALITY, colorspace=colours, colorsubsampling=sampling)
    )


def outlines(mask: Bool[ndarray, "h w"], lesions: Sequence[dict[str, Any]]) -> list[list[list[int]]]:
    """A contour of each lesion, [row, col] corners of a polygon a little outside it, as `draw_overlay` draws it.

    Args:
        mask: of all lesions.
        lesions: rows of an outcome: components of the mask, by their `bbox`.
    """
    gap = 2 * max(1, round(min(mask.shape) / 1000))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * gap + 1, 2 * gap + 1))
    found = []
    for lesion in lesions:
        top, left = lesion["bbox"][:2]
        grown = cv2.dilate(np.pad(component(mask, lesion["bbox"]).astype(np.uint8), gap + 1), kernel)
        contours, _ = cv2.findContours(grown, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        points = max(contours, key=len)[:, 0]
        found.append([[int(row) + top - gap - 1, int(col) + left - gap - 1] for col, row in points])
    return found


def read_mask(dest: Store, row: Mapping[str, Any]) -> Bool[ndarray, "h w"]:
    """The mask of a scored photograph, by its outcome.

    Raises:
        StoreError: it is gone, damaged, or of another size than the photograph.
    """
    place = f"masks/*-{row['mask_key'].rpartition('-')[2]} of the destination"  # without the photograph's own name
    try:
        mask = decode_mask(dest.get(row["mask_key"]))
    except ObjectMissingError:
        raise
    except StoreError as error:
        raise StoreError(f"{place}: {error}") from error
    if mask.shape != (row["height"], row["width"]):
        raise StoreError(f"{place}: it is not the photograph's mask: restore it")
    return mask


def component(mask: Bool[ndarray, "h w"], bbox: Sequence[int]) -> Bool[ndarray, "bh bw"]:
    """The lesion that fills a bounding box, cut out with it: others may reach into the box, none fills it as well."""
    top, left, bottom, right = bbox
    part = mask[top:bottom, left:right].astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(part, connectivity=8)
    extents = stats[:, cv2.CC_STAT_WIDTH] * stats[:, cv2.CC_STAT_HEIGHT]
    own = max(range(1, count), key=lambda label: (extents[label], stats[label, cv2.CC_STAT_AREA]), default=-1)
    return np.asarray(labels == own)


def thumbnail(jpeg: bytes, side_px: int = _THUMBNAIL_PX) -> bytes:
    """A small JPEG of a large one, which is decoded at an eighth of its size where that suffices.

    Raises:
        ValueError: it is none.
    """
    pixels = simplejpeg.decode_jpeg(jpeg, "RGB", min_height=side_px, min_width=side_px, fastdct=True)
    height, width = pixels.shape[:2]
    scale = min(1.0, side_px / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return bytes(simplejpeg.encode_jpeg(small, _THUMBNAIL_QUALITY, colorspace="RGB", colorsubsampling="420"))


class Kept(Generic[_Value]):
    """Values by id, the least recently used dropped where they take more than so many bytes together.

    Of several threads that ask for one, the first makes it, and the others wait for it. One value stays, however large.
    """

    def __init__(self, most_bytes: int, size: Callable[[_Value], int]) -> None:
        self._most, self._size = most_bytes, size
        self._lock = threading.Lock()
        self._values: OrderedDict[str, Future[_Value]] = OrderedDict()

    def get(self, name: str, make: Callable[[], _Value]) -> _Value:
        """The value; raises what making it raises, and forgets that."""
        with self._lock:
            known = self._values.get(name)
            future = known or Future()
            self._values[name] = future
            self._values.move_to_end(name)
        if known is not None:
            return known.result()
        try:
            future.set_result(make())
        except BaseException as error:
            with self._lock:
                self._values.pop(name, None)
            future.set_exception(error)
            raise
        self._drop()
        return future.result()

    def _drop(self) -> None:
        with self._lock:
            sizes = {name: self._size(value.result()) for name, value in self._values.items() if value.done()}
            held = sum(sizes.values())
            for name in list(sizes)[:-1]:
                if held <= self._most:
                    break
                held -= sizes[name]
                del self._values[name]
