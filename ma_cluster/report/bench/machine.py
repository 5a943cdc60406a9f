"""What a benchmark's figures hold for."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ma_cluster.machine import cores

_PACKAGES = ("torch", "numpy", "opencv-python-headless", "ray", "monai")


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, its vector extensions, load, versions, and the GPU where `device` is one.

    Imports nothing for a CPU: a benchmark may be about memory.
    """
    described = {
        "cpu": _cpu_field("model name") or platform.processor(),
        "cores": cores(),
        "vector_extensions": sorted(flag for flag in _cpu_field("flags").split() if flag.startswith(("avx", "amx"))),
        "load_average_1min": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: found for package in _PACKAGES if (found := _version(package))},
    }
    if device.startswith("cuda"):
        import torch

        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def _cpu_field(name: str) -> str:
    """A field of the first processor as Linux describes it; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
