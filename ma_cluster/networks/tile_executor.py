"""A process that has nothing to do but look at photographs: its cores and its memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

_SETTINGS = (("MALLOC_MMAP_THRESHOLD_", -3, 2**30), ("MALLOC_TRIM_THRESHOLD_", -1, 2**30), ("MALLOC_ARENA_MAX", -8, 1))
"""Of glibc's allocator: variable, number in malloc.h, value."""
MALLOC = {variable: str(value) for variable, _, value in _SETTINGS}
"""Environment of a process whose threads are there before `dedicate` is called: they keep the arena that they have."""

TileMap = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""`map`, or one like it that works on several items at a time."""


@dataclass(frozen=True, slots=True)
class TileExecutor:
    """How the tiles of a photograph go through a network."""

    tiles: int = 1
    """In one forward pass. On a CPU one is fastest: it stays in cache."""
    tile_map: TileMap = map
    """Asks for the forward passes."""


ONE_AT_A_TIME = TileExecutor()


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


def _keep_memory() -> None:
    """Settings of glibc's allocator; any other is left as it is."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for _, number, value in _SETTINGS:
            mallopt(number, value)
