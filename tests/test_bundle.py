"""Bundles and checkpoints: what was saved comes back, what was tampered with does not."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ma_cluster.bundle import Bundle, find_bundle, load_bundle, load_checkpoint, save_bundle, save_checkpoint
from ma_cluster.config import paper, tiny
from ma_cluster.errors import BundleError

WEIGHTS = {
    "hgn_1x": {"kernel": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(7)},
    "hgn_half": {"kernel": torch.ones(2, 3).T},  # not contiguous
    "prn": {"kernel": torch.full((1,), 0.1, dtype=torch.bfloat16)},
}
BUNDLE = Bundle(recipe=tiny(), weights=WEIGHTS, attribution="drawn by hand", validation={"aupr": 0.5})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_bundle(BUNDLE, tmp_path / "model")
    return tmp_path / "model"


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "bundle.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_a_bundle_comes_back_as_it_was(folder: Path) -> None:
    loaded = load_bundle(folder)
    assert loaded.recipe == BUNDLE.recipe
    assert (loaded.attribution, loaded.validation) == (BUNDLE.attribution, BUNDLE.validation)
    assert loaded.weights.keys() == WEIGHTS.keys()
    for name, tensors in WEIGHTS.items():
        assert loaded.weights[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert loaded.weights[name][key].dtype == tensor.dtype
            assert torch.equal(loaded.weights[name][key], tensor)


def test_a_bundle_holds_nothing_but_json_and_safetensors(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {"bundle.json", "hgn_1x.safetensors", "hgn_half.safetensors", "prn.safetensors"}


def test_the_digest_follows_weights_and_recipe_but_not_what_is_said_of_them(tmp_path: Path) -> None:
    digest = save_bundle(BUNDLE, tmp_path / "a")
    assert load_bundle(tmp_path / "a").digest == digest
    corrected = replace(BUNDLE, attribution="corrected", validation={})
    assert save_bundle(corrected, tmp_path / "b") == digest
    assert save_bundle(replace(BUNDLE, recipe=paper()), tmp_path / "c") != digest
    other = WEIGHTS | {"prn": {"kernel": torch.zeros(1)}}
    assert save_bundle(replace(BUNDLE, weights=other), tmp_path / "d") != digest


def test_one_flipped_bit_of_the_weights_is_noticed(folder: Path) -> None:
    path = folder / "prn.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"prn\.safetensors of bundle model is missing or not what"):
        load_bundle(folder)


def test_a_missing_weights_file_is_named(folder: Path) -> None:
    (folder / "hgn_half.safetensors").unlink()
    with pytest.raises(BundleError, match=r"hgn_half\.safetensors"):
        load_bundle(folder)


class Trap:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_named_safetensors_is_refused_unread(folder: Path, tmp_path: Path) -> None:
    data = pickle.dumps(Trap(tmp_path / "sprung"))
    (folder / "prn.safetensors").write_bytes(data)

    def certify(manifest: dict[str, Any]) -> dict[str, Any]:
        manifest["files"]["prn.safetensors"] = hashlib.sha256(data).hexdigest()
        return manifest

    edit_manifest(folder, certify)
    with pytest.raises(BundleError, match="no safetensors file"):
        load_bundle(folder)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(data)
    assert (tmp_path / "sprung").exists()  # the trap works


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda manifest: manifest | {"format": "ma_cluster.bundle/2"}, "not of format"),
        (lambda manifest: [manifest], "not of format"),
        (lambda manifest: {"format": manifest["format"]}, "lacks attribution, files, recipe, validation"),
        (lambda manifest: manifest | {"recipe": {}}, "not a recipe"),
        (lambda manifest: manifest | {"files": {}}, "a bundle needs hgn_1x, hgn_half"),
        (lambda manifest: manifest | {"files": ["hgn_1x.safetensors"]}, "files"),
    ],
)
def test_a_foreign_manifest_is_refused(folder: Path, change: Callable[[dict[str, Any]], Any], complaint: str) -> None:
    edit_manifest(folder, change)
    with pytest.raises(BundleError, match=complaint):
        load_bundle(folder)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00binary"])
def test_a_damaged_manifest_is_refused(folder: Path, data: bytes) -> None:
    (folder / "bundle.json").write_bytes(data)
    with pytest.raises(BundleError, match="is no JSON"):
        load_bundle(folder)


def test_weights_outside_the_folder_are_not_read(folder: Path) -> None:
    outside = (folder / "prn.safetensors").rename(folder.parent / "prn.safetensors")
    digest = hashlib.sha256(outside.read_bytes()).hexdigest()

    def lead_outside(manifest: dict[str, Any]) -> dict[str, Any]:
        del manifest["files"]["prn.safetensors"]
        manifest["files"]["../prn.safetensors"] = digest
        return manifest

    edit_manifest(folder, lead_outside)
    with pytest.raises(BundleError, match="missing"):
        load_bundle(folder)


@pytest.mark.parametrize("names", [{"hgn_1x"}, {"hgn_1x", "hgn_half", "unet"}, set()])
def test_a_bundle_of_other_networks_is_not_saved(tmp_path: Path, names: set[str]) -> None:
    weights = {name: {"kernel": torch.ones(1)} for name in names}
    with pytest.raises(BundleError, match="a bundle needs"):
        save_bundle(replace(BUNDLE, weights=weights), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("model", ["no-such-model", "no/such/folder", Path("no/such/folder")])
def test_a_model_that_is_not_there_is_named(model: str | Path) -> None:
    with pytest.raises(BundleError, match=str(model)):
        find_bundle(model)


def linear() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters())


def descend(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()


def test_a_checkpoint_restores_weights_optimiser_and_position(tmp_path: Path) -> None:
    model, optimizer = linear()
    descend(model, optimizer)
    save_checkpoint(tmp_path / "last.safetensors", model, optimizer, {"step": 1, "seed": -5})
    copy, copy_optimizer = linear()
    assert load_checkpoint(tmp_path / "last.safetensors", copy, copy_optimizer) == {"step": 1, "seed": -5}
    for _ in range(3):
        descend(model, optimizer)
        descend(copy, copy_optimizer)
    for ours, theirs in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_replaces_the_last_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    model, optimizer = linear()
    for step in (1, 2):
        save_checkpoint(tmp_path / "last.safetensors", model, optimizer, {"step": step})
    assert [path.name for path in tmp_path.iterdir()] == ["last.safetensors"]
    assert load_checkpoint(tmp_path / "last.safetensors", model) == {"step": 2}


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    model, optimizer = linear()
    save_checkpoint(tmp_path / "last.safetensors", model, optimizer, {})
    with pytest.raises(BundleError, match="do not fit"):
        load_checkpoint(tmp_path / "last.safetensors", nn.Linear(3, 5))


@pytest.mark.parametrize("data", [b"", pickle.dumps({"model": 1}), b"PK\x03\x04" + bytes(100)])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "last.safetensors").write_bytes(data)
    with pytest.raises(BundleError, match="no safetensors file"):
        load_checkpoint(tmp_path / "last.safetensors", nn.Linear(3, 2))
