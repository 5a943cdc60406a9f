"""FRRN-A is the published network: parameter counts, shapes, and every weight in use."""

from __future__ import annotations

import pytest
import torch
from networks import calibrated_frrn

from ma_cluster.hypotheses.frrn import STRIDE, Frrn, Stage


@pytest.mark.parametrize(("classes", "parameters"), [(2, 17_745_970), (1, 17_745_921)])
def test_the_published_network_has_its_number_of_parameters(classes: int, parameters: int) -> None:
    assert sum(p.numel() for p in Frrn(classes=classes).parameters()) == parameters


@pytest.mark.parametrize("width", [1 / 16, 1 / 6, 0.5])
def test_thin_networks_have_channels_in_multiples_of_8(width: float) -> None:
    channels = {conv.out_channels for conv in Frrn(width).modules() if isinstance(conv, torch.nn.Conv2d)} - {2}
    assert all(count % 8 == 0 for count in channels)


@pytest.mark.parametrize(("height", "width"), [(STRIDE, STRIDE), (32, 80), (112, 16)])
def test_logits_have_the_shape_of_the_patch(height: int, width: int) -> None:
    network = Frrn(1 / 16).eval()
    with torch.inference_mode():
        assert network(torch.zeros(2, 3, height, width)).shape == (2, 2, height, width)


def test_every_weight_receives_a_gradient() -> None:
    torch.manual_seed(0)
    network = Frrn(1 / 16)
    network(torch.randn(2, 3, 32, 32)).square().mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert silent == []


def test_the_pooling_streams_reach_the_published_scales() -> None:
    scales = [[unit.scale for unit in stage] for stage in Frrn(1 / 16).modules() if isinstance(stage, Stage)]
    assert scales == [[2, 2, 2], [4, 4, 4, 4], [8, 8], [16, 16], [8, 8], [4, 4], [2, 2]]


def test_the_residual_stream_keeps_what_it_held_at_full_resolution() -> None:
    torch.manual_seed(0)
    stage = Stage(8, 8, 8, scale=4, units=2).eval()
    for unit in stage:
        torch.nn.init.zeros_(unit.back.weight)
        torch.nn.init.zeros_(unit.back.bias)
    z = torch.randn(1, 8, 16, 16)
    _, after = stage(torch.randn(1, 8, 4, 4), z)
    assert torch.equal(after, z)


def test_photographs_of_a_batch_do_not_mix_in_eval_mode() -> None:
    network = calibrated_frrn()
    patches = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        together, alone = network(patches), network(patches[1:2])
    assert torch.allclose(together[1:2], alone, rtol=1e-3, atol=1e-3)
