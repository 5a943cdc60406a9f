"""Networks for the tests: untrained, but with batch-norm statistics that keep their activations in range."""

from __future__ import annotations

from dataclasses import replace

import torch

from ma_cluster.bundle import Bundle
from ma_cluster.config import ImageConfig, tiny
from ma_cluster.hypotheses.frrn import Frrn, build_hgn


def calibrated_frrn(width: float = 1 / 16, seed: int = 0) -> Frrn:
    """An untrained FRRN in eval mode whose batch norms have seen random patches."""
    torch.manual_seed(seed)
    network = Frrn(width).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain average of what it sees
    with torch.no_grad():
        for _ in range(4):
            network(torch.randn(4, 3, 32, 32).clamp(-1, 1))
    return network.eval()


def untrained_bundle() -> Bundle:
    """A bundle that answers within a second: untrained networks, on photographs brought to 256 pixels."""
    torch.manual_seed(1)
    recipe = replace(tiny(), image=ImageConfig(fov_diameter_px=256.0))
    weights = {"hgn_1x": build_hgn(recipe.hgn_1x).state_dict(), "hgn_half": build_hgn(recipe.hgn_half).state_dict()}
    return Bundle(recipe=recipe, weights=weights, attribution="untrained")
