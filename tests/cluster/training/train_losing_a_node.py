"""A training run on a cluster of two nodes that loses one: `train_losing_a_node.py DATA OUT`, run by a test.

Each node has room for one Train worker, the first one also for the tasks that cut patches. Prints the epochs as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

sys.path.insert(0, str(Path(__file__).parents[2]))
from processes import Process, descendants, kill
from second_node import STORE_BYTES, second_node

from ma_cluster.cluster.training.launch import train_on_ray
from ma_cluster.config import tiny
from ma_cluster.training.loop import Progress
from ma_cluster.training.run import Epoch, TrainRequest

HEAD_CPUS = 3


def main() -> None:
    """Train; kill the second node's raylet when the first epoch is over."""
    local: dict[str, Any] = {"address": "local", "_node_ip_address": "127.0.0.1", "include_dashboard": False}
    ray.init(**local, num_cpus=HEAD_CPUS, object_store_memory=STORE_BYTES, log_to_driver=False)
    with second_node(cpus=2) as node:
        epochs = train_and_lose(node)
    sys.stdout.write(json.dumps([[epoch.step, epoch.workers] for epoch in epochs]) + "\n")
    ray.shutdown()


def train_and_lose(node: subprocess.Popen[bytes]) -> Sequence[Epoch]:
    """The epochs of a run that loses a node after its first."""
    lost: list[Process] = []

    def lose(progress: Progress) -> None:
        if progress.epoch is not None and not lost:
            lost.extend(each for each in descendants(node.pid) if "raylet/raylet" in each.title)
            kill(lost)

    request = TrainRequest(
        network="hgn_half",
        data=sys.argv[1],
        out=sys.argv[2],
        recipe=tiny(),
        workers=(1, 2),
        cpus_per_worker=2,
        epoch_steps=2,
        steps=8,
        threads=1,
        batch_norm="frozen",
    )
    return train_on_ray(request, on_progress=lose).epochs


if __name__ == "__main__":
    main()
