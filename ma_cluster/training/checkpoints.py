"""Checkpoints: weights and optimiser in one safetensors file, with the run that wrote it; and models packed of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Bool
from numpy import ndarray
from safetensors.torch import save
from torch import Tensor, nn

from ma_cluster.bundle import Bundle, load_safetensors, load_weights
from ma_cluster.config import JUDGE, Recipe, deciding, recipe_from_dict
from ma_cluster.errors import BundleError, ObjectMissingError, UsageError
from ma_cluster.hypotheses.frrn import build_hgn, kinds_in
from ma_cluster.hypotheses.maps import probability_maps, upsample_half
from ma_cluster.images.datasets import Sample, decode_mask, look_at_each, read_object
from ma_cluster.images.fundus import half_scale_mask
from ma_cluster.images.patches import Tiling
from ma_cluster.images.reading import Prepared
from ma_cluster.lesions.detector import Detector, build_network
from ma_cluster.lesions.judge import Candidates, find_candidates, fit_judge, measure
from ma_cluster.networks import fold
from ma_cluster.storage.store import open_store

Networks = Mapping[str, nn.Module]
_SECTION = {"hgn_1x": "hgn_1x", "hgn_half": "hgn_half", "prn": "prn", "cls": "prn"}
"""The part of a recipe that a network is of."""
LAST, BEST = "last.safetensors", "best.safetensors"
"""Of a run's folder: where it goes on, and the epoch of the best validation figure."""
_ABOUT = "about"
_MARGIN = np.ones((3, 3), np.uint8)  # a candidate on a lesion's rim is that lesion


def read_checkpoint(url: str) -> bytes:
    """The bytes of a checkpoint by its URL, or by that of a run's folder: its best one.

    Raises:
        UsageError: there is none.
    """
    folder, _, name = url.rpartition("/") if url.endswith(".safetensors") else (url, "", BEST)
    try:
        return open_store(folder).get(name)
    except ObjectMissingError as error:
        raise UsageError(f"no checkpoint at {url}; give its URL, or the folder of a run that has validated") from error


def checkpoint_bytes(
    networks: Networks,
    optimizer: torch.optim.Optimizer,
    position: Mapping[str, int],
    about: Mapping[str, Any] | None = None,
) -> bytes:
    """Weights and optimiser state as the bytes of one safetensors file.

    Args:
        networks: by name, of which `model` is the one that ships.
        optimizer: of the network that is trained.
        position: where training is: step, seed, ...
        about: the run, as JSON values: `network`, `recipe`, `training` (the network's own part of it), `photographs`
            (the data's digest), `version` (of the code), ...
    """
    tensors = {
        f"{name}.{key}": value.contiguous()
        for name, network in networks.items()
        for key, value in network.state_dict().items()
    }
    for number, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{number}.{key}": value.contiguous() for key, value in state.items()})
    metadata = {key: str(value) for key, value in position.items()} | {_ABOUT: json.dumps(about or {})}
    return save(tensors, metadata=metadata)


def restore_checkpoint(
    data: bytes, name: str, networks: Networks, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, int]:
    """Restore what `checkpoint_bytes` gave, and return the position; errors call it `name`.

    Raises:
        BundleError: no safetensors file, or of another network.
    """
    tensors = load_safetensors(data, name)
    for prefix, network in networks.items():
        load_weights(network, _of_network(tensors, prefix), name)
    if optimizer is not None:
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, number, quantity = key.split(".", 2)
                state.setdefault(int(number), {})[quantity] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    try:
        return {key: int(value) for key, value in _metadata(data).items() if key != _ABOUT}
    except ValueError as error:
        raise BundleError(f"{name} does not say where training stands: it is no checkpoint of ours") from error


def checkpoint_about(data: bytes, name: str) -> dict[str, Any]:
    """What a checkpoint's bytes say of the run that wrote it; empty of one that says nothing. Errors call it `name`."""
    load_safetensors(data, name)  # is it one at all?
    try:
        about = json.loads(_metadata(data).get(_ABOUT, "{}"))
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise BundleError(f"what {name} says of its run is no JSON object; take another checkpoint")
    return about


def _metadata(data: bytes) -> dict[str, str]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # its length, then JSON: the format's layout
    metadata: dict[str, str] = header.get("__metadata__", {})
    return metadata


def checkpoint_weights(data: bytes, name: str) -> dict[str, Tensor]:
    """A network's weights alone from a checkpoint's bytes; errors call it `name`."""
    weights = _of_network(load_safetensors(data, name), "model")
    if not weights:
        raise BundleError(f"{name} is no checkpoint of training; for a file of a model name the model's folder")
    return weights


def _of_network(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    own = f"{name}."
    return {key.removeprefix(own): value for key, value in tensors.items() if key.startswith(own)}


class Proposals:
    """Where the 0.5x hypothesis network suspects lesions, rightly or not: on such places training learns most.

    There the refinement will be asked. Of healthy places at large few look like a lesion, and those it would hardly
    meet. The 1x network would cost four times as much, and propose no better.
    """

    def __init__(self, checkpoint: str, recipe: Recipe) -> None:
        """`checkpoint` is the URL of one that the training of `hgn_half` has written.

        Raises:
            UsageError: there is none.
            BundleError: it is of another network.
        """
        weights = checkpoint_weights(read_checkpoint(checkpoint), "hgn_half")
        self._network = build_hgn(recipe.hgn_half, kinds_in(weights))
        load_weights(self._network, weights, "hgn_half")
        fold(self._network.eval())
        self._recipe = recipe

    def __call__(self, prepared: Prepared) -> Bool[ndarray, "ch cw"]:
        """Pixels at 1x with a lesion's probability of `prn.proposal_probability` or more."""
        detector, fov = self._recipe.detector, prepared.fov_half
        tiling = Tiling(fov.shape[0], fov.shape[1], detector.tile_px, detector.halo_px)
        probability = probability_maps(self._network, prepared.enhanced_half, fov, tiling)[0]
        likely = upsample_half(probability, prepared.fov_1x.shape) >= np.float32(self._recipe.prn.proposal_probability)
        return likely & prepared.fov_1x


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
    weights = {name: _mean([_weights(data, name, recipe) for data in of_one], name) for name, of_one in read.items()}
    training = {name: {key: abouts[-1][key] for key in abouts[-1] if key != "recipe"} for name, abouts in said.items()}
    return Bundle(recipe, weights, attribution, training=training)


def with_judge(bundle: Bundle, samples: Sequence[Sample], threads: int | None = None, seed: int = 0) -> Bundle:
    """The bundle with a judge of candidates, fitted on `samples`.

    Args:
        bundle: with the 0.5x network that proposes.
        samples: photographs with a mask, and healthy ones, on which all that is proposed is false.
        threads: as for `Detector`.
        seed: of the fit.

    Raises:
        UsageError: the network proposes no lesion, or nothing but lesions; or a photograph cannot be used.
    """
    detector = Detector(bundle, threads=threads)
    found = look_at_each(samples, lambda sample: candidates_of(detector, sample))
    together = Candidates(*(np.concatenate([getattr(each, name) for each in found]) for name in ("measures", "lesion")))
    return dataclasses.replace(bundle, weights=bundle.weights | {JUDGE: fit_judge(together, seed).state_dict()})


def candidates_of(detector: Detector, sample: Sample) -> Candidates:
    """What the 0.5x network proposes on a photograph."""
    prepared = detector.prepare(read_object(sample.image))
    maps = detector.kinds(prepared)
    candidates = find_candidates(maps[0])
    truth = np.zeros(prepared.fov_half.shape, bool)
    if sample.mask is not None:
        truth = half_scale_mask(prepared.grid.crop_mask(decode_mask(read_object(sample.mask), prepared.shape)))
    near = cv2.dilate(truth.astype(np.uint8), _MARGIN) > 0
    measures = measure(maps, prepared.enhanced_half, prepared.fov_half, candidates)
    return Candidates(measures, near[tuple(candidates.T)])


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
    if own.split.validation != recipe.split.validation:
        raise BundleError(
            f"the checkpoint of {name} was trained on another fold than the others: photographs that are to calibrate "
            "the model trained it; take checkpoints of one fold"
        )
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
    build_network(name, recipe, weights)  # do they fit?
    return weights


def _mean(networks: Sequence[dict[str, Tensor]], name: str) -> dict[str, Tensor]:
    """Of each tensor; counts, which have none, are the last network's."""
    *_, last = networks
    if len({kinds_in(weights) for weights in networks}) > 1:
        raise BundleError(f"the checkpoints of {name} tell different kinds of lesion apart and have no mean; give one")
    return {
        key: torch.stack([network[key] for network in networks]).mean(dim=0) if value.is_floating_point() else value
        for key, value in last.items()
    }
