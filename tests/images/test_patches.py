"""Windows, crops and tiles: what is cut comes back to its place, each pixel once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ma_cluster.images.patches import Tiling, crop


@st.composite
def tilings(draw: st.DrawFn) -> Tiling:
    """Any shape, with tiles and halos of any size that fit each other."""
    halo = draw(st.integers(0, 40))
    tile = draw(st.integers(2 * halo + 10, 2 * halo + 90))
    return Tiling(draw(st.integers(1, 200)), draw(st.integers(1, 200)), tile, halo)


def test_the_drawn_example_of_crop_holds() -> None:
    columns = np.arange(4)[None].repeat(4, axis=0)
    assert crop(columns, 2, 1, 4, fill=9)[0].tolist() == [9, 0, 1, 2]


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(-30, 50), st.integers(-30, 50), st.integers(1, 24))
def test_a_crop_is_a_slice_of_the_endlessly_filled_image(h: int, w: int, row: int, col: int, size: int) -> None:
    image = np.arange(h * w * 2, dtype=np.int32).reshape(h, w, 2)
    endless = np.pad(image, ((80, 80), (80, 80), (0, 0)), constant_values=-1)
    top, left = row + 80 - size // 2, col + 80 - size // 2
    assert (crop(image, row, col, size, fill=-1) == endless[top : top + size, left : left + size]).all()


def test_a_crop_owns_its_pixels() -> None:
    image = np.zeros((8, 8), np.uint8)
    crop(image, 4, 4, 4, fill=0)[:] = 7
    assert not image.any()


def test_the_drawn_example_of_tiling_holds() -> None:
    windows = Tiling(8, 16, 8, 2).windows
    kept = [(w.col + w.keep_cols[0], w.col + w.keep_cols[1]) for w in windows if w.row == 0]
    assert kept == [(0, 6), (6, 10), (10, 16)]
    assert [w.col for w in windows if w.row == 0] == [0, 4, 8]


@settings(deadline=None, max_examples=50)
@given(tilings(), st.integers(0, 2**32 - 1))
def test_stitching_what_was_cropped_gives_the_image(tiling: Tiling, seed: int) -> None:
    image = np.random.default_rng(seed).random((tiling.height, tiling.width), dtype=np.float32)
    padded = tiling.pad(image, fill=0)
    tiles = [tiling.crop(padded, window) for window in tiling.windows]
    assert {tile.shape for tile in tiles} == {(tiling.tile, tiling.tile)}
    assert (tiling.stitch(tiling.windows, tiles) == image).all()


@settings(deadline=None, max_examples=50)
@given(tilings())
def test_every_pixel_is_kept_exactly_once(tiling: Tiling) -> None:
    times = np.zeros(tiling.padded_shape, int)
    for w in tiling.windows:
        times[w.row + w.keep_rows[0] : w.row + w.keep_rows[1], w.col + w.keep_cols[0] : w.col + w.keep_cols[1]] += 1
    assert (times == 1).all()


@settings(deadline=None, max_examples=50)
@given(tilings())
def test_a_kept_part_keeps_its_halo_from_every_inner_side(tiling: Tiling) -> None:
    for w in tiling.windows:
        starts_and_parts = ((w.row, w.keep_rows), (w.col, w.keep_cols))
        for (start, (first, stop)), length in zip(starts_and_parts, tiling.padded_shape, strict=True):
            assert first >= tiling.halo or start == 0
            assert tiling.tile - stop >= tiling.halo or start + tiling.tile == length


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 4), st.integers(1, 8))
def test_tiles_start_on_the_pooling_grid_of_the_network(height: int, width: int, halo: int, more: int) -> None:
    tiling = Tiling(height, width, 16 * (2 * halo + more), 16 * halo)
    assert all(w.row % 16 == 0 and w.col % 16 == 0 for w in tiling.windows)
    assert all(side % 16 == 0 for side in tiling.padded_shape)


@settings(deadline=None, max_examples=50)
@given(tilings(), st.data())
def test_one_marked_pixel_is_met_by_one_window(tiling: Tiling, data: st.DataObject) -> None:
    mask = np.zeros((tiling.height, tiling.width), bool)
    assert tiling.meeting(mask) == ()
    row, col = data.draw(st.integers(0, tiling.height - 1)), data.draw(st.integers(0, tiling.width - 1))
    mask[row, col] = True
    (window,) = tiling.meeting(mask)
    assert window.keep_rows[0] <= row - window.row < window.keep_rows[1]
    assert window.keep_cols[0] <= col - window.col < window.keep_cols[1]


@settings(deadline=None, max_examples=50)
@given(tilings())
def test_what_no_window_was_given_for_is_zero(tiling: Tiling) -> None:
    assume(len(tiling.windows) > 1)
    ones = [np.ones((tiling.tile, tiling.tile), np.float32)] * (len(tiling.windows) - 1)
    stitched = tiling.stitch(tiling.windows[1:], ones)
    first = tiling.windows[0]
    assert not stitched[: first.keep_rows[1], : first.keep_cols[1]].any()
    assert stitched.sum() == stitched.size - stitched[: first.keep_rows[1], : first.keep_cols[1]].size


def test_padding_goes_to_the_bottom_and_the_right() -> None:
    padded = Tiling(17, 30, 32, 0).pad(np.ones((17, 30, 3), np.uint8), fill=128)
    assert padded.shape == (32, 32, 3)
    assert (padded[:17, :30] == 1).all() and (padded[17:] == 128).all() and (padded[:, 30:] == 128).all()


def test_a_tile_without_room_for_its_halos_is_refused() -> None:
    with pytest.raises(ValueError, match="no room for two halos"):
        Tiling(100, 100, 64, 32)


def test_stitching_needs_a_tile_for_each_window() -> None:
    tiling = Tiling(64, 64, 32, 4)
    with pytest.raises(ValueError):
        tiling.stitch(tiling.windows, [])
