"""A second node of a Ray, on this machine: another raylet."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

STORE_BYTES = 200 * 2**20
"""Of each node's object store: two of Ray's choice would not fit a small machine's shared memory."""


@contextmanager
def second_node(cpus: int, store_bytes: int = STORE_BYTES) -> Iterator[subprocess.Popen[bytes]]:
    """A second raylet on the loopback interface, of the Ray that is up in this process."""
    ray_command = str(Path(sys.executable).with_name("ray"))
    wanted = ray.cluster_resources()["CPU"] + cpus
    command = [ray_command, "start", f"--address={ray.get_runtime_context().gcs_address}", "--block"]
    command += ["--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", f"--object-store-memory={store_bytes}"]
    node = subprocess.Popen(command, stdout=sys.stderr, stderr=sys.stderr)
    try:
        deadline = time.monotonic() + 120
        while ray.cluster_resources()["CPU"] < wanted:
            if node.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the second node did not come up")
            time.sleep(0.2)
        yield node
    finally:
        node.terminate()
        node.wait()
