"""Decoders that die of marked bytes, for the tests: importable by the children of a `DecodePool`.

A photograph is marked by a word in front of it; what follows the word is left to the real decoder.
"""

from __future__ import annotations

import os
import time

from jaxtyping import UInt8
from numpy import ndarray

from ma_cluster.config import ImageConfig
from ma_cluster.images import decode as real

ABORT, EXIT, HANG, MEMORY, SLEEP = b"#abort#", b"#exit##", b"#hang##", b"#memory", b"#sleep#"
GROSS, OTHER = b"#gross#", b"#other#"


def decode(data: bytes, config: ImageConfig) -> UInt8[ndarray, "h w 3"]:
    """Die, hang or run out of memory where the mark says so."""
    mark = data[: len(ABORT)]
    if mark == ABORT:
        os.abort()
    elif mark == EXIT:
        os._exit(7)
    elif mark == HANG:
        while True:
            pass
    elif mark == SLEEP:
        time.sleep(3600)
    elif mark == MEMORY:
        hoard = []
        while True:
            hoard.append(bytearray(2**24))
    elif mark == GROSS:
        return real.decode(data[len(GROSS) :], config).astype("float32")
    elif mark == OTHER:
        raise RuntimeError("a decoder's own fault")
    return real.decode(data, config)
