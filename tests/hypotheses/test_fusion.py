"""Fusion of probability maps, and the way from the 0.5x grid to the 1x grid."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ma_cluster.config import Fusion
from ma_cluster.hypotheses.fusion import can_reach, fuse, scale_odds, upsample_half
from ma_cluster.images.fundus import half_scale

HOWS: list[Fusion] = ["geometric", "arithmetic"]
ONE = np.array([[0.4, 0.0], [1.0, 0.9]], np.float32)
TWO = np.array([[0.1, 0.8], [1.0, 0.4]], np.float32)
probabilities = arrays(np.float32, (3, 4), elements=st.floats(0, 1, width=32))


def test_the_means_by_hand() -> None:
    assert fuse([ONE, TWO], "arithmetic") == pytest.approx(np.array([[0.25, 0.4], [1.0, 0.65]]))
    assert fuse([ONE, TWO], "geometric") == pytest.approx(np.array([[0.2, 0.0], [1.0, 0.6]]))


def test_four_maps_weigh_the_same() -> None:
    maps = [np.full((1, 1), value, np.float32) for value in (0.1, 0.2, 0.4, 0.8)]
    assert fuse(maps, "arithmetic").item() == pytest.approx(0.375)
    assert fuse(maps, "geometric").item() == pytest.approx(0.0064**0.25)


def test_weights_count_a_map_more_than_once_or_not_at_all() -> None:
    for how in HOWS:
        assert fuse([ONE, TWO], how, [2.0, 1.0]) == pytest.approx(fuse([ONE, ONE, TWO], how), abs=1e-6)
        assert (fuse([ONE, TWO], how, [0.0, 1.0]) == TWO).all()
        assert fuse([ONE, TWO], how, [0.5, 0.5]) == pytest.approx(fuse([ONE, TWO], how), abs=1e-6)


@pytest.mark.parametrize("how", HOWS)
def test_one_map_fuses_to_itself_and_none_is_changed(how: Fusion) -> None:
    one, two = ONE.copy(), TWO.copy()
    assert (fuse([one], how) == ONE).all()
    fuse([one, two], how)
    assert (one == ONE).all() and (two == TWO).all()


@settings(deadline=None, max_examples=40)
@given(st.lists(probabilities, min_size=1, max_size=4))
def test_the_geometric_mean_lies_below_the_arithmetic_and_both_between_the_maps(maps: list[np.ndarray]) -> None:
    geometric, arithmetic = fuse(maps, "geometric"), fuse(maps, "arithmetic")
    assert geometric.dtype == arithmetic.dtype == np.float32
    assert (geometric <= arithmetic + 1e-6).all()
    assert (arithmetic <= np.max(maps, axis=0) + 1e-6).all() and (arithmetic >= np.min(maps, axis=0) - 1e-6).all()
    assert (geometric[np.min(maps, axis=0) == 0] == 0).all()


@pytest.mark.parametrize("how", HOWS)
@settings(deadline=None, max_examples=40)
@given(maps=st.lists(probabilities, min_size=2, max_size=4), data=st.data())
def test_the_order_of_maps_does_not_matter(how: Fusion, maps: list[np.ndarray], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(maps))
    assert fuse(maps, how) == pytest.approx(fuse(shuffled, how), abs=1e-6)


def test_the_half_map_comes_back_to_the_places_it_was_reduced_from() -> None:
    for ramp in np.indices((20, 32)).astype(np.uint8) * 4:
        half = half_scale(ramp[:, :, None].repeat(3, axis=2))[:, :, 0]
        back = upsample_half(half.astype(np.float32), ramp.shape)
        assert back[1:-1, 1:-1] == pytest.approx(ramp[1:-1, 1:-1].astype(float), abs=1e-4)


def test_a_flat_half_map_stays_flat() -> None:
    assert (upsample_half(np.full((5, 7), 0.3, np.float32), (10, 14)) == np.float32(0.3)).all()


def test_what_can_reach_a_threshold_by_hand() -> None:
    maps = [np.array([[0.9, 0.9, 0.5, 0.1]], np.float32), np.array([[0.9, 0.9, 0.5, 0.1]], np.float32)]
    regions = [np.array([[True, True, True, True]]), np.array([[True, False, True, True]])]
    arithmetic = can_reach(0.7, maps, regions, ("arithmetic", [1.0] * 4))
    geometric = can_reach(0.7, maps, regions, ("geometric", [1.0] * 4))
    assert arithmetic.tolist() == [[True, True, True, False]]  # 0.95 0.7 0.75 0.55
    assert geometric.tolist() == [[True, False, True, False]]  # 0.95 0 0.71 0.32


@pytest.mark.parametrize("how", HOWS)
@settings(deadline=None, max_examples=60)
@given(
    hypotheses=st.lists(probabilities, min_size=2, max_size=2),
    refined=st.lists(probabilities, min_size=2, max_size=2),
    threshold=st.floats(0.05, 0.95),
    weight=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_what_reaches_the_threshold_could_reach_it(
    how: Fusion, hypotheses: list[np.ndarray], refined: list[np.ndarray], threshold: float, weight: float
) -> None:
    weights = [weight, 1.0, weight, 1.0]
    regions = [hypothesis > 0.3 for hypothesis in hypotheses]
    fused = fuse([*hypotheses, *(map_ * region for map_, region in zip(refined, regions, strict=True))], how, weights)
    assert can_reach(threshold, hypotheses, regions, (how, weights))[fused >= threshold].all()


def test_odds_are_scaled_and_certainty_stays():
    ours = scale_odds(np.array([[0.0, 0.2, 0.5, 1.0]], np.float32), 4.0)
    assert ours[0].tolist() == pytest.approx([0.0, 0.5, 0.8, 1.0])
