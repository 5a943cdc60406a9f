"""An archive run on a cluster of two nodes that loses one: `score_losing_a_node.py SOURCE DEST MODEL`, run by a test.

Each node has room for the whole fleet. Prints, as JSON, what replicas the lost node had.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray

sys.path.insert(0, str(Path(__file__).parents[2]))
from processes import Process, descendants, kill
from second_node import STORE_BYTES, second_node

from ma_cluster.cluster.fleet.driver import score_archive
from ma_cluster.cluster.fleet.replicas import Fleet
from ma_cluster.cluster.fleet.workers import Progress


def main() -> None:
    """Score; kill the second node's raylet when the first shard is done. Its workers end with it."""
    local: dict[str, Any] = {"address": "local", "_node_ip_address": "127.0.0.1", "include_dashboard": False}
    ray.init(**local, num_cpus=5, object_store_memory=STORE_BYTES, log_to_driver=False)
    with second_node(cpus=5) as node:
        lost = score_and_lose(node)
    sys.stdout.write(json.dumps(lost) + "\n")
    ray.shutdown()


def score_and_lose(node: subprocess.Popen[bytes]) -> list[str]:
    """The titles of the replicas that ran on the node."""
    lost: list[Process] = []

    def lose(progress: Progress) -> None:
        if not lost:
            lost.extend(descendants(node.pid))
            kill([each for each in lost if "raylet/raylet" in each.title])

    score_archive(sys.argv[1], sys.argv[2], Fleet(segmenters=2, readers=2), model=sys.argv[3], on_progress=lose)
    return [each.title for each in lost if each.title.startswith("ray::ServeReplica:")]


if __name__ == "__main__":
    main()
