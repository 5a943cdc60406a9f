"""Drawn microaneurysms: their truth, what they leave alone, and the sample archive made of them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
from jaxtyping import UInt8
from numpy import ndarray
from photographs import fundus_photograph, idrid_folder

from ma_cluster.config import ImageConfig, SplitConfig
from ma_cluster.errors import UsageError
from ma_cluster.images.datasets import decode_mask, read_dataset, read_object
from ma_cluster.images.decode import decode
from ma_cluster.images.fundus import Fov, find_fov
from ma_cluster.images.phantom import Phantom, PhantomConfig, draw_phantom
from ma_cluster.images.sample import README_KEY, SampleArchive, enlarged_sample, retina, write_sample

CONFIG = PhantomConfig(dots=12, haemorrhages=3, fragments=3, exudates=3)
FOV = Fov(row=349.5, col=349.5, diameter_px=690.0)
NOTHING = replace(CONFIG, dots=0, haemorrhages=0, fragments=0, exudates=0)


@cache
def smooth() -> UInt8[ndarray, "h w 3"]:
    return fundus_photograph((700, 700), FOV)


@cache
def retina_phantom() -> tuple[UInt8[ndarray, "h w 3"], Fov, Phantom]:
    pixels = np.asarray(retina())
    fov, _ = find_fov(pixels, ImageConfig())
    return pixels, fov, draw_phantom(pixels, fov, np.random.default_rng(3), CONFIG)


def drawn(config: PhantomConfig, seed: int = 0) -> Phantom:
    return draw_phantom(smooth(), FOV, np.random.default_rng(seed), config)


def components(phantom: Phantom) -> int:
    return cv2.connectedComponents(phantom.truth.astype(np.uint8), connectivity=8)[0] - 1


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    first, again, other = drawn(CONFIG), drawn(CONFIG), drawn(CONFIG, seed=1)
    assert np.array_equal(first.pixels, again.pixels) and np.array_equal(first.truth, again.truth)
    assert first.dots == again.dots
    assert not np.array_equal(first.truth, other.truth)


def test_every_dot_is_one_component_of_the_truth() -> None:
    _, _, phantom = retina_phantom()
    assert len(phantom.dots) == components(phantom) == CONFIG.dots
    assert all(phantom.truth[round(dot.row), round(dot.col)] for dot in phantom.dots)


def test_the_truth_has_the_area_of_the_dots() -> None:
    _, _, phantom = retina_phantom()
    area = sum(np.pi * (dot.diameter_px / 2) ** 2 for dot in phantom.dots)
    assert phantom.truth.sum() == pytest.approx(area, rel=0.05)


def test_diameters_on_the_canonical_grid_are_those_of_the_config() -> None:
    _, fov, phantom = retina_phantom()
    scale = fov.diameter_px / ImageConfig().fov_diameter_px
    low, high = CONFIG.dot_diameter_px
    assert all(low <= dot.diameter_px / scale <= high for dot in phantom.dots)


def test_dots_are_darker_in_green_than_in_red_against_what_was_there() -> None:
    pixels, _, phantom = retina_phantom()
    red, green, blue = (phantom.pixels[phantom.truth].astype(float) / pixels[phantom.truth]).mean(axis=0)
    assert green < blue < red < 1


def test_a_denser_dot_is_a_darker_one() -> None:
    faint = drawn(replace(NOTHING, dots=8, dot_density=(0.1, 0.1)))
    dense = drawn(replace(NOTHING, dots=8, dot_density=(0.3, 0.3)))
    assert np.array_equal(faint.truth, dense.truth)
    assert dense.pixels[dense.truth].mean(axis=0)[1] < faint.pixels[faint.truth].mean(axis=0)[1]


def test_look_alikes_are_drawn_and_are_not_in_the_truth() -> None:
    config = replace(CONFIG, dots=0)
    phantom = drawn(config)
    assert (phantom.pixels != smooth()).any()
    assert not phantom.truth.any() and phantom.dots == ()


def test_look_alikes_and_dots_keep_apart() -> None:
    alone, both = drawn(replace(CONFIG, dots=0)), drawn(CONFIG)
    marks = (alone.pixels != smooth()).any(axis=2)
    assert len(both.dots) > 0
    assert not (marks & both.truth).any()


def test_the_photograph_is_untouched_away_from_the_dots() -> None:
    phantom = drawn(replace(CONFIG, haemorrhages=0, fragments=0, exudates=0))
    distance = cv2.distanceTransform((~phantom.truth).astype(np.uint8), cv2.DIST_L2, 5)
    changed = (phantom.pixels != smooth()).any(axis=2)
    assert changed[phantom.truth].mean() > 0.9
    assert distance[changed].max() < 5


def test_everything_drawn_lies_inside_the_field_of_view() -> None:
    pixels, fov, phantom = retina_phantom()
    rows, cols = np.nonzero((phantom.pixels != pixels).any(axis=2))
    assert np.hypot(rows - fov.row, cols - fov.col).max() < 0.95 * fov.diameter_px / 2


def test_nothing_is_drawn_on_the_optic_disc_or_on_a_large_vessel() -> None:
    pixels, fov, _ = retina_phantom()
    phantom = draw_phantom(pixels, fov, np.random.default_rng(8), replace(NOTHING, dots=150))
    green = pixels[:, :, 1].astype(np.float32)
    nerve = cv2.blur(green, (41, 41)) > 150
    surround = cv2.blur(green, (81, 81))
    vessel = cv2.GaussianBlur(green, (0, 0), 3) < 0.75 * surround
    assert len(phantom.dots) > 100 and nerve.any() and vessel.mean() > 0.01
    assert not (phantom.truth & (nerve | vessel)).any()


def test_the_place_of_every_dot_is_off_the_annotated_disc_of_a_real_photograph() -> None:
    folder = idrid_folder() / "A. Segmentation"
    image = folder / "1. Original Images/a. Training Set/IDRiD_03.jpg"
    disc = folder / "2. All Segmentation Groundtruths/a. Training Set/5. Optic Disc/IDRiD_03_OD.tif"
    pixels = decode(image.read_bytes(), ImageConfig()).pixels
    phantom = draw_phantom(pixels, find_fov(pixels, ImageConfig())[0], np.random.default_rng(0), CONFIG)
    assert len(phantom.dots) == CONFIG.dots
    assert not ((phantom.pixels != pixels).any(axis=2) & decode_mask(disc.read_bytes())).any()


def test_drawing_nothing_changes_nothing() -> None:
    phantom = drawn(NOTHING)
    assert np.array_equal(phantom.pixels, smooth())
    assert not phantom.truth.any()


def test_the_photograph_given_is_not_written_to() -> None:
    pixels = smooth().copy()
    draw_phantom(pixels, FOV, np.random.default_rng(0), CONFIG)
    assert np.array_equal(pixels, smooth())


def test_a_retina_without_room_gets_fewer_dots() -> None:
    phantom = drawn(replace(NOTHING, dots=60, dot_diameter_px=(300.0, 400.0)))
    assert 0 < len(phantom.dots) < 60
    assert components(phantom) == len(phantom.dots)


@pytest.mark.parametrize("shape", [(1, 1), (3, 900), (256, 40)])
def test_odd_shapes_are_drawn_on_or_left_alone_without_an_error(shape: tuple[int, int]) -> None:
    pixels = np.full((*shape, 3), 90, dtype=np.uint8)
    fov = Fov(row=shape[0] / 2, col=shape[1] / 2, diameter_px=float(max(shape)))
    phantom = draw_phantom(pixels, fov, np.random.default_rng(0), CONFIG)
    assert phantom.truth.shape == shape


def test_a_black_photograph_and_a_field_of_view_beside_it_get_nothing() -> None:
    black = np.zeros((300, 300, 3), dtype=np.uint8)
    for fov in (Fov(150.0, 150.0, 290.0), Fov(5000.0, 5000.0, 290.0)):
        assert not draw_phantom(black, fov, np.random.default_rng(0), CONFIG).truth.any()


def test_a_field_of_view_cut_by_the_frame_is_drawn_on() -> None:
    fov = Fov(row=199.5, col=349.5, diameter_px=690.0)
    pixels = fundus_photograph((400, 700), fov)
    assert len(draw_phantom(pixels, fov, np.random.default_rng(0), CONFIG).dots) == CONFIG.dots


@pytest.mark.parametrize("wrong", [{"dots": -1}, {"dot_density": (0.3, 0.1)}, {"softness_px": 0.0}])
def test_a_config_that_cannot_be_drawn_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="phantom"):
        PhantomConfig(**wrong)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> SampleArchive:
    return write_sample(str(tmp_path_factory.mktemp("sample")), images=6, seed=4)


def test_the_archive_reads_back_as_a_test_split_with_one_healthy_photograph(archive: SampleArchive) -> None:
    samples = read_dataset(archive.url, SplitConfig())
    assert [sample.name for sample in samples] == [photograph.name for photograph in archive.photographs]
    assert {sample.split for sample in samples} == {"test"}
    assert [sample.label for sample in samples] == ["lesion"] * 5 + ["healthy"]
    assert archive.photographs[5].mask is None and archive.photographs[5].microaneurysms == 0


def test_the_masks_of_the_archive_hold_the_number_of_lesions_it_tells(archive: SampleArchive) -> None:
    samples = read_dataset(archive.url, SplitConfig())
    for sample, photograph in zip(samples[:5], archive.photographs, strict=False):
        assert sample.mask is not None
        mask = decode_mask(read_object(sample.mask))
        assert mask.shape == decode(read_object(sample.image), ImageConfig()).pixels.shape[:2]
        count = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[0] - 1
        assert count == photograph.microaneurysms > 0


def test_the_photographs_of_the_archive_differ(archive: SampleArchive) -> None:
    assert len({(Path(archive.url) / photograph.image).read_bytes() for photograph in archive.photographs}) == 6


def test_the_archive_says_what_it_is(archive: SampleArchive) -> None:
    text = (Path(archive.url) / README_KEY).read_text()
    assert "CC0" in text and "drawn" in text


def test_a_photograph_is_the_same_for_a_seed_however_many_are_written(archive: SampleArchive, tmp_path: Path) -> None:
    one = write_sample(tmp_path.as_uri(), images=1, seed=4).photographs[0]
    assert one == archive.photographs[0]
    assert (tmp_path / one.image).read_bytes() == (Path(archive.url) / one.image).read_bytes()
    assert one.mask is not None
    assert (tmp_path / one.mask).read_bytes() == (Path(archive.url) / one.mask).read_bytes()


def test_another_seed_gives_another_archive(archive: SampleArchive, tmp_path: Path) -> None:
    other = write_sample(str(tmp_path), images=1, seed=5).photographs[0]
    assert (tmp_path / other.image).read_bytes() != (Path(archive.url) / other.image).read_bytes()


@pytest.mark.parametrize(("images", "seed"), [(0, 0), (1, -1)])
def test_an_empty_archive_and_a_negative_seed_are_refused(images: int, seed: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        write_sample(str(tmp_path / "none"), images=images, seed=seed)
    assert not (tmp_path / "none").exists()


def test_a_sample_is_enlarged_with_its_truth() -> None:
    data, truth = enlarged_sample(2000)
    pixels = decode(data, ImageConfig()).pixels
    assert (pixels.shape, truth.shape) == ((2000, 2000, 3), (2000, 2000))
    assert 1e-5 < truth.mean() < 1e-2
    near = cv2.dilate(truth.astype(np.uint8), np.ones((15, 15), np.uint8)) > 0
    assert pixels[truth].mean() < pixels[near & ~truth].mean(), "its microaneurysms are dark"
