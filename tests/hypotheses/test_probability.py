"""A probability map over a photograph is that of the whole photograph, however it is tiled and batched."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from untrained import calibrated_frrn

from ma_cluster.hypotheses.probability import probability_map
from ma_cluster.hypotheses.step import hgn_probability
from ma_cluster.images.contrast import MID_GREY
from ma_cluster.images.patches import Tiling
from ma_cluster.networks.tile_executor import TileExecutor

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
    found = probability_map(Pixelwise(), enhanced, fov, tiling, executor)
    expected = fov / (1 + np.exp(-(enhanced[:, :, 0].astype(float) - MID_GREY) / 128))
    assert found.dtype == np.float32
    assert found == pytest.approx(expected, abs=1e-6)


def test_tiles_outside_the_field_of_view_are_not_computed() -> None:
    fov = np.zeros((256, 256), bool)
    fov[10:20, 190:200] = True
    network = Pixelwise()
    found = probability_map(network, grain(256, 256), fov, Tiling(256, 256, 64, 16))
    assert sum(network.batches) == 1
    assert not found[~fov].any() and found[fov].any()


def test_a_photograph_without_a_field_of_view_asks_the_network_nothing() -> None:
    network = Pixelwise()
    assert not probability_map(network, grain(64, 64), np.zeros((64, 64), bool), Tiling(64, 64, 32, 0)).any()
    assert network.batches == []


def test_no_batch_is_larger_than_asked() -> None:
    network = Pixelwise()
    tiling, fov = Tiling(200, 200, 64, 16), np.ones((200, 200), bool)
    probability_map(network, grain(200, 200), fov, tiling, TileExecutor(tiles=4))
    assert max(network.batches) == 4 and sum(network.batches) == len(tiling.covering(fov)) == 49


def test_the_batch_size_does_not_change_the_map() -> None:
    network, fov = calibrated_frrn(), disc(200, 170)
    tiling = Tiling(200, 170, 96, 32)
    one, three, all_tiles = (
        probability_map(network, grain(200, 170), fov, tiling, TileExecutor(n)) for n in (1, 3, 100)
    )
    assert np.abs(one - three).max() < 1e-4
    assert np.abs(one - all_tiles).max() < 1e-4


def test_the_order_of_tiles_does_not_change_the_map() -> None:
    class Reversed(Tiling):
        def covering(self, mask: np.ndarray) -> tuple:  # type: ignore[type-arg]
            return Tiling.covering(self, mask)[::-1]

    network, fov, enhanced = calibrated_frrn(), disc(200, 170), grain(200, 170)
    forth = probability_map(network, enhanced, fov, Tiling(200, 170, 96, 32))
    back = probability_map(network, enhanced, fov, Reversed(200, 170, 96, 32))
    assert np.abs(forth - back).max() < 1e-4


def whole(network: nn.Module, enhanced: np.ndarray) -> np.ndarray:
    """The map of the network run once over all of a photograph whose sides are multiples of 16."""
    return hgn_probability(network, torch.from_numpy(enhanced).permute(2, 0, 1)[None]).numpy()[0]


def test_tiles_with_a_halo_beyond_the_receptive_field_equal_the_whole_photograph() -> None:
    network, enhanced = calibrated_frrn(), grain(64, 640)
    tiling, fov = Tiling(64, 640, tile=720, halo=192), np.ones((64, 640), bool)
    assert len(tiling.covering(fov)) == 2
    tiled = probability_map(network, enhanced, fov, tiling)
    assert np.abs(tiled - whole(network, enhanced)).max() < 1e-4


def test_a_larger_halo_brings_tiles_nearer_to_the_whole_photograph() -> None:
    network, enhanced = calibrated_frrn(), grain(192, 384)
    expected, fov = whole(network, enhanced), np.ones((192, 384), bool)
    tiled = [probability_map(network, enhanced, fov, Tiling(192, 384, 192 + 2 * halo, halo)) for halo in (0, 32, 64)]
    off = [np.abs(each - expected).mean() for each in tiled]
    assert off[0] > 2 * off[1] > 4 * off[2] > 0
