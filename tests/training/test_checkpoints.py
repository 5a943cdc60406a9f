"""Checkpoints: what was saved comes back, with what is said of the run that wrote it."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import nn

from ma_cluster.errors import BundleError, UsageError
from ma_cluster.training.checkpoints import checkpoint_about, checkpoint_bytes, read_checkpoint, restore_checkpoint


def linear() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters())


def descend(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()


def test_a_checkpoint_restores_weights_optimiser_and_position() -> None:
    model, optimizer = linear()
    descend(model, optimizer)
    data = checkpoint_bytes({"model": model}, optimizer, {"step": 1, "seed": -5})
    copy, copy_optimizer = linear()
    assert restore_checkpoint(data, "last", {"model": copy}, copy_optimizer) == {"step": 1, "seed": -5}
    for _ in range(3):
        descend(model, optimizer)
        descend(copy, copy_optimizer)
    for ours, theirs in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_of_another_network_is_refused() -> None:
    model, optimizer = linear()
    data = checkpoint_bytes({"model": model}, optimizer, {})
    with pytest.raises(BundleError, match="do not fit"):
        restore_checkpoint(data, "last", {"model": nn.Linear(3, 5)})


@pytest.mark.parametrize("data", [b"", pickle.dumps({"model": 1}), b"PK\x03\x04" + bytes(100)])
def test_what_is_no_checkpoint_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match="no safetensors file"):
        restore_checkpoint(data, "last", {"model": nn.Linear(3, 2)})


def test_a_checkpoint_says_what_run_wrote_it(tmp_path: Path) -> None:
    model, optimizer = linear()
    about = {"network": "prn", "recipe": {"name": "tiny"}, "photographs": "2f"}
    (tmp_path / "best.safetensors").write_bytes(checkpoint_bytes({"model": model}, optimizer, {"step": 1}, about))
    assert checkpoint_about(read_checkpoint(str(tmp_path / "best.safetensors")), "prn") == about
    assert restore_checkpoint((tmp_path / "best.safetensors").read_bytes(), "best", {"model": model}) == {"step": 1}
    assert checkpoint_about(checkpoint_bytes({"model": model}, optimizer, {"step": 1}), "prn") == {}


def test_a_runs_folder_stands_for_its_best_checkpoint(tmp_path: Path) -> None:
    model, optimizer = linear()
    with pytest.raises(UsageError, match="no checkpoint at"):
        read_checkpoint(str(tmp_path))
    for name, step in (("best", 3), ("last", 9)):
        (tmp_path / f"{name}.safetensors").write_bytes(checkpoint_bytes({"model": model}, optimizer, {"step": step}))
    assert read_checkpoint(str(tmp_path)) == (tmp_path / "best.safetensors").read_bytes()


def test_a_checkpoint_that_diverged_is_not_gone_on_with() -> None:
    model, optimizer = linear()
    with torch.no_grad():
        model.weight[0, 0] = torch.nan  # type: ignore[index]
    data = checkpoint_bytes({"model": model}, optimizer, {"step": 1})
    with pytest.raises(BundleError, match="holds NaN or infinity"):
        restore_checkpoint(data, "last", {"model": linear()[0]})


@pytest.mark.parametrize("about", ["{", "[1]", "[" * 100_000])
def test_what_a_foreign_file_says_of_itself_is_refused_in_a_line(about: str) -> None:
    data = save({"model.weight": torch.ones(2, 3), "model.bias": torch.ones(2)}, {"about": about, "format": "pt"})
    with pytest.raises(BundleError, match="what hgn_1x says of its run is no JSON object"):
        checkpoint_about(data, "hgn_1x")
    with pytest.raises(BundleError, match="hgn_1x does not say where training stands"):
        restore_checkpoint(data, "hgn_1x", {"model": nn.Linear(3, 2)})
