"""The child process of a `DecodePool`: bytes from a shared file -> pixels into it, one photograph at a time.

Parent and child say lines of JSON to each other through a socket; nothing is ever unpickled. The child loads neither
torch nor Ray nor OpenCV, so that a new one is ready in a fraction of a second.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ma_cluster.config import ImageConfig
from ma_cluster.errors import ImageRefusedError

if TYPE_CHECKING:
    from ma_cluster.images.decode import Decoded

_LONGEST_LINE = 64 * 2**10  # bytes
_PARENT_FIRST_S = 1.0  # the parent, where it lives, kills first


def main() -> None:
    """Decode until the parent closes its end. `python -m ma_cluster.images.sandbox_child SOCKET SHARED_FILE`"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of a terminal; the parent ends its children
    line, shared = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    try:
        setup = hear(line)
        _limit(setup["memory_bytes"])
        try:
            decode = _import(setup["decoder"])
        except (ImportError, AttributeError, ValueError) as error:
            say(line, {"fault": f"{type(error).__name__}: {error}"})
            return
        say(line, {"ready": True})
        config = ImageConfig(**setup["image"])
        while True:
            _answer(line, shared, lambda data: decode(data, config), setup["deadline_s"])
    except (EOFError, ConnectionError):
        return


def _answer(line: socket.socket, shared: int, decode: Callable[[bytes], Decoded], deadline_s: float) -> None:
    """Wait for one photograph and decode it. Whatever is no refusal ends this process, and the parent sees that."""
    size = hear(line)["bytes"]
    # The kernel ends this process if nobody else does: not even a parent's death leaves an endless loop behind.
    signal.alarm(math.ceil(deadline_s + _PARENT_FIRST_S))
    try:
        decoded = decode(bytes(read(shared, size)))
    except ImageRefusedError as refusal:
        say(line, {"reason": refusal.reason.value, "detail": refusal.detail})
    else:
        pixels = np.ascontiguousarray(decoded.pixels)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise TypeError(f"the decoder gave {pixels.dtype} of shape {pixels.shape}, not uint8 of (h, w, 3)")
        write(shared, pixels.data.cast("B"))
        said = None if decoded.acquisition is None else decoded.acquisition.to_values()
        size = {"height": pixels.shape[0], "width": pixels.shape[1]}
        say(line, size | {"flags": decoded.flags, "acquisition": said})
    signal.alarm(0)


def say(line: socket.socket, message: dict[str, Any]) -> None:
    """Send one short message; the socket's buffer takes it though nobody listens."""
    line.sendall(json.dumps(message).encode() + b"\n")


def hear(line: socket.socket, timeout_s: float | None = None) -> dict[str, Any]:
    """The next message, which must come whole within `timeout_s`.

    Raises:
        TimeoutError: it did not.
        EOFError: the other end is closed.
        ValueError: it is no message.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    text = b""
    while not text.endswith(b"\n"):
        line.settimeout(None if deadline is None else max(deadline - time.monotonic(), 1e-3))
        part = line.recv(_LONGEST_LINE)
        if not part:
            raise EOFError("the other end is closed")
        text += part
        if len(text) > _LONGEST_LINE:
            raise ValueError(f"a message of more than {_LONGEST_LINE} bytes")
    message = json.loads(text)
    if not isinstance(message, dict):
        raise ValueError("a message is a JSON object")
    return message


def write(shared: int, data: bytes | memoryview) -> None:
    """Make `data` all that the shared file holds."""
    os.ftruncate(shared, 0)
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(shared, view[done:], done)


def read(shared: int, size: int) -> bytearray:
    """The first bytes of the shared file. Read, not mapped: the other side could cut a mapping short under us.

    Raises:
        EOFError: it holds fewer.
    """
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        count = os.preadv(shared, [view[done:]], done)
        if count == 0:
            raise EOFError("the shared file is too short")
        done += count
    return data


def _limit(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold a patient's photograph


def _import(name: str) -> Callable[[bytes, ImageConfig], Decoded]:
    module, _, function = name.partition(":")
    found: Callable[[bytes, ImageConfig], Decoded] = getattr(importlib.import_module(module), function)
    return found


if __name__ == "__main__":
    main()
