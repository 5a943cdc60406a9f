"""The checkpoints of training: weights and optimiser in one safetensors file, and what run wrote it in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ma_cluster.bundle import load_safetensors, load_weights
from ma_cluster.errors import BundleError, ObjectMissingError, UsageError
from ma_cluster.storage.store import open_store

if TYPE_CHECKING:
    import torch

    Networks = Mapping[str, torch.nn.Module]

LAST, BEST = "last.safetensors", "best.safetensors"
"""Of a run's folder: where it goes on, and the epoch of the best validation figure."""
_ABOUT = "about"


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
    model: torch.nn.Module | Networks,
    optimizer: torch.optim.Optimizer,
    position: Mapping[str, int],
    about: Mapping[str, Any] | None = None,
) -> bytes:
    """Weights and optimiser state as the bytes of one safetensors file.

    Args:
        model: the network; or several by name, of which `model` is the one that ships.
        optimizer: of the network that is trained.
        position: where training is: step, seed, ...
        about: the run, as JSON values: `network`, `recipe`, `training` (the network's own part of it), `photographs`
            (the data's digest), `version` (of the code), ...
    """
    from safetensors.torch import save

    tensors = {
        f"{name}.{key}": value.contiguous()
        for name, network in _by_name(model).items()
        for key, value in network.state_dict().items()
    }
    for number, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{number}.{key}": value.contiguous() for key, value in state.items()})
    metadata = {key: str(value) for key, value in position.items()} | {_ABOUT: json.dumps(about or {})}
    return save(tensors, metadata=metadata)


def restore_checkpoint(
    data: bytes, name: str, model: torch.nn.Module | Networks, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, int]:
    """Restore what `checkpoint_bytes` gave, and return the position; errors call it `name`.

    Raises:
        BundleError: no safetensors file, or of another network.
    """
    tensors = load_safetensors(data, name)
    for prefix, network in _by_name(model).items():
        load_weights(network, _of_network(tensors, prefix), name)
    if optimizer is not None:
        state: dict[int, dict[str, torch.Tensor]] = {}
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


def checkpoint_weights(data: bytes, name: str) -> dict[str, torch.Tensor]:
    """A network's weights alone from a checkpoint's bytes; errors call it `name`."""
    weights = _of_network(load_safetensors(data, name), "model")
    if not weights:
        raise BundleError(f"{name} is no checkpoint of training; for a file of a model name the model's folder")
    return weights


def _by_name(model: torch.nn.Module | Networks) -> Networks:
    return model if isinstance(model, Mapping) else {"model": model}


def _of_network(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    own = f"{name}."
    return {key.removeprefix(own): value for key, value in tensors.items() if key.startswith(own)}
