"""From logits to probabilities, folding and flips, and the moving average of the weights."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from untrained import calibrated_frrn

from ma_cluster import networks
from ma_cluster.networks import FLIPS, FlipAugmented, OneDnnConv2d, WeightAverage, fold, probability


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_overflow_in_any_precision_is_no_certainty(dtype: torch.dtype) -> None:
    logits = (torch.tensor([0.0, 200.0, -200.0], dtype=dtype) * torch.finfo(dtype).max).float()
    assert not torch.isfinite(probability(logits)[1:]).any()
    assert not torch.isfinite(probability(logits - logits[1])).any(), "infinity less infinity"


def test_a_finite_logit_has_its_sigmoid() -> None:
    logits = torch.linspace(-80, 80, 33)
    assert torch.equal(probability(logits), torch.sigmoid(logits))


def test_a_folded_network_answers_as_before_without_a_batch_norm() -> None:
    network = calibrated_frrn()
    folded = copy.deepcopy(network)
    fold(folded)
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    x = torch.randn(2, 3, 64, 48)
    with torch.inference_mode():
        assert torch.allclose(folded(x), network(x), rtol=1e-3, atol=1e-3)


def test_convolutions_are_onednn_s_own_where_there_is_one() -> None:
    network = calibrated_frrn()
    fold(network)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    ours = {isinstance(module, OneDnnConv2d) for module in convolutions}
    assert ours == {torch.backends.mkldnn.is_available()}


def other(**operators: Any) -> type[OneDnnConv2d]:
    """What another version of torch may have in place of oneDNN's operators."""
    return type("Other", (OneDnnConv2d,), {"operators": SimpleNamespace(**operators)})


def one_argument(x: Tensor) -> Tensor:
    return x


def louder(x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
    return F.conv2d(x, 1.01 * weight, bias, padding=weight.shape[-1] // 2)


JOINING = torch.ops.mkldnn._convolution_pointwise_


@pytest.mark.parametrize(
    "private",
    [
        pytest.param(other(), id="none"),
        pytest.param(other(_convolution_pointwise=torch.ops.mkldnn._convolution_pointwise), id="none that joins"),
        pytest.param(other(_convolution_pointwise=one_argument, _convolution_pointwise_=JOINING), id="other arguments"),
        pytest.param(other(_convolution_pointwise=louder, _convolution_pointwise_=JOINING), id="other values"),
    ],
)
def test_where_torch_has_other_private_operators_the_public_ones_answer_the_same(
    private: type[OneDnnConv2d], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[Any, ...]] = []
    # the log itself, as some library that other tests load switches off the loggers that are there
    monkeypatch.setattr(networks, "log", SimpleNamespace(warning=lambda *words: told.append(words)))
    network = calibrated_frrn()
    plain, ours = copy.deepcopy(network), copy.deepcopy(network)
    fold(ours)
    fold(plain, private)
    fold(copy.deepcopy(network), private)
    expected = 1 if torch.backends.mkldnn.is_available() else 0
    assert len(told) == expected, "one line, however many networks"
    assert not any(isinstance(module, OneDnnConv2d) for module in plain.modules())
    x = torch.randn(1, 3, 48, 64).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert torch.allclose(plain(x), ours(x), rtol=1e-4, atol=1e-3)  # of logits up to 100


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


def test_an_average_follows_at_first_and_then_by_its_decay() -> None:
    model = nn.BatchNorm2d(1)
    average, expected = WeightAverage(model, 0.9), 1.0
    for step in range(200):
        with torch.no_grad():
            model.weight.fill_(float(step))
            model.num_batches_tracked.fill_(step)
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert torch.isclose(average.network.weight, torch.tensor(expected)).all()
    assert average.network.num_batches_tracked == 199 and model.weight == 199


def test_without_decay_the_average_is_the_network() -> None:
    model = nn.Conv2d(1, 1, 1)
    average = WeightAverage(model, 0.0)
    average.update(0)
    assert average.network is model
