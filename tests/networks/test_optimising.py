"""The moving average of a network's weights."""

from __future__ import annotations

import torch
from torch import nn

from ma_cluster.networks.optimising import WeightAverage


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
