"""Folding batch norms leaves a network's answers as they are."""

from __future__ import annotations

import copy

import torch
from networks import calibrated_frrn
from torch import nn

from ma_cluster.hypotheses.folding import fold_batch_norms


def test_a_folded_network_answers_as_before_without_a_batch_norm() -> None:
    network = calibrated_frrn()
    folded = copy.deepcopy(network)
    fold_batch_norms(folded)
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    x = torch.randn(2, 3, 64, 48)
    with torch.inference_mode():
        assert torch.allclose(folded(x), network(x), rtol=1e-3, atol=1e-3)
