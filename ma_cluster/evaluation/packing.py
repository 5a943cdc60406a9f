"""Checkpoints of training -> a model bundle, each checked against the recipe's network on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ma_cluster.bundle import Bundle, restore_checkpoint
from ma_cluster.config import Recipe
from ma_cluster.evaluation.calibration import calibrate
from ma_cluster.images.datasets import Sample, read_checkpoint
from ma_cluster.lesions.stages import build_network


def pack(
    checkpoints: Mapping[str, Sequence[str]],
    recipe: Recipe,
    attribution: str,
    validation: Sequence[Sample] = (),
    threads: int | None = None,
) -> Bundle:
    """A bundle of what `save_checkpoint` wrote, calibrated where there are validation photographs.

    Args:
        checkpoints: URLs of each network's checkpoints, by the network's name (hgn_1x, hgn_half, prn, cls). Of several,
            as of a training gone on with, the mean of the weights (Wortsman et al., "Model soups", ICML 2022).
        recipe: of the networks.
        attribution: of the data they were trained on, as its licence asks for.
        validation: photographs with masks on which regions of interest, fusion and threshold are chosen; without any
            the recipe's stay.
        threads: of the calibration, as for `Detector`.

    Raises:
        BundleError: a checkpoint is of another network, or a required one is missing.
        UsageError: there is no such checkpoint.
    """
    weights = {name: _mean([_read(url, name, recipe) for url in urls]) for name, urls in checkpoints.items()}
    bundle = Bundle(recipe, weights, attribution)
    return calibrate(bundle, validation, threads) if validation else bundle


def _read(url: str, name: str, recipe: Recipe) -> dict[str, Tensor]:
    network = build_network(name, recipe)
    restore_checkpoint(read_checkpoint(url), name, network)
    return network.state_dict()


def _mean(networks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of each tensor; counts, which have none, are the last network's."""
    *_, last = networks
    return {
        key: torch.stack([network[key] for network in networks]).mean(dim=0) if value.is_floating_point() else value
        for key, value in last.items()
    }
