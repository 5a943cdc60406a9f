"""What a process may use, as containers of both kinds of cgroup say it, and how it uses that where it is dedicated.

The trees are written out; affinity is real.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ma_cluster.machine import cores, dedicate, memory_bytes, open_ports

HERE = len(os.sched_getaffinity(0))
GIB = 2**30


def tree(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """A file system that holds proc/self/cgroup and some files below sys/fs/cgroup."""
    written = {f"sys/fs/cgroup/{name}": text for name, text in files.items()} | {"proc/self/cgroup": cgroup}
    for name, text in written.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/", {"cpu.max": "100000 100000"}, 1),
        ("0::/", {"cpu.max": "max 100000"}, HERE),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "100000000 100000"}, HERE),
        ("0::/pod/job", {"pod/cpu.max": "150000 100000", "pod/job/cpu.max": "max 100000"}, 1),
        ("0::/../elsewhere", {"cpu.max": "100000 100000"}, 1),
        ("4:cpu,cpuacct:/pod", {"cpu/pod/cpu.cfs_quota_us": "20000", "cpu/pod/cpu.cfs_period_us": "20000"}, 1),
        ("1:cpu:/pod", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, HERE),
        ("1:cpu:/of/host", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
    ],
)
def test_a_cpu_quota_bounds_the_cores(tmp_path: Path, cgroup: str, files: dict[str, str], expected: int) -> None:
    assert cores(tree(tmp_path, cgroup, files)) == expected


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/pod", {"pod/memory.max": str(GIB)}, GIB),
        ("0::/pod", {"pod/memory.max": "max", "memory.max": str(GIB // 2)}, GIB // 2),
        ("4:memory:/pod", {"memory/pod/memory.limit_in_bytes": str(GIB)}, GIB),
        ("4:memory:/", {"memory/memory.limit_in_bytes": str(2**63 - 4096)}, memory_bytes(Path("/nonexistent"))),
    ],
)
def test_a_memory_limit_bounds_the_memory(tmp_path: Path, cgroup: str, files: dict[str, str], expected: int) -> None:
    assert memory_bytes(tree(tmp_path, cgroup, files)) == expected


def test_a_machine_without_cgroups_counts_all_it_has(tmp_path: Path) -> None:
    assert cores(tmp_path) == HERE
    assert memory_bytes(tmp_path) >= GIB


def test_a_process_tied_to_one_core_counts_one() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from ma_cluster.machine import cores; print(cores())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


@pytest.fixture
def own_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_as_many_items_as_threads_are_worked_on_at_a_time(own_threads: None, threads: int) -> None:
    together = threading.Barrier(threads, timeout=20)

    def work(item: int) -> tuple[int, int]:
        together.wait()
        return item, torch.get_num_threads()

    assert list(dedicate(threads)(work, range(6))) == [(item, 1) for item in range(6)]


def test_what_fails_on_an_item_reaches_the_caller(own_threads: None) -> None:
    with pytest.raises(ZeroDivisionError):
        list(dedicate(2)(lambda item: 1 // item, [1, 0, 1]))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_memory_that_torch_frees_is_kept() -> None:
    """In processes of their own: pages that the kernel clears for 40 feature maps of 64 MiB, one after the other."""
    script = """
import resource, sys, torch
from ma_cluster.machine import dedicate
if sys.argv[1:]:
    dedicate(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    command = [sys.executable, "-c", script]
    plain, dedicated = (
        int(subprocess.run([*command, *more], capture_output=True, text=True, check=True).stdout)
        for more in ([], ["dedicate"])
    )
    assert dedicated < 0.6 * plain


def test_ports_that_other_machines_can_reach_are_found_of_a_process_and_what_it_has_started(tmp_path: Path) -> None:
    processes = {10: (1, [500]), 11: (10, [501, 502, 503]), 12: (11, [504, 505, 506]), 13: (1, [507])}
    for pid, (parent, sockets) in processes.items():
        folder = tmp_path / f"proc/{pid}/fd"
        folder.mkdir(parents=True)
        (folder.parent / "stat").write_text(f"{pid} (a (b) c) S {parent} 0 0")
        for socket in sockets:
            (folder / str(socket)).symlink_to(f"socket:[{socket}]")
    rows = {
        "tcp": ["00000000:1F90 0A 500", "0100007F:1F91 0A 501", "020200C0:1F92 0A 502", "020200C0:1F93 01 503"],
        "tcp6": [
            f"{'0' * 32}:1F94 0A 504",
            f"{'0' * 24}01000000:1F95 0A 505",
            f"{'0' * 16}FFFF00000100007F:1F96 0A 506",
        ],
    }
    (tmp_path / "proc/net").mkdir()
    for name, lines in rows.items():
        written = [f"0: {host} 0:0 {state} 0:0 00:0 0 0 0 {inode} 1" for host, state, inode in map(str.split, lines)]
        (tmp_path / "proc/net" / name).write_text("\n".join(["sl local_address ...", *written, ""]))
    assert open_ports(10, tmp_path) == [0x1F90, 0x1F92, 0x1F94]
    assert open_ports(12, tmp_path) == [0x1F94]
    assert open_ports(13, tmp_path) == open_ports(99, tmp_path) == []
