"""The Ray that a command runs on: the one of this process, a cluster at an address, or a local one for its duration."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray


@contextmanager
def connected(address: str | None, *, waiting_cpus: int, object_store_bytes: int | None = None) -> Iterator[None]:
    """Ray is up within the block; what was started for it is stopped after.

    Args:
        address: of a cluster; None for the Ray that is up in this process, else RAY_ADDRESS's (a submitted job finds it
            set), else a local one on loopback.
        waiting_cpus: logical CPUs of a local Ray on top of the cores, for workers that mostly wait.
        object_store_bytes: of a local Ray; beyond them objects are spilled to disk. None leaves Ray's choice.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    on_sigterm = signal.getsignal(signal.SIGTERM)  # ray.init installs its own, which exits with 15
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, **quiet)
    else:
        ray.init(
            address="local",
            _node_ip_address="127.0.0.1",
            num_cpus=(os.cpu_count() or 1) + waiting_cpus,
            object_store_memory=object_store_bytes,
            include_dashboard=False,
            **quiet,
        )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        ray.shutdown()  # takes a local Ray's processes with it, Serve's among them
