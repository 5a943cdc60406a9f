"""What this process may use of the machine, how it uses that where it has nothing else to do, and what it is.

The one place that counts cores and memory: a container has less than its host.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_ROOT = Path("/")
_PACKAGES = ("torch", "numpy", "opencv-python-headless", "ray", "monai")
_LISTENS = "0A"  # a state, in proc/net/tcp
_LOOPBACK = "7F", "00000000000000000000000001000000"  # ends of addresses there, whose bytes are turned round in fours
_UNLIMITED_BYTES = 2**60
"""From here on a memory limit of cgroup v1 means none: its default is the largest multiple of a page."""
_SETTINGS = (("MALLOC_MMAP_THRESHOLD_", -3, 2**30), ("MALLOC_TRIM_THRESHOLD_", -1, 2**30), ("MALLOC_ARENA_MAX", -8, 1))
"""Of glibc's allocator: variable, number in malloc.h, value."""
MALLOC = {variable: str(value) for variable, _, value in _SETTINGS}
"""Environment of a process whose threads are there before `dedicate` is called: they keep the arena that they have."""
TileMap = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""`map`, or one like it that works on several items at a time."""


def cores(root: Path = _ROOT) -> int:
    """Cores that this process may keep busy, at least one: by its CPU affinity and the CPU quota of its cgroups.

    Of a quota of 2.5 cores two are counted: a third thread would make the other two wait.

    Args:
        root: of the file system that holds proc/ and sys/.
    """
    quotas = [quota / period for quota, period in _cpu_quotas(root)]
    return max(1, int(min([_affinity(), *quotas])))


def memory_bytes(root: Path = _ROOT) -> int:
    """Memory that this process may use: the machine's, or the limit of its cgroups where that is less.

    Args:
        root: of the file system that holds proc/ and sys/.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    files = [*_files(root, "", "memory.max"), *_files(root, "memory", "memory.limit_in_bytes")]
    limits = [int(text) for text in map(_read, files) if text.isdigit()]
    return min([total, *(limit for limit in limits if limit < _UNLIMITED_BYTES)])


def gpus() -> int:
    """GPUs that torch can use. Imports torch."""
    import torch

    return torch.cuda.device_count()


def dedicate(threads: int) -> TileMap:
    """Give this process's cores to what `map` is asked, an item to each, instead of sharing each item out among them.

    So no core waits for another within a tile (two cores are a tenth faster), and as each sum has its one order, the
    answers do not depend on how many there are. torch has one thread from now on, and memory that it frees is kept:
    else feature maps of over 32 MiB come from the kernel each time, cleared page by page, a fifth of the time.
    """
    import torch  # not for those who start such a process

    torch.set_num_threads(1)
    _keep_memory()
    if threads == 1:
        return map
    return ThreadPoolExecutor(threads, thread_name_prefix="tile").map


def describe(device: str = "cpu") -> dict[str, Any]:
    """What a benchmark's figures hold for: processor, vector extensions, load, versions, the GPU where `device` is one.

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


def open_ports(pid: int, root: Path = _ROOT) -> list[int]:
    """TCP ports on which a process, or one that it has started, listens for other machines: not on loopback alone.

    Args:
        pid: of the process.
        root: of the file system that holds proc/. Where there is none, as on macOS, nothing is found.
    """
    parents = {}
    for stat in (root / "proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    own = {pid}
    while new := {child for child, parent in parents.items() if parent in own} - own:
        own |= new
    sockets = set()
    for each in own:
        with suppress(OSError):
            sockets |= {str(file.readlink()) for file in (root / f"proc/{each}/fd").iterdir()}
    rows = [row.split() for kind in ("tcp", "tcp6") for row in _read(root / "proc/net" / kind).splitlines()[1:]]
    listening = {row[1] for row in rows if row[3] == _LISTENS and f"socket:[{row[9]}]" in sockets}
    places = [place.rpartition(":") for place in listening]
    return sorted({int(port, 16) for host, _, port in places if not host.endswith(_LOOPBACK)})


def _keep_memory() -> None:
    """Settings of glibc's allocator; any other is left as it is."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for _, number, value in _SETTINGS:
            mallopt(number, value)


def _cpu_field(name: str) -> str:
    """A field of the first processor as Linux describes it; empty elsewhere."""
    lines = _read(_ROOT / "proc/cpuinfo").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS: it has no affinity, and no cgroups either


def _cpu_quotas(root: Path) -> Iterator[tuple[int, int]]:
    """(quota, period), both in microseconds, of each cgroup above this process that has one."""
    for file in _files(root, "", "cpu.max"):
        quota, _, period = _read(file).partition(" ")
        if quota.isdigit():  # not "max"
            yield int(quota), int(period)
    for file in _files(root, "cpu", "cpu.cfs_quota_us"):
        quota = _read(file)
        if quota.isdigit():  # not "-1"
            yield int(quota), int(_read(file.with_name("cpu.cfs_period_us")))


def _files(root: Path, controller: str, name: str) -> list[Path]:
    """The files `name` of this process's cgroup and all above it; `controller` is empty for version 2.

    A container may see its host's path in proc/self/cgroup and its own cgroup at the top of sys/fs/cgroup: what of the
    path does not exist is passed over.

        proc/self/cgroup       0::/pod/job                (version 2)     4:cpu,cpuacct:/pod/job     (version 1)
        files                  sys/fs/cgroup/{,pod/,pod/job/}cpu.max      sys/fs/cgroup/cpu/{,pod/,pod/job/}...
    """
    lines = [line.split(":", 2) for line in _read(root / "proc/self/cgroup").splitlines()]
    paths = [path for _, controllers, path in lines if controller in controllers.split(",")]
    top = root / "sys/fs/cgroup" / controller
    folders = {top, *(folder for path in paths for folder in _between(top, top / path.lstrip("/")))}
    return [folder / name for folder in folders if (folder / name).is_file()]


def _between(top: Path, folder: Path) -> list[Path]:
    return [each for each in (folder, *folder.parents) if each.is_relative_to(top)]


def _read(file: Path) -> str:
    """The text of a file, empty where there is none."""
    return file.read_text().strip() if file.is_file() else ""
