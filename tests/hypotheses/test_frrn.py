"""FRRN-A is the published network: parameter counts, shapes, and every weight in use."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from untrained import calibrated_frrn

from ma_cluster.hypotheses.frrn import STRIDE, Frrn


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


def as_published(network: Frrn, x: Tensor) -> Tensor:
    """The network with its residual stream written out: pooled at full size by each unit, and updated there."""
    y = network.stem_units(network.stem(x))
    z = network.split(y)
    for stages, scales in ((network.down, (2, 4, 8, 16)), (network.up, (8, 4, 2))):
        for stage, scale in zip(stages, scales, strict=True):
            y = F.max_pool2d(y, 2) if stages is network.down else upsample2(y)
            for unit in stage:
                y = F.relu(unit.first(torch.cat([y, F.max_pool2d(z, scale)], dim=1)))
                y = F.relu(unit.second(y))
                z = z + F.interpolate(unit.back(y), scale_factor=scale, mode="nearest")
    return network.head(network.merge_units(torch.cat([upsample2(y), z], dim=1)))


def upsample2(y: Tensor) -> Tensor:
    return F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)


def test_keeping_the_residual_stream_pooled_is_the_published_network() -> None:
    network, x = calibrated_frrn().double(), torch.randn(2, 3, 64, 96).double()
    with torch.inference_mode():
        assert torch.allclose(network(x), as_published(network, x), rtol=1e-9, atol=1e-9)


def test_keeping_the_residual_stream_pooled_gives_the_published_gradients() -> None:
    network, x = calibrated_frrn().double(), torch.randn(1, 3, 32, 48).double()
    gradients = [
        torch.autograd.grad(each.square().mean(), list(network.parameters()))
        for each in (network(x), as_published(network, x))
    ]
    for found, expected in zip(*gradients, strict=True):
        assert torch.allclose(found, expected, rtol=1e-7, atol=1e-10)


def test_the_pooling_streams_reach_the_published_depths() -> None:
    network = Frrn(1 / 16)
    assert [len(stage) for stage in network.down] == [3, 4, 2, 2]
    assert [len(stage) for stage in network.up] == [2, 2, 2]


def test_photographs_of_a_batch_do_not_mix_in_eval_mode() -> None:
    network = calibrated_frrn()
    patches = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        together, alone = network(patches), network(patches[1:2])
    assert torch.allclose(together[1:2], alone, rtol=1e-3, atol=1e-3)
