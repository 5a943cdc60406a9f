"""A model as one self-describing artefact: bundle.json and safetensors files, each with its sha256. No pickle, ever.

    bundle.json          format, recipe, digests of the weights, attribution of the data, validation figures, training
    hgn_1x.safetensors   and hgn_half, prn (optional), cls (optional), judge (optional)

A model is named by the name of one that ships, by its folder, or by its URL: then each node fetches a file once, into
a cache that is keyed by the bundle's digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ma_cluster.config import JUDGE, NETWORKS, Recipe, deciding, digest, recipe_from_dict, to_dict
from ma_cluster.errors import BundleError, ObjectMissingError, UsageError
from ma_cluster.storage.store import Store, cache_folder, kept, open_store

if TYPE_CHECKING:
    import torch

FORMAT = "ma_cluster.bundle/1"
REQUIRED = ("hgn_1x", "hgn_half")
PARTS = (*NETWORKS, JUDGE)
DETECTING = ("hgn_1x", "hgn_half", "prn", JUDGE)
"""What detection uses; `cls`, the ablation, is for evaluation."""
_MANIFEST, _SUFFIX = "bundle.json", ".safetensors"
_SHIPPED = Path(__file__).parent / "models"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A loaded model: its recipe, the weights of each network by name, and what was said of its training."""

    recipe: Recipe
    weights: dict[str, dict[str, torch.Tensor]]
    attribution: str
    validation: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    """By network: the run that trained it, its data's digest and the version of the code, as far as is known."""
    digest: str = ""

    @property
    def stage(self) -> Literal["hgn", "prn"]:
        """The stage whose maps decide: `prn` where the model has a refinement, else `hgn`."""
        return "prn" if "prn" in self.weights else "hgn"


def save_bundle(bundle: Bundle, url: str | Path) -> str:
    """Write a bundle into a folder or under a URL, weights first and bundle.json last, and return its digest.

    Raises:
        BundleError: a required network is missing, a name is unknown, or weights are no numbers or of another type.
    """
    from safetensors.torch import save

    _check_networks(set(bundle.weights))
    for name, tensors in bundle.weights.items():
        check_weights(tensors, name)
    store, files = open_store(url), {}
    for name, tensors in bundle.weights.items():
        data = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
        store.put(f"{name}{_SUFFIX}", data)
        files[f"{name}{_SUFFIX}"] = hashlib.sha256(data).hexdigest()
    manifest = {
        "format": FORMAT,
        "recipe": to_dict(bundle.recipe),
        "files": files,
        "attribution": bundle.attribution,
        "validation": bundle.validation,
        "training": bundle.training,
    }
    store.put(_MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    return _Manifest(bundle.recipe, files, {}).digest


def load_bundle(model: str | Path, *, networks: Collection[str] = PARTS, wanted: str | None = None) -> Bundle:
    """Read and check a bundle.

    Args:
        model: the name of a model that ships with the package (`lite`), or the folder or URL of a bundle.
        networks: whose weights are read, where the bundle has them.
        wanted: the digest that it must have; of a URL, what this node has fetched of it before is not fetched again.

    Raises:
        BundleError: it is not there, damaged, of another format or digest, or its weights are no numbers.
        StoreError: its store does not answer.
    """
    store = open_store(_SHIPPED / str(model) if _is_shipped(model) else model)
    cache = cache_folder() / "models" if "://" in store.url else None
    manifest = _manifest(store, cache, str(model), wanted)
    if wanted not in (None, manifest.digest):
        here, there = manifest.digest[:12], str(wanted)[:12]
        raise BundleError(f"model '{model}' is {here} on this machine, not {there}; have the same on all nodes")
    weights = {}
    for file, sha256 in manifest.files.items():
        network = file.removesuffix(_SUFFIX)
        if network in networks:
            data = _file(store, file, sha256, cache and cache / manifest.digest)
            if hashlib.sha256(data).hexdigest() != sha256:
                raise BundleError(f"{file} of '{model}' is missing or not what bundle.json says; copy it again")
            weights[network] = load_safetensors(data, file)
            check_weights(weights[network], network)
    return Bundle(manifest.recipe, weights, **manifest.said, digest=manifest.digest)


def location(model: str | Path) -> str:
    """What other processes and nodes find a model by: a shipped one by its name, a folder by its absolute path."""
    return str(model) if _is_shipped(model) else open_store(model).url


def _is_shipped(model: str | Path) -> bool:
    return "/" not in str(model) and (_SHIPPED / str(model) / _MANIFEST).is_file()


@dataclass(frozen=True, slots=True)
class _Manifest:
    """What bundle.json holds."""

    recipe: Recipe
    files: dict[str, str]
    """sha256 by name."""
    said: dict[str, Any]
    """`attribution`, `validation` and `training`."""

    @property
    def digest(self) -> str:
        """What decides the answers: weights, and the recipe's numbers that do. How it was trained, figures and
        attribution may be corrected without a new digest.
        """
        return digest({"recipe": deciding(self.recipe), "files": self.files})


def _manifest(store: Store, cache: Path | None, model: str, wanted: str | None) -> _Manifest:
    """bundle.json with its parts checked; the wanted one may be in this node's cache."""

    def fetch() -> bytes:
        try:
            return store.get(_MANIFEST)
        except ObjectMissingError as error:
            names = ", ".join(sorted(path.parent.name for path in _SHIPPED.glob(f"*/{_MANIFEST}")))
            raise BundleError(
                f"no model '{model}' on this machine: neither one that ships ({names}) nor the folder or URL of a "
                "bundle; a URL serves all nodes of a cluster"
            ) from error

    def right(data: bytes) -> bool:
        try:
            return _parsed(data, model).digest == wanted
        except BundleError:
            return False

    return _parsed(
        fetch() if cache is None or wanted is None else kept(cache / wanted / _MANIFEST, right, fetch), model
    )


def _file(store: Store, name: str, sha256: str, cache: Path | None) -> bytes:
    """A file of a bundle, by way of this node's cache where there is one; empty where there is no such file."""
    try:
        if cache is None:
            return store.get(name)
        return kept(cache / name, lambda data: hashlib.sha256(data).hexdigest() == sha256, lambda: store.get(name))
    except ObjectMissingError:
        return b""


def _parsed(data: bytes, model: str) -> _Manifest:
    """Check that the parts of a bundle.json are of the types that they must be.

    Raises:
        BundleError: they are not, or it is no JSON.
    """
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:  # no JSON, no text at all, or nested beyond all reason
        raise BundleError(f"bundle.json of '{model}' is no JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleError(f"bundle.json of '{model}' is not of format {FORMAT}")
    kinds = {"recipe": dict, "files": dict, "attribution": str, "validation": dict}
    missing = kinds.keys() - manifest.keys()
    if missing:
        raise BundleError(f"bundle.json of '{model}' lacks {', '.join(sorted(missing))}")
    for name, kind in (kinds | {"training": dict}).items():
        if not isinstance(manifest.get(name, kind()), kind):
            raise BundleError(f"bundle.json of '{model}': '{name}' is no {'text' if kind is str else 'object'}")
    if not all(isinstance(sha256, str) for sha256 in manifest["files"].values()):
        raise BundleError(f"bundle.json of '{model}': 'files' does not map names to sha256")
    if not _are_figures(manifest["validation"]):
        raise BundleError(f"bundle.json of '{model}': 'validation' does not hold photographs and rows of figures")
    _check_networks({name.removesuffix(_SUFFIX) for name in manifest["files"]})
    try:
        recipe = recipe_from_dict(manifest["recipe"])
    except UsageError as error:
        raise BundleError(f"bundle.json of '{model}': {error}") from error
    said = {name: manifest.get(name, {}) for name in ("attribution", "validation", "training")}
    return _Manifest(recipe, manifest["files"], said)


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], name: str) -> None:
    """Put weights into a network.

    Raises:
        BundleError: they belong to another network, or `check_weights` refuses them.
    """
    check_weights(weights, name)
    theirs, ours = ({key: _form(value) for key, value in part.items()} for part in (weights, model.state_dict()))
    differing = [key for key in {**ours, **theirs} if theirs.get(key) != ours.get(key)]
    if differing:
        key, *others = differing
        raise BundleError(
            f"the weights of {name} do not fit the recipe's network: {key} is {theirs.get(key, 'absent')} there, "
            f"{ours.get(key, 'absent')} here{f', and {len(others)} more' if others else ''}; name the recipe that they "
            "were trained by"
        )
    model.load_state_dict(weights)


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def check_weights(tensors: dict[str, torch.Tensor], name: str) -> None:
    """Nothing is cast in silence, and nothing that is no number looks at a photograph.

    Raises:
        BundleError: a weight of network `name` is NaN or infinite, or of another type than float32; counts are int64.
    """
    import torch

    for key, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.int64):
            raise BundleError(f"network {name}: {key} is {_form(tensor)}; weights are float32: convert them on purpose")
        if not torch.isfinite(tensor).all():
            raise BundleError(f"network {name}: {key} holds NaN or infinity; take an earlier checkpoint")


def load_safetensors(data: bytes, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a file's bytes; errors call it `name`."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except (SafetensorError, ValueError) as error:
        raise BundleError(f"{name} is no safetensors file ({error}); pickled weights are not loaded") from error


def _are_figures(validation: dict[str, Any]) -> bool:
    photographs, rows = validation.get("photographs", []), validation.get("rows", {})
    if not isinstance(photographs, list) or not isinstance(rows, dict):
        return False
    figures = [row if isinstance(row, dict) and "threshold" in row else {"": None} for row in rows.values()]
    numbers = [number for row in figures for number in row.values()]
    return all(isinstance(each, str) for each in photographs) and all(isinstance(each, int | float) for each in numbers)


def _check_networks(names: set[str]) -> None:
    missing, unknown = set(REQUIRED) - names, names - set(PARTS)
    if missing or unknown:
        raise BundleError(
            f"a bundle needs {', '.join(REQUIRED)}; missing: {sorted(missing)}, unknown: {sorted(unknown)}"
        )
