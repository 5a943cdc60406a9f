"""The field of view, the canonical grid and the way back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.cbook import get_sample_data
from photographs import encode, fundus_photograph, healthy_folder, idrid_folder
from PIL import Image
from sklearn.datasets import load_sample_image

from ma_cluster.config import ImageConfig
from ma_cluster.errors import ImageRefusedError, Reason
from ma_cluster.images.decode import decode
from ma_cluster.images.fundus import Fov, Grid, find_fov, half_scale, half_scale_mask, locate
from ma_cluster.images.reading import read_bytes, read_pixels
from ma_cluster.images.sample import retina

CONFIG = ImageConfig(fov_diameter_px=512.0)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Grids as photographs have them: one scale for both axes, up to the rounding to even sides."""
    height, width = draw(st.integers(32, 200)), draw(st.integers(32, 200))
    scale = draw(st.one_of(st.floats(0.2, 0.9), st.floats(1.1, 4)))
    sides = (2 * round(side * scale / 2) for side in (height, width))
    return Grid(draw(st.integers(0, 30)), draw(st.integers(0, 30)), height, width, *sides)


@given(grids(), st.lists(st.tuples(st.floats(-1, 300), st.floats(-1, 300)), min_size=1))
def test_points_come_back_from_the_canonical_grid(grid: Grid, points: list[tuple[float, float]]) -> None:
    places = np.array(points)
    assert np.allclose(grid.to_original(grid.to_canonical(places)), places, atol=1e-9)


def test_the_drawn_example_of_grid_holds() -> None:
    grid = Grid(0, 0, 4, 4, 2, 2)
    assert grid.to_canonical(np.array([[0.5, 2.5]])).tolist() == [[0.0, 1.0]]
    assert grid.scale == 0.5


@settings(deadline=None)
@given(grids())
def test_crop_puts_pixels_where_to_canonical_says(grid: Grid) -> None:
    rows, cols = np.indices((grid.top + grid.height + 5, grid.left + grid.width + 5), dtype=np.float32)
    at = np.argwhere(np.ones((grid.canonical_height, grid.canonical_width), bool)).astype(float)
    expected = grid.to_original(at).reshape(grid.canonical_height, grid.canonical_width, 2)
    edge = int(np.ceil(grid.scale))  # where growing has no neighbour to interpolate with
    inner = slice(edge, -edge)
    assert_same_places(grid.crop(rows)[inner, inner], expected[inner, inner, 0])
    assert_same_places(grid.crop(cols)[inner, inner], expected[inner, inner, 1])


@settings(deadline=None)
@given(grids())
def test_uncrop_puts_pixels_where_to_original_says_and_nothing_outside_the_box(grid: Grid) -> None:
    shape = grid.top + grid.height + 5, grid.left + grid.width + 3
    rows = np.indices((grid.canonical_height, grid.canonical_width), dtype=np.float32)[0] + 1
    back = grid.uncrop(rows, shape)
    outside = np.ones(shape, bool)
    outside[grid.top : grid.top + grid.height, grid.left : grid.left + grid.width] = False
    assert back.shape == shape and not back[outside].any()
    edge = int(np.ceil(1 / grid.scale))
    at = np.column_stack([np.arange(grid.height) + grid.top, np.full(grid.height, grid.left)]).astype(float)
    expected = grid.to_canonical(at)[edge:-edge, 0] + 1
    assert_same_places(back[grid.top : grid.top + grid.height, grid.left][edge:-edge], expected)


def assert_same_places(found: np.ndarray, expected: np.ndarray) -> None:
    """Area averages of whole pixels put single ones up to an eighth of a pixel off; together they are in place."""
    assert np.abs(found - expected).max(initial=0) < 0.15
    assert abs((found - expected).mean()) < 0.02


@given(grids())
def test_masks_of_everything_and_of_nothing_stay_so(grid: Grid) -> None:
    shape = grid.top + grid.height, grid.left + grid.width
    assert grid.crop_mask(np.ones(shape, bool)).all()
    assert not grid.crop_mask(np.zeros(shape, bool)).any()


def test_a_lesion_keeps_its_centroid_and_area_on_the_way_there_and_back() -> None:
    grid = Grid(7, 11, 300, 300, 700, 700)
    rows, cols = np.indices((330, 330))
    disc = np.hypot(rows - 120.3, cols - 201.7) < 9
    there = grid.crop_mask(disc)
    assert there.sum() / grid.scale**2 == pytest.approx(disc.sum(), rel=0.02)
    centroid = grid.to_original(np.argwhere(there).mean(axis=0, keepdims=True))[0]
    assert centroid == pytest.approx(np.argwhere(disc).mean(axis=0), abs=0.1)
    back = grid.uncrop(there.astype(np.uint8) * 255, disc.shape) >= 128
    assert (back ^ disc).sum() < 0.05 * disc.sum()


def discs() -> st.SearchStrategy[tuple[tuple[int, int], Fov]]:
    """Shapes and discs as cameras give them: whole, cut at the top and the bottom, off the centre."""
    shapes = st.tuples(st.integers(480, 640), st.integers(640, 800))
    return shapes.flatmap(
        lambda shape: st.tuples(
            st.just(shape),
            st.builds(
                Fov,
                row=st.floats(0.46, 0.54).map(lambda share: share * shape[0]),
                col=st.floats(0.42, 0.58).map(lambda share: share * shape[1]),
                diameter_px=st.floats(0.8, 1.2).map(lambda share: share * shape[0]),
            ),
        )
    )


@settings(deadline=None, max_examples=60)
@given(discs(), st.floats(0.25, 1.3), st.floats(0, 5))
@example(((480, 800), Fov(240.0, 400.0, 560.0)), 0.25, 5.0)
def test_the_field_of_view_is_found_within_one_percent(
    disc: tuple[tuple[int, int], Fov], brightness: float, noise: float
) -> None:
    shape, fov = disc
    found, mask = find_fov(fundus_photograph(shape, fov, brightness=brightness, noise=noise), CONFIG)
    assert found.diameter_px == pytest.approx(fov.diameter_px, rel=0.01)
    assert np.hypot(found.row - fov.row, found.col - fov.col) < 0.01 * fov.diameter_px
    assert max(mask.shape) <= 512


def test_the_mask_of_the_field_of_view_ends_where_the_camera_cut_it() -> None:
    fundus = locate(fundus_photograph((400, 700), Fov(200.0, 350.0, 520.0)), CONFIG)
    assert fundus.canonical_fov[2:-2, fundus.canonical.shape[1] // 2].all()
    assert not fundus.canonical_fov[:, 0].any()
    rows, cols = np.indices(fundus.canonical_fov.shape)
    centre = fundus.grid.to_canonical(np.array([[fundus.fov.row, fundus.fov.col]]))[0]
    disc = np.hypot(rows - centre[0], cols - centre[1]) <= 260 + 1
    assert not (fundus.canonical_fov & ~disc).any()
    assert fundus.canonical_fov.sum() > 0.95 * disc.sum()


@pytest.mark.parametrize("diameter_px", [300.0, 440.0, 560.0, 1100.0])
def test_every_photograph_reaches_the_canonical_diameter(diameter_px: float) -> None:
    side = int(diameter_px * 1.1)
    fundus = locate(fundus_photograph((side, side + 100), Fov(side / 2, side / 2 + 30, diameter_px)), CONFIG)
    found, _ = find_fov(np.pad(fundus.canonical, ((20, 20), (20, 20), (0, 0))), CONFIG)
    assert found.diameter_px == pytest.approx(CONFIG.fov_diameter_px, rel=0.01)
    assert all(length % 2 == 0 for length in fundus.canonical_fov.shape)
    assert fundus.canonical.shape[:2] == fundus.canonical_fov.shape
    assert fundus.grid.scale == pytest.approx(512 / diameter_px, rel=0.01)


def test_a_photograph_near_the_canonical_scale_is_cropped_but_not_resampled() -> None:
    pixels = fundus_photograph((600, 700), Fov(300.0, 350.0, 520.0))
    fundus = locate(pixels, CONFIG)
    grid = fundus.grid
    assert grid.scale == 1
    assert (fundus.canonical == pixels[grid.top : grid.top + grid.height, grid.left : grid.left + grid.width]).all()


def test_a_photograph_without_surround_is_retina_from_edge_to_edge() -> None:
    pixels = fundus_photograph((600, 700), Fov(300.0, 350.0, 520.0))[170:430, 200:500]
    fundus = locate(pixels, replace(CONFIG, field_degrees=30.0, no_surround=True))
    assert fundus.canonical_fov.all() and fundus.canonical.shape == (*fundus.canonical_fov.shape, 3)
    assert (fundus.fov.row, fundus.fov.col, fundus.fov.diameter_px, fundus.fov.degrees) == (129.5, 149.5, 300.0, 30.0)
    assert fundus.grid.scale == pytest.approx(CONFIG.fov_diameter_px / 300 * 30 / 50, rel=0.03)


def gradient(rows: int, cols: int) -> np.ndarray:
    ramp = np.linspace(0, 255, rows * cols).reshape(rows, cols).astype(np.uint8)
    return np.repeat(ramp[:, :, None], 3, axis=2)


def rectangle() -> np.ndarray:
    pixels = np.full((500, 600, 3), 3, np.uint8)
    pixels[60:440, 80:520] = np.random.default_rng(0).integers(90, 160, (380, 440, 3))
    return pixels


NOT_AN_EYE = {
    "black": np.zeros((400, 500, 3), np.uint8),
    "white": np.full((400, 500, 3), 255, np.uint8),
    "grey": np.full((400, 500, 3), 40, np.uint8),
    "noise": np.random.default_rng(0).integers(0, 256, (400, 500, 3), dtype=np.uint8),
    "dark noise": np.random.default_rng(0).integers(0, 30, (400, 500, 3), dtype=np.uint8),
    "gradient down": gradient(400, 500),
    "gradient right": gradient(500, 400).transpose(1, 0, 2),
    "rectangle": rectangle(),
    "flat disc": (np.hypot(*(np.indices((400, 400)) - 200))[:, :, None] < 150).repeat(3, axis=2) * np.uint8(200),
    "temple": load_sample_image("china.jpg"),
    "flower": load_sample_image("flower.jpg"),
    "portrait": np.asarray(Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False))),
}


@pytest.mark.parametrize("motif", NOT_AN_EYE)
def test_what_is_not_an_eye_is_refused(motif: str) -> None:
    with pytest.raises(ImageRefusedError) as caught:
        locate(np.ascontiguousarray(NOT_AN_EYE[motif]), CONFIG)
    assert caught.value.reason is Reason.NO_FOV


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from([4, 8, 16, 32, 64, 128]), st.integers(20, 255))
def test_random_blotches_are_refused_or_found_but_break_nothing(seed: int, cell: int, top: int) -> None:
    coarse = np.random.default_rng(seed).integers(0, top, (512 // cell, 512 // cell, 3), dtype=np.uint8)
    pixels = coarse.repeat(cell, axis=0).repeat(cell, axis=1)
    try:
        fundus = locate(pixels, CONFIG)
    except ImageRefusedError as error:
        assert error.reason is Reason.NO_FOV
    else:
        assert fundus.canonical_fov.any()


@pytest.mark.parametrize("shape", [(1, 1), (255, 3000), (3000, 255)])
def test_too_small_photographs_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ImageRefusedError) as caught:
        locate(np.zeros((*shape, 3), np.uint8), CONFIG)
    assert caught.value.reason is Reason.TOO_SMALL


def test_half_scale_is_the_mean_of_four() -> None:
    four = np.array([[10, 20, 0, 0], [30, 40, 0, 4]], np.uint8)[:, :, None].repeat(3, axis=2)
    assert half_scale(four)[:, :, 0].tolist() == [[25, 1]]


def test_half_scale_mask_needs_two_of_four() -> None:
    four = np.array([[1, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1]], bool)
    assert half_scale_mask(four).tolist() == [[False, True, True]]


def test_the_public_photograph_has_its_field_of_view() -> None:
    found, _ = find_fov(retina(), CONFIG)
    assert found.diameter_px == pytest.approx(1400, rel=0.01)
    assert (found.row, found.col) == pytest.approx((705, 705), abs=14)


def test_a_photograph_read_from_bytes_equals_its_pixels_read() -> None:
    pixels = retina()
    read, facts = read_bytes(encode(pixels, "PNG"), CONFIG)
    wanted, _ = read_pixels(pixels, CONFIG)
    assert (read.enhanced_1x == wanted.enhanced_1x).all()
    assert read.shape == (facts.height, facts.width) == pixels.shape[:2]


@pytest.mark.parametrize(
    ("name", "diameter_px"),
    [("01", 3430), ("04", 3812), ("12", 3812), ("20", 3430), ("33", 3430), ("45", 3430), ("54", 3430)],
)
def test_idrid_photographs_have_their_field_of_view(name: str, diameter_px: float) -> None:
    path = idrid_folder() / "A. Segmentation/1. Original Images/a. Training Set" / f"IDRiD_{name}.jpg"
    fundus = locate(decode(path.read_bytes(), CONFIG).pixels, replace(CONFIG, fov_diameter_px=3410.0))
    assert fundus.fov.diameter_px == pytest.approx(diameter_px, rel=0.01)


@pytest.mark.parametrize("number", [1, 13, 29, 42, 60])
def test_healthy_photographs_have_their_field_of_view(number: int) -> None:
    fundus = locate(decode((healthy_folder() / f"IDRiD_NAR_{number:03d}.jpg").read_bytes(), CONFIG).pixels, CONFIG)
    assert fundus.fov.diameter_px == pytest.approx(1029, rel=0.01)
