"""Joining a Ray that asks for a token, and where the warnings of a Ray's workers go."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from ma_cluster.archive import shard_scorer

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.mark.parametrize("token", ["wrong", "0" * 64])
def test_a_wrong_token_is_told_in_one_line_and_soon(token: str, tmp_path: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "ma_cluster", "score", str(tmp_path), str(tmp_path / "dest"), "--address", address]
    began = time.monotonic()
    done = subprocess.run(command, env=os.environ | {"RAY_AUTH_TOKEN": token}, capture_output=True, text=True)
    assert time.monotonic() - began < 30  # 2 on an idle machine; Ray alone takes 20 longer, and as many lines
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(
        f"ma-cluster: the Ray cluster at {address} asks for another token: set RAY_AUTH_TOKEN"
    )


def test_what_the_package_warns_of_in_a_worker_is_in_that_workers_log() -> None:
    """Whatever Ray does to loggers there: none has a handler, and none is switched off."""

    class Warns:
        def warn(self) -> None:
            shard_scorer.log.warning("a warning of process %d", os.getpid())

    worker: Any = ray.remote(num_cpus=0)(Warns).remote()
    ray.get(worker.warn.remote())
    session = ray._private.worker._global_node.get_session_dir_path()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        logs = [path.read_text(errors="replace") for path in Path(session, "logs").glob("worker-*.err")]
        if any("a warning of process" in text for text in logs):
            return
        time.sleep(0.1)
    raise AssertionError("no worker's log holds it")
