"""A dedicated process: its cores work on different tiles, torch has one thread in each."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading

import pytest
import torch

from ma_cluster.networks.tile_executor import dedicate


@pytest.fixture(autouse=True)
def _own_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_as_many_items_as_threads_are_worked_on_at_a_time(threads: int) -> None:
    together = threading.Barrier(threads, timeout=20)

    def work(item: int) -> tuple[int, int]:
        together.wait()
        return item, torch.get_num_threads()

    assert list(dedicate(threads)(work, range(6))) == [(item, 1) for item in range(6)]


def test_what_fails_on_an_item_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        list(dedicate(2)(lambda item: 1 // item, [1, 0, 1]))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_memory_that_torch_frees_is_kept() -> None:
    """In processes of their own: pages that the kernel clears for 40 feature maps of 64 MiB, one after the other."""
    script = """
import resource, sys, torch
from ma_cluster.networks.tile_executor import dedicate
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
