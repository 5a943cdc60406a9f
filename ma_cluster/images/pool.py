"""Candidate centres of training patches as numbered ids, so that millions of patches exist only as numbers.

`LesionPool` holds every lesion pixel; `RegionPool` any number of places in allowed regions, each a pure function of its
id. Both answer ids with (image, row, col).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt32, UInt64
from numpy import ndarray

_CELL = 4  # regions are kept as 4 x 4 cells: a sixteenth of the memory, and patches are far larger


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
