"""Requests to a server that may break at any byte: how long it may take, and how often it is asked again.

A library that asks again by itself does so until headers are there, but not where the body breaks off, and keeps the
count to itself. So each asks once, and what may pass is tried again here, bodies included.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ma_cluster.errors import StoreError
from ma_cluster.storage.store import check_bytes

_Answer = TypeVar("_Answer")
_PIECE_BYTES = 1024, 65_536  # least and most to read at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkLimits:
    """How long a server may take, and how often it is asked again."""

    connect_s: float = 10.0
    """For a connection, seconds."""
    stall_s: float = 30.0
    """For a reply to begin, and between two bytes of it, seconds."""
    slowest_bytes_per_s: float = 16_384.0
    """A body that is slower, its first `stall_s` aside, is given up: another connection may be faster."""
    deadline_s: float = 240.0
    """For one body; and so long after the first attempt no other begins, seconds."""
    attempts: int = 8
    """Of each request, the first included. A server that has answered before, and cannot be connected to now, is asked
    until `deadline_s`: it is away, where one that never answered has another address."""
    first_pause_s: float = 0.4
    """Before the second attempt; each later pause is twice as long, seconds."""
    longest_pause_s: float = 16.0
    """No pause is longer, seconds: together they outlast the restart of a server."""

    def __post_init__(self) -> None:
        if self.attempts < 1 or min(self.connect_s, self.stall_s, self.deadline_s) <= 0:
            raise ValueError("network limits need one attempt at least, and connect_s, stall_s and deadline_s positive")

    def pause_s(self, attempt: int) -> float:
        """Seconds to wait after an attempt, 1 being the first: half to all of the pause, so that clients spread out."""
        return random.uniform(0.5, 1.0) * min(self.longest_pause_s, self.first_pause_s * 2.0 ** (attempt - 1))


@dataclass(frozen=True, slots=True)
class Faults:
    """What a library raises where a request fails, and what it means."""

    known: tuple[type[Exception], ...]
    """All that a request may raise."""
    away: tuple[type[Exception], ...]
    """Of them, those of a server that cannot be connected to."""
    may_pass: Callable[[Exception], bool]
    """Whether asking again may help."""
    told: Callable[[str, Exception], StoreError]
    """Our error for one, and for what was to be done, such as `read`; its text carries no key."""


class Patience:
    """Asks a server again while a fault may pass and the limits allow. Threads may share it."""

    def __init__(self, limits: NetworkLimits, faults: Faults) -> None:
        self._limits, self._faults = limits, faults
        self._answered = False

    def ask(self, action: str, request: Callable[[], _Answer]) -> _Answer:
        """The answer to a request.

        Raises:
            StoreError: as the last attempt failed.
        """
        faults, attempt, last = self._faults, 1, time.monotonic() + self._limits.deadline_s
        while True:
            try:
                answer = request()
                self._answered = True
                return answer
            except faults.known as error:
                pause_s = self._limits.pause_s(attempt)
                away = self._answered and isinstance(error, faults.away)
                given_up = (attempt >= self._limits.attempts and not away) or time.monotonic() + pause_s > last
                if given_up or not faults.may_pass(error):
                    raise faults.told(action, error) from error
            time.sleep(pause_s)
            attempt += 1


def read_body(body: Any, limits: NetworkLimits, max_bytes: int | None = None) -> bytes:
    """All of a body, which must say by itself where its length or checksum is not what the headers say.

    Each piece is as large as all before it: a slow body is noticed early, and a fast one read in few pieces.

    Raises:
        TimeoutError: it is slower than the limits allow.
        ImageRefusedError: too_large, where it is longer than `max_bytes`.
    """
    began, size, pieces = time.monotonic(), 0, []
    least, most = _PIECE_BYTES
    while piece := body.read(min(most, max(least, size))):
        pieces.append(piece)
        size += len(piece)
        check_bytes(size, max_bytes)
        seconds = time.monotonic() - began
        if seconds > limits.deadline_s or size < (seconds - limits.stall_s) * limits.slowest_bytes_per_s:
            raise TimeoutError(f"{size} bytes in {seconds:.0f} s")
    return b"".join(pieces)
