"""Starts a Ray of its own, runs one task on it and says so in a line: a child process of `ma-cluster doctor`."""

from __future__ import annotations

import logging
import sys
import time

import ray


def main() -> None:
    started = time.perf_counter()
    ray.init(
        address="local",  # whatever RAY_ADDRESS says: this machine is examined
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )
    try:
        ray.get(ray.remote(_ready).remote(), timeout=60)
    finally:
        ray.shutdown()
    sys.stdout.write(f"{ray.__version__}, started and ran a task in {time.perf_counter() - started:.0f} s\n")


def _ready() -> bool:
    return True


if __name__ == "__main__":
    main()
