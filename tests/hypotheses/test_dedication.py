"""A dedicated process: its cores work on different tiles, torch has one thread in each."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading

import pytest
import torch

from ma_cluster.hypotheses.dedication import dedicate


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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_memory_that_torch_frees_is_kept() -> None:
    """In a process of its own: of 40 feature maps of 64 MiB, one after the other, the kernel clears the fewest."""
    script = """
import resource, torch
from ma_cluster.hypotheses.dedication import dedicate
dedicate(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40 / 2 * 2**26 / resource.getpagesize()
