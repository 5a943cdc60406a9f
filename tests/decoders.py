"""Decoders that die of marked bytes, for the tests: importable by the children of a `DecodePool`.

A photograph is marked by a word in front of it; what follows the word is left to the real decoder.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np

from ma_cluster.config import ImageConfig
from ma_cluster.images import decode as real
from ma_cluster.images.decode import Decoded

ABORT, EXIT, HANG, MEMORY, SLEEP = b"#abort#", b"#exit##", b"#hang##", b"#memory", b"#sleep#"
GROSS, OTHER, WHILE = b"#gross#", b"#other#", b"#while#"
"""WHILE is followed by a path and a line's end: the decoder aborts while there is such a file."""


def decode(data: bytes, config: ImageConfig) -> Decoded:
    """Die, hang or run out of memory where the mark says so."""
    mark, rest = data[: len(ABORT)], data[len(ABORT) :]
    return _DEATHS[mark](rest, config) if mark in _DEATHS else real.decode(data, config)


def _hang() -> NoReturn:
    while True:
        pass


def _take_all_memory() -> NoReturn:
    hoard = []
    while True:
        hoard.append(np.empty(2**26, np.uint8))


def _fail() -> NoReturn:
    raise RuntimeError("a decoder's own fault")


def _abort_while_there_is_a_file(rest: bytes, config: ImageConfig) -> Decoded:
    path, _, photograph = rest.partition(b"\n")
    if Path(os.fsdecode(path)).exists():
        os.abort()
    return real.decode(photograph, config)


_DEATHS: dict[bytes, Callable[[bytes, ImageConfig], Any]] = {
    ABORT: lambda rest, config: os.abort(),
    EXIT: lambda rest, config: os._exit(7),
    HANG: lambda rest, config: _hang(),
    SLEEP: lambda rest, config: time.sleep(3600),
    MEMORY: lambda rest, config: _take_all_memory(),
    OTHER: lambda rest, config: _fail(),
    GROSS: lambda rest, config: SimpleNamespace(pixels=real.decode(rest, config).pixels.astype("float32")),
    WHILE: _abort_while_there_is_a_file,
}
