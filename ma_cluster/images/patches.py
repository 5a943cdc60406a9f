"""Windows and the patches they cut: `crop` around centres for training, `Tiling` over a whole photograph for inference.

A window is a place, a patch its pixels. `Tiling.crop` and `Tiling.stitch` mirror each other: stitch(crop(x)) = x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float32
from numpy import ndarray


@dataclass(frozen=True, slots=True)
class Window:
    """A square place on a grid: first row, first col, and the index range of the tile that the answer is taken from."""

    row: int
    col: int
    keep_rows: tuple[int, int]
    keep_cols: tuple[int, int]


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


@dataclass(frozen=True)
class Tiling:
    """Equal square tiles over a grid of `shape`, overlapping by two halos, whose kept parts cover each pixel once.

    The halo, context whose answer is discarded, is dropped only on inner sides: at the photograph's edge a network pads
    the tile just as it would pad the whole photograph, so both give the same answer there. Tiles start at multiples of
    16, as the network's pooling grid does.

        tile 8, halo 2, length 16:  |0 1 2 3 4 5 . .|              kept 0..5
                                            |. . 6 7 8 9 . .|       kept 6..9
                                                    |. . 10 .. 15|  kept 10..15
    """

    height: int
    width: int
    tile: int
    halo: int

    def __post_init__(self) -> None:
        if self.tile <= 2 * self.halo:
            raise ValueError(f"a tile of {self.tile} pixels has no room for two halos of {self.halo}")

    @property
    def padded_shape(self) -> tuple[int, int]:
        """The shape the tiles need: at least one tile, and a whole number of 16s."""
        return _padded(self.height, self.tile), _padded(self.width, self.tile)

    @cached_property
    def windows(self) -> tuple[Window, ...]:
        """All windows, row by row."""
        rows = _axis(self.padded_shape[0], self.tile, self.halo)
        cols = _axis(self.padded_shape[1], self.tile, self.halo)
        return tuple(Window(row, col, keep_row, keep_col) for row, keep_row in rows for col, keep_col in cols)

    def meeting(self, mask: Bool[ndarray, "h w"]) -> tuple[Window, ...]:
        """The windows whose kept part meets the mask; the others need no computing."""
        padded = self.pad(mask, fill=0)
        return tuple(w for w in self.windows if padded[_kept(w)].any())

    def pad(self, image: ndarray, fill: int) -> ndarray:
        """The image extended with `fill` at the bottom and the right to `padded_shape`."""
        missing = self.padded_shape[0] - image.shape[0], self.padded_shape[1] - image.shape[1]
        if missing == (0, 0):
            return image
        pads = ((0, missing[0]), (0, missing[1])) + ((0, 0),) * (image.ndim - 2)
        return np.pad(image, pads, constant_values=fill)

    def crop(self, padded: ndarray, window: Window) -> ndarray:
        """The tile of a window, from an image that `pad` has extended."""
        return padded[window.row : window.row + self.tile, window.col : window.col + self.tile]

    def stitch(self, windows: Sequence[Window], tiles: Sequence[Float32[ndarray, "t t"]]) -> Float32[ndarray, "h w"]:
        """The mirror of `crop`: the kept part of each tile at its place; 0 where no window is given."""
        out = np.zeros(self.padded_shape, dtype=np.float32)
        for window, tile in zip(windows, tiles, strict=True):
            out[_kept(window)] = tile[slice(*window.keep_rows), slice(*window.keep_cols)]
        return out[: self.height, : self.width]


def _kept(window: Window) -> tuple[slice, slice]:
    """Where the kept part of a window lies on the padded grid."""
    rows = slice(window.row + window.keep_rows[0], window.row + window.keep_rows[1])
    cols = slice(window.col + window.keep_cols[0], window.col + window.keep_cols[1])
    return rows, cols


def _padded(length: int, tile: int) -> int:
    return max(tile, -(-length // 16) * 16)


def _axis(length: int, tile: int, halo: int) -> list[tuple[int, tuple[int, int]]]:
    """(start, kept index range) of the tiles along one axis of a padded length."""
    last = length - tile
    starts = [*range(0, last, tile - 2 * halo), last]
    kept = []
    done = 0
    for start in starts:
        stop = length if start == last else start + tile - halo
        kept.append((start, (done - start, stop - start)))
        done = stop
    return kept
