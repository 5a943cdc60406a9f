"""Maps of whole photographs tile by tile, and their fusion."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn
from untrained import calibrated_frrn

from ma_cluster.config import Fusion
from ma_cluster.hypotheses.maps import can_reach, fuse, hgn_probability, probability_maps, scale_odds, upsample_half
from ma_cluster.images.fundus import half_scale
from ma_cluster.images.patches import Tiling
from ma_cluster.images.reading import MID_GREY
from ma_cluster.networks import TileExecutor

LANES = st.builds(TileExecutor, st.integers(1, 9), st.sampled_from([map, ThreadPoolExecutor(3).map]))


class Pixelwise(nn.Module):
    """Stands in for a network: the lesion logit is the red channel; remembers how many tiles it saw at once."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.batches: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        return torch.stack([torch.zeros_like(x[:, 0]), x[:, 0]], dim=1)


def disc(height: int, width: int) -> np.ndarray:
    rows, cols = np.indices((height, width))
    return np.hypot(rows - height / 2, cols - width / 2) < 0.45 * min(height, width)


def grain(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(deadline=None, max_examples=25)
@given(st.integers(20, 150), st.integers(20, 150), st.integers(1, 4), st.integers(0, 1), LANES)
def test_every_pixel_gets_its_own_answer(height: int, width: int, room: int, halo: int, executor: TileExecutor) -> None:
    enhanced, fov = grain(height, width), disc(height, width)
    tiling = Tiling(height, width, 16 * (2 * halo + room), 16 * halo)
    found = probability_maps(Pixelwise(), enhanced, fov, tiling, executor)[0]
    expected = fov / (1 + np.exp(-(enhanced[:, :, 0].astype(float) - MID_GREY) / 128))
    assert found.dtype == np.float32
    assert found == pytest.approx(expected, abs=1e-6)


def test_tiles_outside_the_field_of_view_are_not_computed() -> None:
    fov = np.zeros((256, 256), bool)
    fov[10:20, 190:200] = True
    network = Pixelwise()
    found = probability_maps(network, grain(256, 256), fov, Tiling(256, 256, 64, 16))[0]
    assert sum(network.batches) == 1
    assert not found[~fov].any() and found[fov].any()


def test_a_photograph_without_a_field_of_view_asks_the_network_nothing() -> None:
    network = Pixelwise()
    assert not probability_maps(network, grain(64, 64), np.zeros((64, 64), bool), Tiling(64, 64, 32, 0))[0].any()
    assert network.batches == []


def test_no_batch_is_larger_than_asked() -> None:
    network = Pixelwise()
    tiling, fov = Tiling(200, 200, 64, 16), np.ones((200, 200), bool)
    probability_maps(network, grain(200, 200), fov, tiling, TileExecutor(tiles=4))[0]
    assert max(network.batches) == 4 and sum(network.batches) == len(tiling.covering(fov)) == 49


def test_the_batch_size_does_not_change_the_map() -> None:
    network, fov = calibrated_frrn(), disc(200, 170)
    tiling = Tiling(200, 170, 96, 32)
    one, three, all_tiles = (
        probability_maps(network, grain(200, 170), fov, tiling, TileExecutor(n))[0] for n in (1, 3, 100)
    )
    assert np.abs(one - three).max() < 1e-4
    assert np.abs(one - all_tiles).max() < 1e-4


def test_the_order_of_tiles_does_not_change_the_map() -> None:
    class Reversed(Tiling):
        def covering(self, mask: np.ndarray) -> tuple:  # type: ignore[type-arg]
            return Tiling.covering(self, mask)[::-1]

    network, fov, enhanced = calibrated_frrn(), disc(200, 170), grain(200, 170)
    forth = probability_maps(network, enhanced, fov, Tiling(200, 170, 96, 32))[0]
    back = probability_maps(network, enhanced, fov, Reversed(200, 170, 96, 32))[0]
    assert np.abs(forth - back).max() < 1e-4


def whole(network: nn.Module, enhanced: np.ndarray) -> np.ndarray:
    """The map of the network run once over all of a photograph whose sides are multiples of 16."""
    return hgn_probability(network, torch.from_numpy(enhanced).permute(2, 0, 1)[None]).numpy()[0, 0]


def test_tiles_with_a_halo_beyond_the_receptive_field_equal_the_whole_photograph() -> None:
    network, enhanced = calibrated_frrn(), grain(64, 640)
    tiling, fov = Tiling(64, 640, tile=720, halo=192), np.ones((64, 640), bool)
    assert len(tiling.covering(fov)) == 2
    tiled = probability_maps(network, enhanced, fov, tiling)[0]
    assert np.abs(tiled - whole(network, enhanced)).max() < 1e-4


def test_a_larger_halo_brings_tiles_nearer_to_the_whole_photograph() -> None:
    network, enhanced = calibrated_frrn(), grain(192, 384)
    expected, fov = whole(network, enhanced), np.ones((192, 384), bool)
    tiled = [
        probability_maps(network, enhanced, fov, Tiling(192, 384, 192 + 2 * halo, halo))[0] for halo in (0, 32, 64)
    ]
    off = [np.abs(each - expected).mean() for each in tiled]
    assert off[0] > 2 * off[1] > 4 * off[2] > 0


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
