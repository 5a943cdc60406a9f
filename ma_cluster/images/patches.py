"""Windows and the patches they cut: `crop` around centres for training, `Tiling` over a whole photograph for inference.

A window is a place, a patch its pixels. `Tiling.crop` and `Tiling.stitch` mirror each other: stitch(crop(x)) = x.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int64
from numpy import ndarray

Range = tuple[int, int]
"""First index, and the one past the last."""
GRID_PX = 16
"""Tiles start and end at multiples of it, as the networks' pooling grids do."""


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangular place on a grid, and the part of it whose answer is kept. All ranges are on the grid."""

    rows: Range
    cols: Range
    keep_rows: Range
    keep_cols: Range

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the tile, pixels."""
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]


def crop(image: ndarray, row: int, col: int, size: int, fill: int) -> ndarray:
    """The size x size patch whose pixel (size // 2, size // 2) is image[row, col]; `fill` beyond the image.

    size 4, col 1:   fill |  0   1   2  | 3 ...      columns -1 0 1 2: the centre, 1, lies at index 2
                      -1     0  [1]  2
    """
    top, left = row - size // 2, col - size // 2
    patch = np.full((size, size, *image.shape[2:]), fill, dtype=image.dtype)
    r0, r1 = max(top, 0), min(top + size, image.shape[0])
    c0, c1 = max(left, 0), min(left + size, image.shape[1])
    if r0 < r1 and c0 < c1:
        patch[r0 - top : r1 - top, c0 - left : c1 - left] = image[r0:r1, c0:c1]
    return patch


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tiles over what is needed of a grid: bands of rows, each cut over the columns that are needed in it.

    A tile is a kept part with a halo around it, context whose answer is discarded; kept parts of one band are alike.
    There is no halo beyond the photograph's edge: a network pads the tile there just as it would pad the whole
    photograph, so both give the same answer.

        tile 64, halo 16, length 80:   |0 .. 31 : 32 .. 47|                  kept 0..31
                                       |16 .. 31 : 32 .. 63 : 64 .. 79|      kept 32..63
                                                |48 .. 63 : 64 .. 79|        kept 64..79
    """

    height: int
    width: int
    tile: int
    """Largest side of a tile, pixels."""
    halo: int

    def __post_init__(self) -> None:
        if self.tile <= 2 * self.halo:
            raise ValueError(f"a tile of {self.tile} pixels has no room for two halos of {self.halo}")
        if self.tile % GRID_PX or self.halo % GRID_PX:
            raise ValueError(f"tile {self.tile} and halo {self.halo} must be multiples of {GRID_PX}")

    @property
    def padded_shape(self) -> tuple[int, int]:
        """The shape the tiles need: a whole number of 16s."""
        return _round_up(self.height), _round_up(self.width)

    def covering(self, mask: Bool[ndarray, "h w"]) -> tuple[Window, ...]:
        """Windows whose kept parts cover each pixel of the mask once; the rest of the grid needs no computing."""
        height, width = self.padded_shape
        return tuple(
            Window(rows, cols, keep_rows, keep_cols)
            for rows, keep_rows in self._spans(np.flatnonzero(mask.any(axis=1)), height)
            for cols, keep_cols in self._spans(np.flatnonzero(mask[slice(*keep_rows)].any(axis=0)), width)
        )

    def pad(self, image: ndarray, fill: int) -> ndarray:
        """The image extended with `fill` at the bottom and the right to `padded_shape`."""
        missing = self.padded_shape[0] - image.shape[0], self.padded_shape[1] - image.shape[1]
        if missing == (0, 0):
            return image
        pads = ((0, missing[0]), (0, missing[1])) + ((0, 0),) * (image.ndim - 2)
        return np.pad(image, pads, constant_values=fill)

    def crop(self, padded: ndarray, window: Window) -> ndarray:
        """The tile of a window, from an image that `pad` has extended."""
        return padded[slice(*window.rows), slice(*window.cols)]

    def stitch(self, windows: Sequence[Window], tiles: Sequence[Float32[ndarray, "_ _"]]) -> Float32[ndarray, "h w"]:
        """The mirror of `crop`: the kept part of each tile at its place; 0 where no window is given."""
        out = np.zeros(self.padded_shape, dtype=np.float32)
        for window, tile in zip(windows, tiles, strict=True):
            rows, cols = slice(*window.keep_rows), slice(*window.keep_cols)
            top, left = window.rows[0], window.cols[0]
            out[rows, cols] = tile[rows.start - top : rows.stop - top, cols.start - left : cols.stop - left]
        return out[: self.height, : self.width]

    def _spans(self, needed: Int64[ndarray, "n"], length: int) -> Iterator[tuple[Range, Range]]:
        """(tile, kept part) along one axis of a padded length, over ascending indices: as few as will do, even ones."""
        if len(needed) == 0:
            return
        first, stop = int(needed[0]) // GRID_PX * GRID_PX, _round_up(int(needed[-1]) + 1)
        count = -(-(stop - first) // (self.tile - 2 * self.halo))
        side = _round_up(-(-(stop - first) // count))
        for start in range(first, stop, side):
            end = min(start + side, stop)
            yield (max(0, start - self.halo), min(length, end + self.halo)), (start, end)


def _round_up(length: int) -> int:
    return -(-length // GRID_PX) * GRID_PX
