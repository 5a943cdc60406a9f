"""The Ray that a command runs on: the one of this process, a cluster at an address, or a local one for its duration."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from ma_cluster.machine import cores

_LOCAL_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # Ray's 0.1 takes 2.5 % of a core from the networks
}


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
    for variable, value in _LOCAL_RAY.items():
        os.environ.setdefault(variable, value)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    on_sigterm = signal.getsignal(signal.SIGTERM)  # ray.init installs its own, which exits with 15
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, **quiet)
    else:
        context: Any = ray.init(
            address="local",
            _node_ip_address="127.0.0.1",
            num_cpus=cores() + waiting_cpus,
            object_store_memory=object_store_bytes,
            include_dashboard=False,
            **quiet,
        )
        _announce_exporter(context.address_info)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        ray.shutdown()  # takes a local Ray's processes with it, Serve's among them


def quieten() -> None:
    """Keep Ray's libraries from writing between a command's own lines; their log files hold it all."""
    for name in ("ray.data", "ray.serve"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.ERROR)


def _announce_exporter(address: dict[str, Any]) -> None:
    """Write the file by which Prometheus finds a Ray's metrics, where a dashboard would: without one Ray does not."""
    targets = [f"{address['node_ip_address']}:{address['metrics_export_port']}"]
    there = Path(address["session_dir"]) / "prom_metrics_service_discovery.json"
    new = there.with_suffix(".new")
    new.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": targets}]))
    new.replace(there)
