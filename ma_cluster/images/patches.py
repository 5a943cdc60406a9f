"""Where patches lie, and how they are cut: pools of centres and `crop` for training, `Tiling` over a whole photograph.

A window is a place, a patch its pixels. `Tiling.crop` and `Tiling.stitch` mirror each other: stitch(crop(x)) = x. Pools
have candidate centres as numbered ids, (image, row, col) of which is a pure function of the id, so that millions of
patches exist only as numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, UInt32, UInt64
from numpy import ndarray

Range = tuple[int, int]
"""First index, and the one past the last."""
Box = tuple[Range, Range]
"""Rows and columns of a rectangle of cells, the squares of GRID_PX that tiles are made of."""
GRID_PX = 16
"""Tiles start and end at multiples of it, as the networks' pooling grids do."""
_CELL = 4  # regions are kept as 4 x 4 cells: a sixteenth of the memory, and patches are far larger


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

    @property
    def area(self) -> int:
        """Pixels of the tile."""
        return self.shape[0] * self.shape[1]


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
    """Tiles over what is needed of a grid: bands of rows, each cut over the columns that are needed in it, and each
    piece halved for as long as that leaves fewer pixels to compute, as where a few spots are needed far apart.

    A tile is a kept part with a halo around it, context whose answer is discarded.
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
        cells = self._cells(mask)
        (height, width), largest = cells.shape, (self.tile - 2 * self.halo) // GRID_PX
        pieces = [
            piece
            for whole in _cut(cells, ((0, height), (0, width)), 0, height)
            for band in _cut(cells, whole, 0, largest)
            for piece in _cut(cells, band, 1, largest)
        ]
        return tuple(window for piece in pieces for window in self._cheapest(cells, piece))

    def pad(self, image: ndarray, fill: int) -> ndarray:
        """The image extended with `fill` at the bottom and the right to `padded_shape`."""
        missing = self.padded_shape[0] - image.shape[0], self.padded_shape[1] - image.shape[1]
        if missing == (0, 0):
            return image
        pads = ((0, missing[0]), (0, missing[1])) + ((0, 0),) * (image.ndim - 2)
        return np.pad(image, pads, constant_values=fill)

    @staticmethod
    def crop(padded: Any, window: Window) -> Any:
        """The tile of a window, from an image that `pad` has extended; an array or a tensor."""
        return padded[slice(*window.rows), slice(*window.cols)]

    def stitch(
        self, windows: Sequence[Window], tiles: Sequence[Float32[ndarray, "*k _ _"]]
    ) -> Float32[ndarray, "*k h w"]:
        """The mirror of `crop`: the kept part of each tile at its place; 0 where no window is given."""
        out = np.zeros((*(tiles[0].shape[:-2] if tiles else ()), *self.padded_shape), dtype=np.float32)
        for window, tile in zip(windows, tiles, strict=True):
            self.keep(out, window, tile)
        return out[..., : self.height, : self.width]

    @staticmethod
    def keep(padded: Any, window: Window, tile: Any) -> None:
        """Put the kept part of a tile at its place; arrays or tensors, `*k ph pw` and `*k th tw`."""
        rows, cols = slice(*window.keep_rows), slice(*window.keep_cols)
        top, left = window.rows[0], window.cols[0]
        padded[..., rows, cols] = tile[..., rows.start - top : rows.stop - top, cols.start - left : cols.stop - left]

    def _cells(self, mask: Bool[ndarray, "h w"]) -> Bool[ndarray, "ch cw"]:
        """The squares of GRID_PX that hold a pixel of the mask."""
        height, width = self.padded_shape
        whole = self.pad(mask, fill=False).reshape(height // GRID_PX, GRID_PX, width // GRID_PX, GRID_PX)
        return np.asarray(whole.any(axis=(1, 3)))

    def _cheapest(self, cells: Bool[ndarray, "ch cw"], box: Box) -> list[Window]:
        """The window of a box, or those of its halves, or of theirs: whichever have the fewest pixels."""
        window = self._window(box)
        rows, cols = (stop - first for first, stop in box)
        needed = int(cells[slice(*box[0]), slice(*box[1])].sum()) * GRID_PX**2
        if max(rows, cols) == 1 or window.area <= needed + 4 * self.halo * needed**0.5 + 8 * self.halo**2:
            return [window]  # two of so many pixels have more, whatever their shapes, but at the edge
        halves = _cut(cells, box, 0 if rows >= cols else 1, -(-max(rows, cols) // 2))
        windows = [each for half in halves for each in self._cheapest(cells, half)]
        return windows if sum(each.area for each in windows) < window.area else [window]

    def _window(self, box: Box) -> Window:
        """The window that keeps the pixels of a box."""
        keep_rows, keep_cols = ((first * GRID_PX, stop * GRID_PX) for first, stop in box)
        height, width = self.padded_shape
        return Window(self._with_halo(keep_rows, height), self._with_halo(keep_cols, width), keep_rows, keep_cols)

    def _with_halo(self, kept: Range, length: int) -> Range:
        return max(0, kept[0] - self.halo), min(length, kept[1] + self.halo)


def _cut(cells: Bool[ndarray, "ch cw"], box: Box, axis: int, longest: int) -> Iterator[Box]:
    """A box in as few even parts along an axis as are no longer than `longest`, each drawn tight around its cells."""
    first, stop = box[axis]
    side = -(-(stop - first) // -(-(stop - first) // longest))
    for start in range(first, stop, side):
        part = start, min(start + side, stop)
        rows, cols = (part, box[1]) if axis == 0 else (box[0], part)
        inside = cells[slice(*rows), slice(*cols)]
        down, across = (np.flatnonzero(inside.any(axis=other)).tolist() for other in (1, 0))
        if down:
            yield (rows[0] + down[0], rows[0] + down[-1] + 1), (cols[0] + across[0], cols[0] + across[-1] + 1)


def _round_up(length: int) -> int:
    return -(-length // GRID_PX) * GRID_PX


class LesionPool:
    """Every lesion pixel of a split, ordered by lesion; an id is a position in that order."""

    def __init__(self, masks: Sequence[Bool[ndarray, "_ _"]]) -> None:
        pixels, starts, count = [np.empty((0, 3), np.int32)], [], 0
        for image, mask in enumerate(masks):
            _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
            rows, cols = np.nonzero(labels)
            order = np.argsort(labels[rows, cols], kind="stable")
            ordered = labels[rows, cols][order]
            starts.append(count + np.flatnonzero(np.diff(ordered, prepend=0)))
            count += len(rows)
            pixels.append(np.column_stack([np.full(len(rows), image), rows[order], cols[order]]).astype(np.int32))
        self._pixels = np.concatenate(pixels)
        self._starts = np.concatenate([*starts, [count]]).astype(np.int64)

    def __len__(self) -> int:
        return len(self._pixels)

    @property
    def lesions(self) -> int:
        """Number of lesions (8-connected components)."""
        return len(self._starts) - 1

    def draw(self, count: int, rng: np.random.Generator, *, per_lesion: bool) -> Int64[ndarray, "count"]:
        """Ids, with replacement: uniform over pixels, or over lesions and then over the pixels of each."""
        if not per_lesion:
            return rng.integers(len(self), size=count)
        lesion = rng.integers(self.lesions, size=count)
        first, sizes = self._starts[lesion], np.diff(self._starts)[lesion]
        return first + (rng.random(count) * sizes).astype(np.int64)

    def centres(self, ids: Int64[ndarray, "n"]) -> Int32[ndarray, "n 3"]:
        """(image, row, col) of ids."""
        return self._pixels[ids]


@dataclass(frozen=True)
class RegionPool:
    """`per_image` places in each image's region: id i lies in image i // per_image, at a place hashed from i."""

    regions: Sequence[Bool[ndarray, "_ _"]]
    per_image: int
    seed: int

    def __len__(self) -> int:
        return len(self._cells.counts) * self.per_image

    def __getstate__(self) -> dict[str, Any]:
        """What travels to another process: the cells, not the regions they stand for."""
        return {"regions": (), "per_image": self.per_image, "seed": self.seed, "_cells": self._cells}

    def centres(self, ids: Int64[ndarray, "n"]) -> Int32[ndarray, "n 3"]:
        """(image, row, col) of ids; the same on every machine and in every run."""
        offset = np.uint64(self.seed * 0x9E3779B97F4A7C15 % 2**64)
        hashed = _splitmix64(ids.astype(np.uint64) + offset)
        images, within = ids // self.per_image, self._cells
        places = within.starts[images] + (hashed >> np.uint64(8)) % within.counts[images]
        rows, cols = np.divmod(within.numbers[places], within.columns[images])
        row, col = rows * _CELL + (hashed & np.uint64(3)), cols * _CELL + ((hashed >> np.uint64(2)) & np.uint64(3))
        return np.column_stack([images, row, col]).astype(np.int32)

    @cached_property
    def _cells(self) -> _Cells:
        """The cells that lie in each image's region wholly."""
        numbers, columns = [], []
        for number, region in enumerate(self.regions):
            cells = _whole_cells(region)
            numbers.append(np.flatnonzero(cells).astype(np.uint32))
            columns.append(cells.shape[1])
            if len(numbers[-1]) == 0:
                raise ValueError(f"image {number} of the pool has no allowed region")
        counts = np.array([len(part) for part in numbers], np.uint64)
        return _Cells(np.concatenate(numbers), np.cumsum(counts) - counts, counts, np.array(columns, np.uint64))


def holds_place(region: Bool[ndarray, "_ _"]) -> bool:
    """Whether a region has any place for a `RegionPool`."""
    return bool(_whole_cells(region).any())


def _whole_cells(region: Bool[ndarray, "_ _"]) -> Bool[ndarray, "_ _"]:
    height, width = (side // _CELL for side in region.shape)
    blocks = region[: height * _CELL, : width * _CELL].reshape(height, _CELL, width, _CELL)
    return np.asarray(blocks.all(axis=(1, 3)))


@dataclass(frozen=True, slots=True)
class _Cells:
    """Cells of all images, one image after the other; image i's are numbers[starts[i] : starts[i] + counts[i]]."""

    numbers: UInt32[ndarray, "c"]
    """The number of each cell in its image, row by row."""
    starts: UInt64[ndarray, "i"]
    counts: UInt64[ndarray, "i"]
    columns: UInt64[ndarray, "i"]
    """Cells in a row of each image."""


def _splitmix64(x: UInt64[ndarray, "n"]) -> UInt64[ndarray, "n"]:
    """Steele, Lea, Flood 2014: a bijection of 64-bit numbers whose outputs pass for random."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
