"""A network under several flips: unmoved by them, and itself where only one is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from untrained import calibrated_frrn

from ma_cluster.networks.test_time_augmentation import FLIPS, FlipAugmented


class Slope(nn.Module):
    """As one-sided as can be: adds the number of the column and ten times that of the row."""

    def forward(self, x: Tensor) -> Tensor:
        rows, cols = torch.meshgrid(torch.arange(x.shape[2]), torch.arange(x.shape[3]), indexing="ij")
        return x + cols + 10 * rows


def test_one_flip_is_the_network_itself() -> None:
    x = torch.rand(1, 3, 2, 4)
    assert torch.equal(FlipAugmented(Slope(), 1)(x), Slope()(x))


def test_the_answers_of_two_and_four_flips_are_averaged() -> None:
    x = torch.zeros(1, 3, 2, 4)
    assert FlipAugmented(Slope(), 2)(x)[0, 0].tolist() == [[1.5] * 4, [11.5] * 4]
    assert FlipAugmented(Slope(), 4)(x)[0, 0].tolist() == [[6.5] * 4] * 2


@pytest.mark.parametrize("axes", FLIPS)
def test_a_flipped_tile_gets_the_flipped_answer(axes: tuple[int, ...]) -> None:
    network, x = FlipAugmented(calibrated_frrn(), len(FLIPS)), torch.randn(1, 3, 32, 48)
    with torch.inference_mode():
        assert torch.allclose(network(x.flip(axes)), network(x).flip(axes), atol=1e-4)
