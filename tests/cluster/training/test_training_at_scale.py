"""Training as it is done in earnest: the paper's networks at full width, and runs whose data and results are remote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fundus_set import write_training_set
from safetensors.numpy import load
from servers import Weed
from train_faults import Killer

from ma_cluster.cluster.training.launch import train_on_ray
from ma_cluster.config import ImageConfig, Recipe, paper, tiny
from ma_cluster.errors import MaClusterError
from ma_cluster.storage.store import open_store
from ma_cluster.training.run import TrainFolder, TrainRequest


def small_paper() -> Recipe:
    """The paper's networks at full width, on photographs and patches that a CPU can afford."""
    recipe = paper()
    steps = {"steps": 4, "learning_rate": 1e-5}
    return replace(
        recipe,
        image=ImageConfig(fov_diameter_px=256.0),
        hgn_half=replace(recipe.hgn_half, patch_px=64, batch_patches=2, **steps),
        prn=replace(recipe.prn, patch_px=16, triplets=2, healthy_per_image=16, refresh_steps=2, **steps),
        detector=replace(recipe.detector, tile_px=320, halo_px=32),
    )


@pytest.mark.parametrize(
    ("network", "millions"),
    [
        pytest.param("hgn_half", 17.7, marks=pytest.mark.slow),
        pytest.param("prn", 23.5, marks=pytest.mark.long),
    ],
)
def test_the_paper_at_full_width_trains_checkpoints_and_goes_on_after_a_lost_worker(
    network: Any, millions: float, tmp_path: Path, local_ray: None
) -> None:
    write_training_set(tmp_path / "data")
    killer, out = Killer(step=2), str(tmp_path / "run")
    request = TrainRequest(network=network, data=str(tmp_path / "data"), out=out, recipe=small_paper(), epoch_steps=2)
    result = train_on_ray(request, on_progress=killer)
    assert len(killer.victims) == 1
    assert [epoch.step for epoch in result.epochs] == [2, 4]
    weights = load(Path(result.last).read_bytes())
    assert sum(values.size for name, values in weights.items() if name.startswith("model.")) / 1e6 == pytest.approx(
        millions, abs=0.1
    )


@pytest.mark.long
def test_a_run_between_buckets_is_resumed_and_ends_as_one_between_folders(
    weed: Weed, tmp_path: Path, local_ray: None
) -> None:
    write_training_set(tmp_path)
    bucket = weed.bucket("training")
    store = open_store(f"{bucket}/data")
    for file in filter(Path.is_file, tmp_path.rglob("*")):
        store.put(file.relative_to(tmp_path).as_posix(), file.read_bytes())
    request = TrainRequest(
        network="prn",
        data=f"{bucket}/data",
        out=f"{bucket}/run",
        recipe=tiny(),
        workers=2,
        epoch_steps=2,
        threads=1,
        batch_norm="frozen",
        seed=3,
        max_failures=0,
    )
    with pytest.raises(MaClusterError, match="resume"):
        train_on_ray(request, on_progress=Killer(2))
    assert [epoch.step for epoch in TrainFolder(request.out).epochs] == [2]
    result = train_on_ray(replace(request, resume=True))
    run = open_store(request.out)
    written = {item.key for item in run.list()}
    assert {"run.json", "last.safetensors", "best.safetensors", "log.json"} < written
    assert {"ledger-0/ledger.json", "ledger-1/ledger.json"} < written
    golden = json.loads((Path(__file__).parents[2] / "training" / "golden_losses.json").read_text())["prn"]
    for epoch, losses in zip(result.epochs, golden, strict=True):
        assert epoch.losses == pytest.approx(losses, rel=0.04)  # bfloat16 differs among CPUs, with AMX most
