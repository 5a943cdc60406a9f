"""Bundles and checkpoints: what was saved comes back, what was tampered with does not."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import save
from torch import nn

from ma_cluster.bundle import Bundle, load_bundle, load_weights, location, save_bundle
from ma_cluster.config import paper, tiny
from ma_cluster.errors import BundleError

WEIGHTS = {
    "hgn_1x": {"kernel": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(7)},
    "hgn_half": {"kernel": torch.ones(2, 3).T},  # not contiguous
    "prn": {"kernel": torch.full((1,), 0.1)},
}
BUNDLE = Bundle(recipe=tiny(), weights=WEIGHTS, attribution="drawn by hand", validation={"aupr": 0.5})


def with_setting(manifest: dict[str, Any], section: str, name: str, value: object) -> dict[str, Any]:
    recipe = manifest["recipe"]
    return manifest | {"recipe": recipe | {section: recipe[section] | {name: value}}}


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
    with pytest.raises(BundleError, match=r"prn\.safetensors of '.*model' is missing or not what"):
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
        (lambda manifest: manifest | {"files": ["hgn_1x.safetensors"]}, "'files' is no object"),
        (lambda manifest: manifest | {"files": dict.fromkeys(manifest["files"], 7)}, "'files' does not map"),
        (lambda manifest: manifest | {"recipe": [1]}, "'recipe' is no object"),
        (lambda manifest: manifest | {"recipe": manifest["recipe"] | {"lesion": {}}}, "has the sections image, hgn_1x"),
        (lambda manifest: with_setting(manifest, "image", "fov_diameter_px", "3410"), "fov_diameter_px is no float"),
        (lambda manifest: with_setting(manifest, "image", "contrast_gain", float("nan")), "contrast_gain is no float"),
        (lambda manifest: with_setting(manifest, "detector", "prn_dense", 1), "prn_dense is no bool"),
        (lambda manifest: with_setting(manifest, "detector", "tile_px", 512.0), "tile_px is no int"),
        (lambda manifest: with_setting(manifest, "prn", "scale", "2x"), "scale"),
        (lambda manifest: with_setting(manifest, "split", "validation", [1]), "validation holds more than names"),
        (lambda manifest: manifest | {"attribution": 3}, "'attribution' is no text"),
        (lambda manifest: manifest | {"validation": {"rows": {"prn_geometric": {"f1": "high"}}}}, "'validation' does"),
        (lambda manifest: manifest | {"validation": {"rows": {"prn_geometric": {"f1": 0.5}}}}, "'validation' does"),
        (lambda manifest: manifest | {"validation": {"photographs": 10}}, "'validation' does"),
        (lambda manifest: manifest | {"training": "much"}, "'training' is no object"),
    ],
)
def test_a_foreign_manifest_is_refused(folder: Path, change: Callable[[dict[str, Any]], Any], complaint: str) -> None:
    edit_manifest(folder, change)
    with pytest.raises(BundleError, match=complaint):
        load_bundle(folder)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00binary", b"[" * 100_000, b'{"a":' * 100_000])
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
        load_bundle(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_neither_saved_nor_loaded(folder: Path, tmp_path: Path, value: float) -> None:
    spoilt = {"kernel": torch.tensor([1.0, value])}
    with pytest.raises(BundleError, match=r"network prn: kernel holds NaN or infinity"):
        save_bundle(replace(BUNDLE, weights=WEIGHTS | {"prn": spoilt}), tmp_path / "other")
    assert not (tmp_path / "other").exists()
    put_weights(folder, "prn", spoilt)
    with pytest.raises(BundleError, match=r"network prn: kernel holds NaN or infinity"):
        load_bundle(folder)
    assert load_bundle(folder, networks=("hgn_1x", "hgn_half")).stage == "hgn"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_type_are_neither_saved_nor_loaded(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    spoilt = {"kernel": torch.ones(2, dtype=dtype)}
    with pytest.raises(BundleError, match=r"network hgn_1x: kernel is .* \[2\]; weights are float32"):
        save_bundle(replace(BUNDLE, weights=WEIGHTS | {"hgn_1x": spoilt}), tmp_path / "other")
    put_weights(folder, "hgn_1x", spoilt)
    with pytest.raises(BundleError, match="weights are float32"):
        load_bundle(folder)


def put_weights(folder: Path, network: str, tensors: dict[str, torch.Tensor]) -> None:
    """Other weights into a bundle, certified by its bundle.json."""
    data = save(tensors)
    (folder / f"{network}.safetensors").write_bytes(data)

    def certify(manifest: dict[str, Any]) -> dict[str, Any]:
        manifest["files"][f"{network}.safetensors"] = hashlib.sha256(data).hexdigest()
        return manifest

    edit_manifest(folder, certify)


def test_weights_of_another_network_are_refused_in_one_line() -> None:
    model = nn.Linear(3, 2)
    for weights, complaint in (
        (
            {"weight": torch.ones(2, 4), "bias": torch.ones(2)},
            r"weight is float32 \[2, 4\] there",
        ),
        ({"weight": torch.ones(2, 3)}, r"bias is absent there"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(2), "gain": torch.ones(1)}, r"gain is .* there, absent here"),
        ({"weight": torch.ones(2, 3, dtype=torch.int64), "bias": torch.ones(2)}, r"weight is int64"),
        ({"kernel": torch.ones(1)}, "and 2 more"),
    ):
        with pytest.raises(BundleError, match=complaint) as refusal:
            load_weights(model, weights, "prn")
        assert "\n" not in str(refusal.value) and "do not fit the recipe's network" in str(refusal.value)


def test_networks_that_are_not_asked_for_are_not_read(folder: Path) -> None:
    (folder / "prn.safetensors").unlink()
    part = load_bundle(folder, networks=("hgn_1x", "hgn_half"))
    assert part.weights.keys() == {"hgn_1x", "hgn_half"}
    with pytest.raises(BundleError, match="prn"):
        load_bundle(folder)


def test_a_model_other_than_the_wanted_one_is_refused(folder: Path) -> None:
    digest = load_bundle(folder).digest
    assert load_bundle(folder, wanted=digest).digest == digest
    with pytest.raises(BundleError, match=f"is {digest[:12]} on this machine, not 0000; have the same on all nodes"):
        load_bundle(folder, wanted="0000")


def test_a_model_is_found_from_anywhere_by_its_location(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert location("model") == str(folder)
    assert location("lite") == "lite"
    assert location("s3://models/lite/") == "s3://models/lite"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    values = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "nobody", "SECRET_ACCESS_KEY": "nothing"}
    for name, value in (values | {"DEFAULT_REGION": "us-east-1"}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("MA_CLUSTER_CACHE", str(tmp_path / "cache"))
    boto3.client("s3").create_bucket(Bucket="models")
    yield "s3://models/ours"
    server.stop()


def test_a_model_of_a_store_is_fetched_once_and_checked_each_time(bucket: str, tmp_path: Path) -> None:
    digest = save_bundle(BUNDLE, bucket)
    hypotheses = load_bundle(bucket, networks=("hgn_1x", "hgn_half"))
    cache = tmp_path / "cache/models" / digest
    assert {path.name for path in cache.glob("*.*s*")} == {"hgn_1x.safetensors", "hgn_half.safetensors"}
    first = load_bundle(bucket, wanted=digest)
    assert (first.recipe, first.digest, first.weights.keys()) == (BUNDLE.recipe, digest, WEIGHTS.keys())
    assert hypotheses.digest == digest
    client = boto3.client("s3")
    for name in ("bundle.json", "hgn_1x.safetensors", "prn.safetensors"):
        client.delete_object(Bucket="models", Key=f"ours/{name}")
    again = load_bundle(bucket, wanted=digest)
    assert all(torch.equal(again.weights["prn"][key], value) for key, value in WEIGHTS["prn"].items())
    with pytest.raises(BundleError, match="no model"):
        load_bundle(bucket)
    client.put_object(Bucket="models", Key="ours/bundle.json", Body=(cache / "bundle.json").read_bytes())
    (cache / "bundle.json").write_bytes(b"damaged")
    (cache / "hgn_half.safetensors").write_bytes(b"damaged")
    assert load_bundle(bucket, wanted=digest).digest == digest, "fetched anew"
    (cache / "prn.safetensors").write_bytes(b"damaged")
    with pytest.raises(BundleError, match=r"prn\.safetensors of 's3://models/ours' is missing"):
        load_bundle(bucket, wanted=digest)


def test_a_model_that_was_replaced_in_its_store_is_not_the_one_that_a_run_wants(bucket: str) -> None:
    digest = save_bundle(BUNDLE, bucket)
    save_bundle(replace(BUNDLE, recipe=paper()), bucket)
    with pytest.raises(BundleError, match="have the same on all nodes"):
        load_bundle(bucket, wanted=digest)
