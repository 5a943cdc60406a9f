"""Training with less than was hoped for: a node is lost for good, or the photographs do not fit into memory.

Both need a Ray of their own, so the runs are processes of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fundus_set import write_training_set
from train_beyond_memory import SIDE_PX, STORE_BYTES, request_for

from ma_cluster.cluster.training.launch import train_on_ray

pytestmark = pytest.mark.long

HERE = Path(__file__).parent


def printed_by(script: str, *arguments: Path) -> Any:
    """The last line of a script's output, which is JSON."""
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_that_loses_one_of_two_nodes_goes_on_with_one_worker(tmp_path: Path) -> None:
    write_training_set(tmp_path / "data")
    epochs = printed_by("train_losing_a_node.py", tmp_path / "data", tmp_path / "run")
    assert [step for step, _ in epochs] == [2, 4, 6, 8]
    workers = [count for _, count in epochs]
    assert workers[0] == 2 and workers[-1] == 1
    assert workers == sorted(workers, reverse=True)


def test_photographs_beyond_the_object_store_are_spilled_and_train_the_same(tmp_path: Path, local_ray: None) -> None:
    write_training_set(tmp_path / "data", SIDE_PX, tuple(f"IDRiD_{number:02d}" for number in (*range(1, 11), 45)))
    assert 11 * 5 * (0.95 * SIDE_PX) ** 2 > STORE_BYTES  # three bytes of colour and two masks a pixel
    scarce = printed_by("train_beyond_memory.py", tmp_path / "data", tmp_path / "scarce")
    ample = train_on_ray(request_for(tmp_path / "data", tmp_path / "ample"))
    for epoch, losses in zip(ample.epochs, scarce, strict=True):
        assert epoch.losses == pytest.approx(losses, rel=1e-6)
