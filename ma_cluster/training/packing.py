"""Checkpoints of training -> a model bundle, each checked against the recipe's network on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ma_cluster.bundle import Bundle, load_weights
from ma_cluster.checkpoint import checkpoint_about, checkpoint_weights, read_checkpoint
from ma_cluster.config import Recipe, recipe_from_dict
from ma_cluster.errors import BundleError, UsageError
from ma_cluster.hypotheses.frrn import of_first_kind
from ma_cluster.identity import deciding
from ma_cluster.lesions.detector import build_network

_SECTION = {"hgn_1x": "hgn_1x", "hgn_half": "hgn_half", "prn": "prn", "cls": "prn"}
"""The part of a recipe that a network is of."""


def pack(checkpoints: Mapping[str, Sequence[str]], recipe: Recipe | None, attribution: str) -> Bundle:
    """A bundle of checkpoints.

    Args:
        checkpoints: URLs of each network's checkpoints, or of their runs' folders, by the network's name (hgn_1x,
            hgn_half, prn, cls). Of several, as of a training gone on with, the mean of the weights (Wortsman et al.,
            "Model soups", ICML 2022).
        recipe: of the networks; None takes what the checkpoints say, each of its own network.
        attribution: of the data they were trained on, as its licence asks for.

    Raises:
        BundleError: a checkpoint is of another network or recipe, or a required one is missing.
        UsageError: there is no such checkpoint, or none says its recipe.
    """
    read = {name: [read_checkpoint(url) for url in urls] for name, urls in checkpoints.items()}
    said = {name: [checkpoint_about(data, name) for data in of_one] for name, of_one in read.items()}
    recipe = _recipe({name: abouts[-1] for name, abouts in said.items()}) if recipe is None else recipe
    for name, abouts in said.items():
        for about in abouts:
            _check_about(about, name, recipe)
    weights = {name: _mean([_weights(data, name, recipe) for data in of_one]) for name, of_one in read.items()}
    training = {name: {key: abouts[-1][key] for key in abouts[-1] if key != "recipe"} for name, abouts in said.items()}
    return Bundle(recipe, weights, attribution, training=training)


def _recipe(said: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """What the checkpoints were trained by: the first one's recipe, with each network's own part as it was trained."""
    for name, about in said.items():
        if "recipe" not in about:
            raise UsageError(f"the checkpoint of {name} does not say its recipe, as older ones do not; give --recipe")
    recipe = recipe_from_dict(next(iter(said.values()))["recipe"])
    for name in sorted(said):  # prn, not cls, has the last word on the part that they share
        own = recipe_from_dict(said[name]["recipe"])
        recipe = dataclasses.replace(recipe, **{_SECTION[name]: getattr(own, _SECTION[name])})
    return recipe


def _check_about(about: Mapping[str, Any], name: str, recipe: Recipe) -> None:
    """That a checkpoint is of this network, and that its recipe prepares photographs and builds networks as ours does.

    Raises:
        BundleError: saying what differs. A checkpoint that says nothing is left to the shapes of its weights.
    """
    if about.get("network", name) != name:
        raise BundleError(f"the checkpoint that is given as {name} is of {about['network']}")
    if "recipe" not in about:
        return
    own = recipe_from_dict(about["recipe"])
    for section in ("image", _SECTION[name]):
        theirs, ours = (deciding(each)[section] for each in (own, recipe))
        for key in sorted(theirs.keys() | ours.keys()):
            if theirs.get(key) != ours.get(key):
                values = [getattr(getattr(each, section), key) for each in (own, recipe)]
                raise BundleError(
                    f"the checkpoint of {name} was trained by recipe {own.name} with {section}.{key} {values[0]:.6g}, "
                    f"recipe {recipe.name} has {values[1]:.6g}"
                )


def _weights(data: bytes, name: str, recipe: Recipe) -> dict[str, Tensor]:
    weights = checkpoint_weights(data, name)
    if name.startswith("hgn"):
        weights = of_first_kind(weights)
    load_weights(build_network(name, recipe), weights, name)  # do they fit?
    return weights


def _mean(networks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of each tensor; counts, which have none, are the last network's."""
    *_, last = networks
    return {
        key: torch.stack([network[key] for network in networks]).mean(dim=0) if value.is_floating_point() else value
        for key, value in last.items()
    }
