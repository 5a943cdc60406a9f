"""Training in one process: the golden losses, a run that is stopped and resumed, and what it does without."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fundus_set import PART, rich_recipe, rich_set, write_training_set
from PIL import Image
from safetensors.numpy import load

from ma_cluster import Detector
from ma_cluster.bundle import save_bundle
from ma_cluster.config import SplitConfig, tiny
from ma_cluster.errors import BundleError, UsageError
from ma_cluster.images.annotated import load_annotated
from ma_cluster.images.datasets import IMAGES_FOLDER, read_dataset, read_split
from ma_cluster.images.patches import crop
from ma_cluster.images.reading import MID_GREY
from ma_cluster.networks import tile_executor
from ma_cluster.storage.store import open_store
from ma_cluster.training.checkpoints import pack
from ma_cluster.training.ledger import LocalLedger, read_manifest
from ma_cluster.training.loop import COSTLIEST, Progress
from ma_cluster.training.run import TrainFolder, TrainRequest
from ma_cluster.training.stages import in_order, refreshed
from ma_cluster.training.start import Start, TrainResult, train_local

RECIPE = tiny()
NEEDLESS = ["ray", "boto3", "botocore", "tensorboardX", "jinja2", "matplotlib", "prometheus_client", "scipy"]
NEEDLESS += ["simplejpeg"]
"""Packages that a bare machine has not."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_training_set(root)
    return root


@pytest.fixture(scope="module")
def request_for(data: Path) -> Callable[..., TrainRequest]:
    def build(network: Any, out: Path, **changes: Any) -> TrainRequest:
        usual = {"epoch_steps": 2, "threads": 1, "batch_norm": "frozen", "seed": 3}
        return TrainRequest(network=network, data=str(data), out=str(out), recipe=RECIPE, **(usual | changes))

    return build


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request_for: Callable[..., TrainRequest]) -> dict[str, TrainResult]:
    """Undisturbed runs, by network."""
    out = tmp_path_factory.mktemp("runs")
    return {network: train_local(request_for(network, out / network)) for network in ("hgn_half", "prn")}


def test_the_losses_of_tiny_are_golden(runs: dict[str, TrainResult]) -> None:
    golden = json.loads(Path(__file__).with_name("golden_losses.json").read_text())
    for network, result in runs.items():
        for epoch, losses in zip(result.epochs, golden[network], strict=True):
            assert epoch.losses == pytest.approx(losses, rel=0.04)  # bfloat16 differs among CPUs, with AMX most


def test_the_patches_that_cost_most_are_kept_as_pictures_of_their_places(
    runs: dict[str, TrainResult], data: Path
) -> None:
    folder = TrainFolder(str(Path(runs["prn"].last).parent))
    examples, epochs = folder.costliest, len(runs["prn"].epochs)
    ledger = LocalLedger(sum(part.count for part in read_manifest(open_store(folder.ledger(epochs)))), 1.0)
    ledger.restore(folder.ledger(epochs))
    assert [example.loss for example in examples] == pytest.approx(ledger.highest(COSTLIEST, 1.0)[1].tolist())
    assert len(examples) == COSTLIEST and max(example.loss for example in examples) == examples[0].loss < 1
    samples = {sample.name: sample for sample in read_split(str(data), RECIPE.split, "training", None)}
    first = examples[0]
    seen = load_annotated(samples[first.photograph], RECIPE.prn.scale, RECIPE.image).enhanced
    side = RECIPE.prn.cut_px
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(first.jpeg)))).astype(int)
    assert np.abs(shown - crop(seen, first.row, first.col, side, MID_GREY)).mean() < 4  # as JPEG


class StoppedError(Exception):
    """What ends a run here."""


def stop(progress: Progress) -> None:
    if progress.step == 2:
        raise StoppedError


@pytest.mark.parametrize("network", ["hgn_half", "prn"])
def test_a_run_that_was_stopped_is_resumed_and_ends_as_the_undisturbed_one(
    network: str, runs: dict[str, TrainResult], request_for: Callable[..., TrainRequest], tmp_path: Path
) -> None:
    request = request_for(network, tmp_path / "run")
    with pytest.raises(StoppedError):
        train_local(request, on_progress=stop)
    with pytest.raises(UsageError, match="resume"):
        train_local(request)
    resumed = train_local(replace(request, resume=True))
    assert resumed.epochs == runs[network].epochs
    assert train_local(replace(request, resume=True)) == resumed  # nothing is left to do
    ours, theirs = load(Path(resumed.last).read_bytes()), load(Path(runs[network].last).read_bytes())
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs.keys() | ours.keys())


@pytest.mark.parametrize("network", ["hgn", "prn"])
def test_it_does_without_ray_and_all_that_a_bare_machine_has_not(network: str, data: Path, tmp_path: Path) -> None:
    blocked = f"import sys; sys.modules.update(dict.fromkeys({NEEDLESS}))"  # importing them is now an ImportError
    options = ["--recipe", "tiny", "--data", str(data), "--out", str(tmp_path / "run"), "--steps", "2", "--local"]
    code = f"{blocked}; from ma_cluster.cli import main; main({['train', network, *options]})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"run.json", "log.json", "last.safetensors", "best.safetensors"} <= {
        file.name for file in (tmp_path / "run").iterdir()
    }
    assert ("selective" in json.loads((tmp_path / "run" / "run.json").read_text())) == (network == "prn")


def test_a_network_of_several_kinds_goes_on_from_its_own_weights_and_ships_their_average(
    request_for: Callable[..., TrainRequest], tmp_path: Path
) -> None:
    where, recipe = rich_set(tmp_path), rich_recipe()
    request = replace(request_for("hgn_half", tmp_path / "whole", batch_norm="batch"), recipe=recipe, **where)
    whole = train_local(request)
    halves = replace(request, out=str(tmp_path / "halves"))
    with pytest.raises(StoppedError):
        train_local(halves, on_progress=stop)
    assert train_local(replace(halves, resume=True)).epochs == whole.epochs
    kept = load(Path(whole.last).read_bytes())
    again = load((tmp_path / "halves" / "last.safetensors").read_bytes())
    assert all(np.array_equal(kept[name], again[name]) for name in kept.keys() | again.keys())
    assert kept["model.head.weight"].shape[0] == 5
    assert not np.array_equal(kept["model.head.weight"], kept["trained.head.weight"])
    ledger = load((tmp_path / "whole" / "ledger-1" / "a" / "losses-000000000000.safetensors").read_bytes())["losses"]
    assert len(ledger) == 40_000 and np.count_nonzero(ledger > 0.02) > 0
    short = replace(request, network="hgn_1x", out=str(tmp_path / "one"), steps=1, epoch_steps=1)
    one = train_local(replace(short, recipe=replace(recipe, hgn_1x=recipe.hgn_half)))
    bundle = pack({"hgn_1x": [one.last], "hgn_half": [whole.last]}, None, "drawn lesions")
    assert np.array_equal(bundle.weights["hgn_half"]["head.weight"].numpy(), kept["model.head.weight"])
    save_bundle(bundle, tmp_path / "model")
    begun = train_local(replace(short, network="hgn_half", out=str(tmp_path / "begun"), init=str(tmp_path / "model")))
    assert begun.epochs[0].losses["total"] < 0.9 * whole.epochs[0].losses["total"]
    photograph = next((Path(where["data"]) / IMAGES_FOLDER / PART).iterdir())
    assert Detector(bundle).detect(photograph).shape == (600, 600)


def test_a_run_cut_short_between_its_log_and_its_last_checkpoint_is_not_taken_for_finished(
    runs: dict[str, TrainResult], request_for: Callable[..., TrainRequest], tmp_path: Path
) -> None:
    whole = Path(runs["hgn_half"].last)
    shutil.copytree(whole.parent, tmp_path / "run")
    (tmp_path / "run" / whole.name).unlink()
    resumed = train_local(request_for("hgn_half", tmp_path / "run", resume=True))
    ours, theirs = load(Path(resumed.last).read_bytes()), load(whole.read_bytes())
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs.keys() | ours.keys())


def test_a_run_that_diverges_ends_as_an_error_and_keeps_its_checkpoints(
    request_for: Callable[..., TrainRequest], tmp_path: Path
) -> None:
    request = request_for("hgn_half", tmp_path / "run", learning_rate=1e30)
    with pytest.raises(UsageError, match=r"diverged after step \d+.*lower --learning-rate"):
        train_local(request)
    kept = tmp_path / "run" / "last.safetensors"
    assert not kept.exists() or all(np.isfinite(value).all() for value in load(kept.read_bytes()).values())


def test_photographs_that_one_network_trained_on_do_not_calibrate_it_beside_another(
    runs: dict[str, TrainResult], request_for: Callable[..., TrainRequest], tmp_path: Path, log_lines: list[str]
) -> None:
    other = replace(RECIPE, split=SplitConfig.fold(1))
    request = replace(request_for("hgn_half", tmp_path / "run", steps=1), recipe=other, init=runs["hgn_half"].last)
    half = train_local(request)
    assert any("another fold" in line for line in log_lines)
    one = train_local(request_for("hgn_1x", tmp_path / "one", steps=1))
    with pytest.raises(BundleError, match=r"hgn_half was trained on another fold"):
        pack({"hgn_1x": [one.last], "hgn_half": [half.last]}, None, "drawn lesions")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_told_before_a_run_claims_its_place(
    device: str, request_for: Callable[..., TrainRequest], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"torch .* no device {device}"):
        train_local(request_for("hgn_half", tmp_path / "run"), device)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match=f"torch .* no device {device}"):
        tile_executor(device, None, "float32")


def test_a_photograph_whose_other_lesions_nobody_outlined_says_so(tmp_path: Path, log_lines: list[str]) -> None:
    where = rich_set(tmp_path)
    kinds, recipe = ("MA", "HE", "EX", "SE"), rich_recipe()
    first = read_dataset(where["data"], recipe.split)[0]
    outlined = load_annotated(first, "0.5x", recipe.image, kinds=kinds).kinds
    assert outlined is not None and np.bitwise_or.reduce(outlined, axis=None) == 0b11
    manifest = tmp_path / "manifest.csv"
    samples = read_dataset(where["data"], recipe.split)
    rows = [f"{sample.image},{sample.mask},lesion,{sample.split},{sample.name}" for sample in samples]
    manifest.write_text("\n".join(["image,mask,label,split,group", *rows]) + "\n")
    alone = load_annotated(read_dataset(str(manifest), recipe.split)[0], "0.5x", recipe.image, kinds=kinds).kinds
    assert alone is not None and np.unique(alone).tolist() == [0b1110000, 0b1110001]
    out = str(tmp_path / "run")
    Start.of(TrainRequest(network="hgn_half", data=str(manifest), out=out, recipe=recipe, healthy=where["healthy"]))
    (line,) = log_lines
    assert line.endswith("on 2 of 4 photographs microaneurysms alone are outlined: of HE, EX, SE they teach nothing")


def test_a_photograph_that_cannot_train_is_named_by_its_number(tmp_path: Path) -> None:
    write_training_set(tmp_path)
    second = sorted(tmp_path.rglob("*.jpg"))[1]
    second.write_bytes(b"<html>not found</html>")
    request = TrainRequest(network="hgn_half", data=str(tmp_path), out=str(tmp_path / "run"), recipe=RECIPE)
    with pytest.raises(UsageError, match=r"photograph 2 of 2.*not_an_image"):
        train_local(request)


@pytest.mark.parametrize("kind", ["MA", "HE"])
def test_a_mask_that_is_not_on_its_photograph_is_named_by_the_number_of_that(tmp_path: Path, kind: str) -> None:
    where = rich_set(tmp_path)
    mask = sorted(tmp_path.rglob(f"*_{kind}.tif"))[1]
    with Image.open(mask) as image:
        image.resize((300, 300)).save(mask)
    request = TrainRequest(network="hgn_half", out=str(tmp_path / "run"), recipe=rich_recipe(), **where)
    with pytest.raises(UsageError, match=r"photograph 2 of 4 .* mask is of 300 x 300 pixels, .* 600 x 600") as refused:
        train_local(request)
    assert "IDRiD" not in str(refused.value)


@pytest.mark.parametrize("network", ["hgn_half", "prn"])
def test_masks_that_outline_nothing_are_refused(tmp_path: Path, network: Any) -> None:
    write_training_set(tmp_path)
    for mask in tmp_path.rglob("*_MA.tif"):
        Image.new("1", (600, 600)).save(mask)
    recipe = replace(RECIPE, prn=replace(RECIPE.prn, negatives="photographs"))
    request = TrainRequest(network=network, data=str(tmp_path), out=str(tmp_path / "run"), recipe=recipe)
    with pytest.raises(UsageError, match="the masks of the training photographs outline nothing"):
        train_local(request)


def test_every_patch_of_the_pool_is_scored_again_in_turn() -> None:
    turns = [refreshed(1003, 0.1, epoch) for epoch in range(10)]
    assert sorted(np.concatenate(turns).tolist()) == list(range(1003))
    assert refreshed(10, 1.0, 7).tolist() == list(range(10))


def test_losses_go_back_in_the_order_of_the_mini_batches() -> None:
    def seen(*ids: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array(ids), np.array(ids, np.float32) / 10

    ids, losses = in_order([[seen(0, 1), seen(5)], [seen(2), seen(6, 7)]])
    assert ids.tolist() == [0, 1, 2, 5, 6, 7]
    assert losses == pytest.approx(ids / 10)


def test_a_mini_batch_is_not_shared_by_more_workers_than_it_has_patches(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="1 to 4 workers"):
        TrainRequest(network="prn", data="", out=str(tmp_path), recipe=RECIPE, workers=5)


def test_runs_are_packed_by_their_folders_and_say_what_they_trained(
    runs: dict[str, TrainResult], request_for: Callable[..., TrainRequest], tmp_path: Path
) -> None:
    results = {"hgn_1x": train_local(request_for("hgn_1x", tmp_path / "run", steps=2))} | runs
    packed = pack({name: [result.best.rpartition("/")[0]] for name, result in results.items()}, None, "drawn lesions")
    assert (packed.recipe, packed.weights.keys()) == (RECIPE, results.keys())
    assert {name: about["network"] for name, about in packed.training.items()} == {name: name for name in results}
    assert all({"photographs", "version", "seed"} <= about.keys() for about in packed.training.values())
