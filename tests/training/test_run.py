"""A run's place in a store: which checkpoint is the best, and where a run goes on."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

from ma_cluster.config import tiny
from ma_cluster.hypotheses.frrn import build_hgn
from ma_cluster.networks import build_optimizer
from ma_cluster.training.run import Epoch, TrainFolder

RECIPE = tiny()


def test_the_best_checkpoint_is_of_the_best_epoch(tmp_path: Path) -> None:
    model = build_hgn(RECIPE.hgn_half)
    optimizer = build_optimizer(model, RECIPE.hgn_half)
    folder = TrainFolder.begin(str(tmp_path / "run"), {"network": "hgn_half"}, resume=False)
    assert folder.restore({"model": model}, optimizer) is None and folder.epochs == ()
    for step, precision in ((2, 0.1), (4, 0.3), (6, 0.2)):
        folder.save({"model": model}, optimizer, epoch(step, precision))
    assert folder.restore({"model": model}, optimizer) == 6
    assert [record.step for record in folder.epochs] == [2, 4, 6]
    shutil.copy(tmp_path / "run" / "best.safetensors", tmp_path / "run" / "last.safetensors")
    assert folder.restore({"model": model}, optimizer) == 4
    events = sorted((tmp_path / "run" / "tensorboard").iterdir())
    assert [scalars(file)["validation/average_precision"] for file in events] == [(2, 0.1), (4, 0.3), (6, 0.2)]


def scalars(file: Path) -> dict[str, tuple[int, float]]:
    """Step and value by name, of an event file: records of length (8 bytes), checksum (4), event, checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    data, found = file.read_bytes(), {}
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        found |= {value.tag: (event.step, round(value.simple_value, 6)) for value in event.summary.value}
        data = data[16 + length :]
    return found


def test_epochs_that_a_lost_checkpoint_had_seen_are_forgotten(tmp_path: Path) -> None:
    model = build_hgn(RECIPE.hgn_half)
    optimizer = build_optimizer(model, RECIPE.hgn_half)
    folder = TrainFolder(str(tmp_path))
    for step, precision in ((2, 0.1), (4, 0.9), (4, 0.2)):
        folder.save({"model": model}, optimizer, epoch(step, precision))
    assert [record.average_precision for record in folder.epochs] == [0.1, 0.2]


def epoch(step: int, precision: float) -> Epoch:
    return Epoch(
        step=step, losses={"total": 1.0}, average_precision=precision, workers=1, patches_per_second=1.0, seconds=1.0
    )
