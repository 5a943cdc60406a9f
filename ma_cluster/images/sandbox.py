"""Decodes bytes that nobody vouches for in expendable child processes, one photograph at a time in each.

    bytes -> [child: header and decoder, under a memory limit and a deadline] -> pixels, through shared memory

A child's death, lateness or exhausted memory is its photograph's alone: the child is killed, another one started. What
a child says is checked and never unpickled, since the bytes may have taken it over; it has none of our credentials.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from ma_cluster.config import ImageConfig
from ma_cluster.errors import Flag, ImageFailedError, ImageRefusedError, Reason, SandboxError
from ma_cluster.images import sandbox_child
from ma_cluster.images.acquisition import acquisition_from
from ma_cluster.images.decode import Decoded

DEFAULT_DECODER = "ma_cluster.images.decode:decode"
_NONSENSE = (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError)
_START_S = 60.0
"""A child that is not ready after this time, on however busy a machine, will never be."""
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV")
"""What a child sees of the environment: no keys of a store, no tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxConfig:
    """What a decoder is given, and which decoder."""

    children: int = 2
    """Child processes of a pool: one that hangs leaves others to go on. An idle one holds about 50 MB."""
    deadline_s: float = 60.0
    """Time for one photograph, seconds. A JPEG of 12 megapixels takes 0.1 s, 80 megapixels of floats 10."""
    memory_bytes: int = 4 * 2**30
    """Address space of a child, bytes; 80 megapixels in the costliest format take 2.6 GiB (measured). Linux enforces
    it, macOS does not."""
    decoder: str = DEFAULT_DECODER
    """Importable name, `module:function`, of (bytes, ImageConfig) -> `Decoded`."""

    def __post_init__(self) -> None:
        if self.children < 1 or self.deadline_s <= 0:
            raise ValueError("sandbox.children must be at least 1 and sandbox.deadline_s positive")
        if self.memory_bytes < 2**29:
            raise ValueError("sandbox.memory_bytes must be at least 2^29: Python and its libraries take half of that")
        if not all(self.decoder.partition(":")):
            raise ValueError("sandbox.decoder is module:function, such as " + DEFAULT_DECODER)


class DecodePool:
    """Children that are up and wait for photographs. Threads may share it."""

    def __init__(self, image: ImageConfig, sandbox: SandboxConfig) -> None:
        """Start the children.

        Raises:
            SandboxError: they do not start, or find no such decoder.
        """
        self._image, self._sandbox = image, sandbox
        children = [_Child(image, sandbox) for _ in range(sandbox.children)]
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        for child in children:
            self._idle.put(child)
        try:
            children[0].wait_until_ready()
        except SandboxError:
            self.close()
            raise

    def decode(self, data: bytes) -> Decoded:
        """Decode a photograph in a child that has nothing else to do, once one is free.

        Raises:
            ImageRefusedError: as the decoder refused it.
            ImageFailedError: crashed_worker or timeout: the decoder died of it, or was late.
            SandboxError: children do not start any more.
        """
        with self._borrowed() as child:
            return child.decode(data)

    def close(self) -> None:
        """Kill the children. No photograph may be under way."""
        for _ in range(self._sandbox.children):
            self._idle.get().kill()

    @contextmanager
    def _borrowed(self) -> Iterator[_Child]:
        child = self._idle.get()
        try:
            if not child.alive:  # somebody killed it while it had nothing: no photograph's fault
                child.kill()
                child = _Child(self._image, self._sandbox)
            yield child
        except ImageRefusedError:  # an answer like any other
            raise
        except BaseException:
            child.kill()
            child = _Child(self._image, self._sandbox)  # loads its modules while the next photograph is fetched
            raise
        finally:
            self._idle.put(child)


class _Child:
    """One process, its socket and the file in memory that it shares with us; all three go with it."""

    def __init__(self, image: ImageConfig, sandbox: SandboxConfig) -> None:
        self._image, self._sandbox, self._ready = image, sandbox, False
        self._shared = _anonymous_file()
        self._line, theirs = socket.socketpair()
        with theirs:
            arguments = (str(theirs.fileno()), str(self._shared))
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", sandbox_child.__name__, *arguments],
                pass_fds=(theirs.fileno(), self._shared),
                stdin=subprocess.DEVNULL,
                env=_environment(),
            )
        sandbox_child.say(self._line, asdict(sandbox) | {"image": asdict(image)})

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_until_ready(self) -> None:
        """Raises: SandboxError: it never is."""
        if self._ready:
            return
        try:
            answer = sandbox_child.hear(self._line, _START_S)
        except (OSError, EOFError, ValueError) as error:
            raise SandboxError(
                f"a decoding process does not start ({type(error).__name__}); its log says more"
            ) from error
        if "fault" in answer:
            raise SandboxError(f"the decoder {self._sandbox.decoder} cannot be loaded: {answer['fault']}")
        self._ready = True

    def decode(self, data: bytes) -> Decoded:
        self.wait_until_ready()
        try:
            sandbox_child.write(self._shared, data)
            sandbox_child.say(self._line, {"bytes": len(data)})
            answer = sandbox_child.hear(self._line, self._sandbox.deadline_s)
            if "reason" in answer:
                raise ImageRefusedError(Reason(answer["reason"]), str(answer["detail"]))
            said = answer["acquisition"]
            acquisition = None if said is None else acquisition_from(said)
            return Decoded(self._pixels(answer), tuple(Flag(name) for name in answer["flags"]), acquisition)
        except TimeoutError as error:
            raise ImageFailedError(Reason.TIMEOUT, f"not decoded within {self._sandbox.deadline_s:g} s") from error
        except _NONSENSE as error:
            raise ImageFailedError(Reason.CRASHED_WORKER, f"the decoder {self._end()} on it") from error

    def kill(self) -> None:
        """End the process, whatever it does, and let go of what we share with it."""
        self._process.kill()
        self._process.wait()
        self._line.close()
        if self._shared >= 0:
            os.close(self._shared)
            self._shared = -1

    def _pixels(self, answer: dict[str, Any]) -> UInt8[ndarray, "h w 3"]:
        height, width = int(answer["height"]), int(answer["width"])
        if min(height, width) < 1 or height * width > self._image.max_pixels:
            raise ValueError(f"{width} x {height} pixels, which the decoder had to refuse")
        pixels = np.frombuffer(sandbox_child.read(self._shared, height * width * 3), np.uint8)
        os.ftruncate(self._shared, 0)
        return pixels.reshape(height, width, 3)

    def _end(self) -> str:
        """How the process ended, in a word or two, for a person."""
        try:
            status = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "broke off"
        return f"died of {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"


def _anonymous_file() -> int:
    """A file in memory without a name: it is gone with the last process that has it open, however that ends."""
    if sys.platform == "linux":
        return os.memfd_create("ma-cluster-photograph")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _environment() -> dict[str, str]:
    kept = {name: value for name in _ENVIRONMENT if (value := os.environ.get(name)) is not None}
    # Threads of a numeric library that nobody uses would only take address space.
    return kept | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
