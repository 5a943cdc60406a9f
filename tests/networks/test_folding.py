"""Folding batch norms leaves a network's answers as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from untrained import calibrated_frrn

from ma_cluster.networks.folding import OneDnnConv2d, fold


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


def test_without_onednn_answers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    network = calibrated_frrn()
    plain, ours = copy.deepcopy(network), copy.deepcopy(network)
    fold(ours)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    fold(plain)
    x = torch.randn(1, 3, 48, 64).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert torch.allclose(plain(x), ours(x), rtol=1e-4, atol=1e-3)  # of logits up to 100
