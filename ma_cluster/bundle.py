"""A model as one self-describing folder: bundle.json and safetensors files, each with its sha256. No pickle, ever.

    bundle.json          format, recipe, digests of the weights, attribution of the data, validation figures
    hgn_1x.safetensors   and hgn_half, prn (optional), cls (optional)

Also the checkpoints of training: the same tensors plus the optimiser's, in one safetensors file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ma_cluster.config import Recipe, digest, recipe_from_dict, to_dict
from ma_cluster.errors import BundleError, UsageError
from ma_cluster.identity import deciding

if TYPE_CHECKING:
    import torch

FORMAT = "ma_cluster.bundle/1"
NETWORKS = ("hgn_1x", "hgn_half", "prn", "cls")
REQUIRED = ("hgn_1x", "hgn_half")
_SHIPPED = Path(__file__).parent / "models"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A loaded model: its recipe, the weights of each network by name, and what was said of its training."""

    recipe: Recipe
    weights: dict[str, dict[str, torch.Tensor]]
    attribution: str
    validation: dict[str, Any] = field(default_factory=dict)
    digest: str = ""

    @property
    def stage(self) -> Literal["hgn", "prn"]:
        """The stage whose maps decide: `prn` where the model has a refinement, else `hgn`."""
        return "prn" if "prn" in self.weights else "hgn"


def save_bundle(bundle: Bundle, folder: Path) -> str:
    """Write a bundle, weights first and bundle.json last, and return its digest.

    Raises:
        BundleError: a required network is missing, or a name is unknown.
    """
    from safetensors.torch import save

    _check_networks(set(bundle.weights))
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, tensors in bundle.weights.items():
        data = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
        _write(folder / f"{name}.safetensors", data)
        files[f"{name}.safetensors"] = hashlib.sha256(data).hexdigest()
    manifest = {
        "format": FORMAT,
        "recipe": to_dict(bundle.recipe),
        "files": files,
        "attribution": bundle.attribution,
        "validation": bundle.validation,
    }
    _write(folder / "bundle.json", (json.dumps(manifest, indent=2) + "\n").encode())
    return _bundle_digest(bundle.recipe, files)


def load_bundle(model: str | Path) -> Bundle:
    """Read and check a bundle.

    Args:
        model: the name of a model that ships with the package (`lite`), or a folder that holds a bundle.

    Raises:
        BundleError: it is not there, damaged, or of another format.
    """
    folder = find_bundle(model)
    manifest = _read_manifest(folder)
    try:
        recipe = recipe_from_dict(manifest["recipe"])
    except UsageError as error:
        raise BundleError(f"bundle.json of {folder.name}: {error}") from error
    weights = {}
    for name, expected in manifest["files"].items():
        data = (folder / Path(name).name).read_bytes() if (folder / Path(name).name).is_file() else b""
        if hashlib.sha256(data).hexdigest() != expected:
            raise BundleError(f"{name} of bundle {folder.name} is missing or not what bundle.json says; copy it again")
        weights[name.removesuffix(".safetensors")] = _load_safetensors(data, name)
    _check_networks(set(weights))
    known_by = _bundle_digest(recipe, manifest["files"])
    return Bundle(recipe, weights, manifest["attribution"], manifest["validation"], known_by)


def find_bundle(model: str | Path) -> Path:
    """The folder of a model's name or path."""
    shipped = _SHIPPED / str(model)
    folder = shipped if "/" not in str(model) and (shipped / "bundle.json").is_file() else Path(model)
    if not (folder / "bundle.json").is_file():
        names = ", ".join(sorted(path.parent.name for path in _SHIPPED.glob("*/bundle.json")))
        raise BundleError(f"no model '{model}': neither one that ships ({names}) nor a folder with a bundle.json")
    return folder


def save_checkpoint(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, position: dict[str, int]
) -> None:
    """Weights, optimiser state and integer position (step, seed, ...) in one safetensors file, replaced atomically."""
    from safetensors.torch import save

    tensors = {f"model.{key}": value.contiguous() for key, value in model.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{number}.{key}": value.contiguous() for key, value in state.items()})
    _write(path, save(tensors, metadata={key: str(value) for key, value in position.items()}))


def load_checkpoint(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, int]:
    """Restore what `save_checkpoint` wrote, and return the position.

    Raises:
        BundleError: no safetensors file, or of another network.
    """
    if not path.is_file():
        raise BundleError(f"there is no checkpoint {path.name}")
    return restore_checkpoint(path.read_bytes(), path.name, model, optimizer)


def restore_checkpoint(
    data: bytes, name: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, int]:
    """The same from a checkpoint's bytes; errors call it `name`."""
    tensors = _load_safetensors(data, name)
    load_weights(model, _of_model(tensors), name)
    if optimizer is not None:
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, number, name = key.split(".", 2)
                state.setdefault(int(number), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # its length, then JSON: the format's layout
    return {key: int(value) for key, value in header.get("__metadata__", {}).items()}


def checkpoint_weights(data: bytes, name: str) -> dict[str, torch.Tensor]:
    """A network's weights alone from a checkpoint's bytes; errors call it `name`."""
    weights = _of_model(_load_safetensors(data, name))
    if not weights:
        raise BundleError(f"{name} is no checkpoint of training; for a file of a model name the model's folder")
    return weights


def _of_model(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], name: str) -> None:
    """Put weights into a network.

    Raises:
        BundleError: they belong to another network.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise BundleError(f"the weights of {name} do not fit the recipe's network: {error}") from error


def _load_safetensors(data: bytes, name: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except (SafetensorError, ValueError) as error:
        raise BundleError(f"{name} is no safetensors file ({error}); pickled weights are not loaded") from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / "bundle.json").read_text())
    except ValueError as error:  # no JSON, or no text at all
        raise BundleError(f"bundle.json of {folder.name} is no JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleError(f"bundle.json of {folder.name} is not of format {FORMAT}")
    missing = {"recipe", "files", "attribution", "validation"} - manifest.keys()
    if missing:
        raise BundleError(f"bundle.json of {folder.name} lacks {', '.join(sorted(missing))}")
    if not isinstance(manifest["files"], dict):
        raise BundleError(f"bundle.json of {folder.name}: 'files' does not map names to sha256")
    return manifest


def _check_networks(names: set[str]) -> None:
    missing, unknown = set(REQUIRED) - names, names - set(NETWORKS)
    if missing or unknown:
        raise BundleError(
            f"a bundle needs {', '.join(REQUIRED)}; missing: {sorted(missing)}, unknown: {sorted(unknown)}"
        )


def _bundle_digest(recipe: Recipe, files: dict[str, str]) -> str:
    """What decides the answers: weights, and the recipe's numbers that do. How it was trained, figures and attribution
    may be corrected without a new digest.
    """
    return digest({"recipe": deciding(recipe), "files": files})


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)
