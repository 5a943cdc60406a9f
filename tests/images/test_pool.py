"""Pools of patch centres: ids that mean the same place for ever, drawn as promised."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import chisquare

from ma_cluster.images.patches import LesionPool, RegionPool

MASKS = [
    np.array([[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], bool),  # two lesions; the second joined by a corner
    np.zeros((2, 2), bool),
    np.array([[0, 0, 0], [0, 1, 0]], bool),
]


def test_lesion_ids_run_through_the_lesions_of_one_image_after_the_other() -> None:
    pool = LesionPool(MASKS)
    assert (len(pool), pool.lesions) == (5, 3)
    places = [[0, 0, 0], [0, 0, 1], [0, 1, 3], [0, 2, 2], [2, 1, 1]]
    assert pool.centres(np.arange(5)).tolist() == places


@settings(deadline=None)
@given(st.lists(arrays(bool, st.tuples(st.integers(1, 8), st.integers(1, 8))), max_size=4))
def test_every_lesion_pixel_has_exactly_one_id(masks: list[np.ndarray]) -> None:
    pool = LesionPool(masks)
    places = pool.centres(np.arange(len(pool)))
    expected = {(number, *place) for number, mask in enumerate(masks) for place in np.argwhere(mask).tolist()}
    assert len(pool) == len(expected)
    assert {tuple(place) for place in places.tolist()} == expected


def test_pixel_draws_are_uniform_over_pixels() -> None:
    drawn = LesionPool(MASKS).draw(20_000, np.random.default_rng(1), per_lesion=False)
    assert chisquare(np.bincount(drawn, minlength=5)).pvalue > 0.001


def test_lesion_draws_are_uniform_over_lesions_and_within_each() -> None:
    drawn = LesionPool(MASKS).draw(20_000, np.random.default_rng(1), per_lesion=True)
    expected = 20_000 * np.array([1 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 3])
    assert chisquare(np.bincount(drawn, minlength=5), expected).pvalue > 0.001


@pytest.mark.parametrize("per_lesion", [False, True])
def test_draws_follow_the_generator_alone(per_lesion: bool) -> None:
    first, second = (LesionPool(MASKS).draw(50, np.random.default_rng(3), per_lesion=per_lesion) for _ in range(2))
    assert (first == second).all()


def _disc(side: int, row: int, col: int, radius: int) -> np.ndarray:
    rows, cols = np.indices((side, side))
    return np.hypot(rows - row, cols - col) < radius


REGIONS = [_disc(90, 40, 50, 30), _disc(61, 30, 30, 25) & ~_disc(61, 30, 30, 10)]


@settings(deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 10**6))
def test_region_centres_lie_in_the_region_of_the_image_of_their_id(seed: int, per_image: int) -> None:
    pool = RegionPool(REGIONS, per_image=per_image, seed=seed)
    ids = np.random.default_rng(0).integers(len(pool), size=60)
    for identity, (image, row, col) in zip(ids, pool.centres(ids), strict=True):
        assert image == identity // per_image
        assert REGIONS[image][row, col]


def test_region_ids_mean_the_same_places_for_ever() -> None:
    pool = RegionPool(REGIONS, per_image=1000, seed=7)
    golden = [[0, 25, 44], [0, 61, 53], [0, 59, 64], [1, 20, 13], [1, 39, 40]]
    assert pool.centres(np.array([0, 1, 999, 1000, 1999])).tolist() == golden
    assert pool.centres(np.array([1999, 1000, 999, 1, 0])).tolist() == golden[::-1]


def test_the_first_and_last_id_of_an_image_belong_to_it() -> None:
    pool = RegionPool(REGIONS, per_image=10, seed=0)
    assert len(pool) == 20
    assert pool.centres(np.array([0, 9, 10, 19]))[:, 0].tolist() == [0, 0, 1, 1]


def test_another_seed_means_other_places() -> None:
    ids = np.arange(200)
    places = [RegionPool(REGIONS, per_image=100, seed=seed).centres(ids) for seed in (1, 2)]
    assert (places[0] == places[1]).all(axis=1).mean() < 0.1


def test_region_places_are_uniform_over_the_cells_and_within_them() -> None:
    region = np.ones((16, 24), bool)
    places = RegionPool([region], per_image=40_000, seed=5).centres(np.arange(40_000))
    counts = np.bincount(places[:, 1] * 24 + places[:, 2], minlength=16 * 24)
    assert chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize("region", [np.zeros((40, 40), bool), np.ones((3, 40), bool), _disc(20, 9, 9, 2)])
def test_an_image_without_an_allowed_region_is_named(region: np.ndarray) -> None:
    pool = RegionPool([REGIONS[0], region], per_image=10, seed=0)
    with pytest.raises(ValueError, match="image 1 of the pool has no allowed region"):
        len(pool)
