"""Windows, crops and tiles: what is cut comes back to its place, each pixel once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ma_cluster.images.patches import Tiling, crop


@st.composite
def tilings(draw: st.DrawFn) -> Tiling:
    """Any shape, with tiles and halos of any size that fit each other."""
    halo = 16 * draw(st.integers(0, 3))
    tile = 2 * halo + 16 * draw(st.integers(1, 6))
    return Tiling(draw(st.integers(1, 200)), draw(st.integers(1, 200)), tile, halo)


@st.composite
def masks(draw: st.DrawFn, tiling: Tiling) -> np.ndarray:
    """A disc, as fields of view are, or any other oval, cut by the grid or not."""
    rows, cols = np.indices((tiling.height, tiling.width))
    row, col = draw(st.integers(-20, tiling.height + 20)), draw(st.integers(-20, tiling.width + 20))
    radius, stretch = draw(st.integers(1, 150)), draw(st.floats(0.3, 3))
    return np.hypot(rows - row, (cols - col) * stretch) < radius


def everywhere(tiling: Tiling) -> np.ndarray:
    return np.ones((tiling.height, tiling.width), bool)


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
    tiling = Tiling(16, 80, 64, 16)
    windows = tiling.covering(everywhere(tiling))
    assert [w.keep_cols for w in windows] == [(0, 32), (32, 64), (64, 80)]
    assert [w.cols for w in windows] == [(0, 48), (16, 80), (48, 80)]
    assert {w.rows for w in windows} == {(0, 16)}


@settings(deadline=None, max_examples=50)
@given(tilings(), st.integers(0, 2**32 - 1))
def test_stitching_what_was_cropped_gives_the_image(tiling: Tiling, seed: int) -> None:
    image = np.random.default_rng(seed).random((tiling.height, tiling.width), dtype=np.float32)
    padded, windows = tiling.pad(image, fill=0), tiling.covering(everywhere(tiling))
    tiles = [tiling.crop(padded, window) for window in windows]
    assert [tile.shape for tile in tiles] == [window.shape for window in windows]
    assert (tiling.stitch(windows, tiles) == image).all()


@settings(deadline=None, max_examples=100)
@given(tilings(), st.data())
def test_every_pixel_of_a_mask_is_kept_exactly_once_and_no_other_twice(tiling: Tiling, data: st.DataObject) -> None:
    mask = data.draw(masks(tiling))
    times = np.zeros(tiling.padded_shape, int)
    for w in tiling.covering(mask):
        times[slice(*w.keep_rows), slice(*w.keep_cols)] += 1
    assert (times[: tiling.height, : tiling.width][mask] == 1).all()
    assert times.max() <= 1


@settings(deadline=None, max_examples=100)
@given(tilings(), st.data())
def test_a_kept_part_has_its_halo_on_every_side_but_the_photographs_edge(tiling: Tiling, data: st.DataObject) -> None:
    for w in tiling.covering(data.draw(masks(tiling))):
        assert max(w.shape) <= tiling.tile
        sides = zip((w.rows, w.cols), (w.keep_rows, w.keep_cols), tiling.padded_shape, strict=True)
        for (first, stop), (keep_first, keep_stop), length in sides:
            assert first == max(0, keep_first - tiling.halo)
            assert stop == min(length, keep_stop + tiling.halo)


@settings(deadline=None, max_examples=50)
@given(tilings())
def test_tiles_start_and_end_on_the_pooling_grid_of_the_network(tiling: Tiling) -> None:
    ranges = [each for w in tiling.covering(everywhere(tiling)) for each in (w.rows, w.cols)]
    assert all(index % 16 == 0 for each in ranges for index in each)
    assert all(side % 16 == 0 for side in tiling.padded_shape)


@settings(deadline=None, max_examples=50)
@given(tilings(), st.data())
def test_one_marked_pixel_is_covered_by_one_small_window(tiling: Tiling, data: st.DataObject) -> None:
    mask = np.zeros((tiling.height, tiling.width), bool)
    assert tiling.covering(mask) == ()
    row, col = data.draw(st.integers(0, tiling.height - 1)), data.draw(st.integers(0, tiling.width - 1))
    mask[row, col] = True
    (window,) = tiling.covering(mask)
    assert window.keep_rows == (row // 16 * 16, row // 16 * 16 + 16)
    assert window.keep_cols == (col // 16 * 16, col // 16 * 16 + 16)


def test_tiles_follow_the_rim_of_the_field_of_view() -> None:
    rows, cols = np.indices((640, 640))
    tiling = Tiling(640, 640, 160, 16)
    windows = tiling.covering(np.hypot(rows - 320, cols - 320) < 300)
    kept = sum((w.keep_rows[1] - w.keep_rows[0]) * (w.keep_cols[1] - w.keep_cols[0]) for w in windows)
    assert kept < 0.9 * 640**2
    assert len({w.keep_cols[0] for w in windows}) > 5  # bands begin where the disc does


def test_what_no_window_was_given_for_is_zero() -> None:
    tiling = Tiling(50, 150, 96, 16)
    first, *others = tiling.covering(everywhere(tiling))
    stitched = tiling.stitch(others, [np.ones(window.shape, np.float32) for window in others])
    without = stitched[slice(*first.keep_rows), slice(*first.keep_cols)]
    assert not without.any()
    assert stitched.sum() == stitched.size - without.size


def test_padding_goes_to_the_bottom_and_the_right() -> None:
    padded = Tiling(17, 30, 48, 0).pad(np.ones((17, 30, 3), np.uint8), fill=128)
    assert padded.shape == (32, 32, 3)
    assert (padded[:17, :30] == 1).all() and (padded[17:] == 128).all() and (padded[:, 30:] == 128).all()


@pytest.mark.parametrize(("tile", "halo", "reason"), [(64, 32, "no room for two halos"), (64, 8, "multiples of 16")])
def test_tiles_that_do_not_fit_their_halos_or_the_pooling_grid_are_refused(tile: int, halo: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Tiling(100, 100, tile, halo)


def test_stitching_needs_a_tile_for_each_window() -> None:
    tiling = Tiling(64, 64, 32, 0)
    with pytest.raises(ValueError):
        tiling.stitch(tiling.covering(everywhere(tiling)), [])
