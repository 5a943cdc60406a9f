"""Training on a cluster: what one worker learns two learn, and a run that lost a worker ends as if it had not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
import torch.distributed as dist
from fundus_set import NAMES, PART, rich_recipe, rich_set, write_training_set
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from train_faults import Killer

from ma_cluster import Detector
from ma_cluster.bundle import Bundle, save_bundle
from ma_cluster.cluster.training.launch import RayContext, train_on_ray
from ma_cluster.config import tiny
from ma_cluster.errors import BundleError, MaClusterError, RunConflictError, UsageError
from ma_cluster.hypotheses.hgn_training import HgnBatch, hgn_losses
from ma_cluster.images.datasets import IMAGES_FOLDER
from ma_cluster.training.checkpoints import checkpoint_weights, pack, read_checkpoint
from ma_cluster.training.loop import Progress
from ma_cluster.training.run import TrainFolder, TrainRequest
from ma_cluster.training.start import TrainResult, train_local

RECIPE = tiny()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("data")
    write_training_set(root)
    return str(root)


@pytest.fixture(scope="module")
def request_for(data: str, local_ray: None) -> Callable[..., TrainRequest]:
    def build(network: Any, out: Path, **changes: Any) -> TrainRequest:
        usual = {"workers": 2, "epoch_steps": 2, "threads": 1, "batch_norm": "frozen", "seed": 3}
        return TrainRequest(network=network, data=data, out=str(out), recipe=RECIPE, **(usual | changes))

    return build


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request_for: Callable[..., TrainRequest]) -> dict[str, TrainResult]:
    """Undisturbed runs of two workers, by network."""
    out = tmp_path_factory.mktemp("runs")
    return {network: train_on_ray(request_for(network, out / network)) for network in ("hgn_half", "prn")}


def assert_same(ours: TrainResult, theirs: TrainResult, tolerance: float) -> None:
    """Both went through the same epochs, to the tolerance."""
    assert [epoch.step for epoch in ours.epochs] == [epoch.step for epoch in theirs.epochs]
    for mine, other in zip(ours.epochs, theirs.epochs, strict=True):
        assert mine.losses == pytest.approx(other.losses, rel=tolerance)
        assert (mine.pool_loss or 0) == pytest.approx(other.pool_loss or 0, rel=tolerance)


def test_the_losses_of_tiny_are_golden(runs: dict[str, TrainResult]) -> None:
    golden = json.loads((Path(__file__).parents[2] / "training" / "golden_losses.json").read_text())
    for network, result in runs.items():
        for epoch, losses in zip(result.epochs, golden[network], strict=True):
            assert epoch.losses == pytest.approx(losses, rel=0.04)  # bfloat16 differs among CPUs, with AMX most


@pytest.mark.parametrize(
    "network", [pytest.param("hgn_half", marks=pytest.mark.slow), pytest.param("prn", marks=pytest.mark.long)]
)
def test_two_workers_of_ray_learn_what_one_learns_and_one_what_a_process_without_ray_does(
    network: str, runs: dict[str, TrainResult], request_for: Callable[..., TrainRequest], tmp_path: Path
) -> None:
    alone = train_on_ray(request_for(network, tmp_path / "alone", workers=1))
    local = train_local(request_for(network, tmp_path / "local", workers=1))
    assert {epoch.workers for epoch in runs[network].epochs} == {2} and alone.epochs[0].workers == 1
    assert_same(alone, runs[network], tolerance=0.04)  # bfloat16: kernels differ with the size of the part
    assert_same(alone, local, tolerance=1e-6)
    assert [epoch.average_precision for epoch in alone.epochs] == [epoch.average_precision for epoch in local.epochs]


@pytest.mark.long
def test_hard_places_and_other_lesions_train_on_ray_as_they_do_in_one_process(
    request_for: Callable[..., TrainRequest], tmp_path: Path
) -> None:
    given = replace(request_for("hgn_half", tmp_path / "local", workers=1), recipe=rich_recipe(), **rich_set(tmp_path))
    local = train_local(given)
    alone = train_on_ray(replace(given, out=str(tmp_path / "alone")))
    shared = train_on_ray(replace(given, out=str(tmp_path / "shared"), workers=2))
    assert_same(alone, local, tolerance=1e-6)
    assert [epoch.step for epoch in shared.epochs] == [epoch.step for epoch in local.epochs]
    # how many hard places an epoch finds is a matter of bits, and the next one draws from them
    assert shared.epochs[0].losses == pytest.approx(local.epochs[0].losses, rel=0.04)


@pytest.mark.long
def test_a_run_that_lost_its_worker_for_good_is_resumed_and_ends_as_the_undisturbed_one(
    runs: dict[str, TrainResult], request_for: Callable[..., TrainRequest], tmp_path: Path
) -> None:
    request = request_for("hgn_half", tmp_path / "run", max_failures=0)
    with pytest.raises(MaClusterError, match="resume"):
        train_on_ray(request, on_progress=Killer(2))
    assert [epoch.step for epoch in TrainFolder(request.out).epochs] == [2]
    with pytest.raises(UsageError, match="resume"):
        train_on_ray(request)
    with pytest.raises(RunConflictError, match="seed"):
        train_on_ray(replace(request, resume=True, seed=4))
    told: list[Progress] = []
    resumed = train_on_ray(replace(request, resume=True), on_progress=told.append)
    assert told[-1].epoch == resumed.epochs[-1] and told[0].step > 2
    assert_same(resumed, runs["hgn_half"], tolerance=1e-3)


@pytest.mark.slow
def test_a_run_survives_a_killed_worker_and_its_ledger_with_it(
    runs: dict[str, TrainResult], request_for: Callable[..., TrainRequest], tmp_path: Path
) -> None:
    killer = Killer(step=2)
    survived = train_on_ray(request_for("prn", tmp_path / "run"), on_progress=killer)
    assert len(killer.victims) == 1
    assert_same(survived, runs["prn"], tolerance=1e-3)


@pytest.mark.slow
def test_what_was_trained_is_packed_and_detects(
    runs: dict[str, TrainResult], request_for: Callable[..., TrainRequest], data: str, tmp_path: Path
) -> None:
    fresh = {"workers": 1, "batch_norm": "batch", "steps": 2}
    asked = runs["hgn_half"].best
    cls = train_on_ray(request_for("cls", tmp_path / "cls", selective=False, hgn_half=asked, **fresh))
    one = train_on_ray(request_for("hgn_1x", tmp_path / "hgn_1x", **fresh))
    assert cls.epochs[-1].losses["triplet"] == 0
    results = {"hgn_1x": one, "hgn_half": runs["hgn_half"], "prn": runs["prn"], "cls": cls}
    bundle = pack({name: [result.best] for name, result in results.items()}, None, "drawn lesions")
    assert bundle.recipe == RECIPE
    photograph = Path(data) / IMAGES_FOLDER / PART / f"{NAMES[-1]}.jpg"
    assert Detector(bundle).detect(photograph).shape == (600, 600)


def model_of(checkpoint: str) -> Bundle:
    """A model whose two networks are the same."""
    weights = checkpoint_weights(read_checkpoint(checkpoint), "hgn_half")
    return Bundle(RECIPE, {"hgn_1x": weights, "hgn_half": weights}, "drawn lesions")


@pytest.mark.long
def test_training_begins_with_the_weights_of_a_checkpoint_or_of_a_model(
    runs: dict[str, TrainResult], request_for: Callable[..., TrainRequest], tmp_path: Path
) -> None:
    last = runs["hgn_half"].last
    save_bundle(model_of(last), tmp_path / "model")
    fresh = {"workers": 1, "steps": 1, "epoch_steps": 1}
    begun = {None: {}, last: {}, str(tmp_path / "model"): {}}
    for number, init in enumerate(begun):
        result = train_on_ray(request_for("hgn_half", tmp_path / f"run_{number}", init=init, **fresh))
        begun[init] = result.epochs[0].losses
    untrained, of_checkpoint, of_model = begun.values()
    assert of_checkpoint == of_model
    assert of_checkpoint["total"] < 0.9 * untrained["total"]
    with pytest.raises(RunConflictError, match="init"):
        train_on_ray(request_for("hgn_half", tmp_path / "run_0", init=last, resume=True, **fresh))
    with pytest.raises(UsageError, match="no network prn to begin with"):
        train_on_ray(request_for("prn", tmp_path / "run", init=str(tmp_path / "model")))


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(
    runs: dict[str, TrainResult], request_for: Callable[..., TrainRequest], tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="do not fit"):
        train_on_ray(request_for("prn", tmp_path / "run", init=runs["hgn_half"].last))
    save_bundle(model_of(runs["hgn_half"].last), tmp_path / "model")
    with pytest.raises(BundleError, match="name the model's folder"):
        train_on_ray(request_for("hgn_half", tmp_path / "run", init=str(tmp_path / "model/hgn_half.safetensors")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["hgn_half", "init"])
def test_a_checkpoint_that_is_not_there_is_refused(
    option: str, request_for: Callable[..., TrainRequest], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no checkpoint at"):
        train_on_ray(request_for("prn", tmp_path / "run", **{option: str(tmp_path / "none.safetensors")}))


def test_a_finished_run_is_not_trained_again(
    runs: dict[str, TrainResult], request_for: Callable[..., TrainRequest]
) -> None:
    folder = Path(runs["prn"].last).parent
    assert train_on_ray(request_for("prn", folder, resume=True)) == runs["prn"]


def part_gradient(rank: int, port: int) -> list[np.ndarray]:
    """The gradient that a worker of two has after its part of five patches."""
    options: dict[str, Any] = {"backend": "gloo", "rank": rank, "world_size": 2}
    dist.init_process_group(init_method=f"tcp://127.0.0.1:{port}", **options)
    try:
        team = RayContext(rank, 2, torch.device("cpu"))
        return gradient(slice(0, 2) if rank == 0 else slice(2, 5), DistributedDataParallel, team.reduce)
    finally:
        dist.destroy_process_group()


def gradient(part: slice, wrap: Callable[[nn.Module], nn.Module], *pool: Any) -> list[np.ndarray]:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 2, 3, padding=1)
    patches = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    truth = torch.rand(5, 1, 16, 16) < 0.1
    network = Exact(wrap(model))  # must outlive the backward pass
    hgn_losses(network, HgnBatch(patches[part], truth[part]), RECIPE.hgn_1x, *pool).total.backward()
    return [weight.grad.numpy().copy() for weight in model.parameters() if weight.grad is not None]


class Exact(nn.Module):
    """Runs a model in float32 where the step would have it in bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.model(x.float())


def test_unequal_parts_give_the_gradient_of_the_whole(local_ray: None, free_port: int) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests
    task = ray.remote(part_gradient).options(num_cpus=0)
    first, second = ray.get([task.remote(rank, free_port) for rank in range(2)])
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    for whole, ours, theirs in zip(gradient(slice(0, 5), nn.Sequential), first, second, strict=True):
        assert np.array_equal(ours, theirs)
        assert ours == pytest.approx(whole, rel=1e-4, abs=1e-6)


@pytest.fixture
def free_port() -> int:
    from servers import free_ports

    return free_ports(1)[0]
