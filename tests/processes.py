"""Processes as /proc shows them: enough to find a replica by its title and whatever a killed driver left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Process:
    """One that was alive when looked at. `start` tells it from a later one of the same pid."""

    pid: int
    parent: int
    session: int
    start: int
    title: str


def processes() -> list[Process]:
    """All that live; zombies do not."""
    return [process for path in Path("/proc").glob("[0-9]*") if (process := _look(path)) is not None]


def descendants(pid: int) -> list[Process]:
    """Children of a process, their children, and so on."""
    found, parents, listed = [], {pid}, processes()
    while parents:
        generation = [process for process in listed if process.parent in parents]
        found += generation
        parents = {process.pid for process in generation}
    return found


def wait_until_gone(gone: Collection[Process], timeout_s: float) -> list[Process]:
    """Those that still live when the time is over."""
    deadline = time.monotonic() + timeout_s
    while (left := _living(gone)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def kill(doomed: Collection[Process]) -> None:
    """SIGKILL to those that still live."""
    for process in _living(doomed):
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _living(wanted: Collection[Process]) -> list[Process]:
    living = {(process.pid, process.start) for process in processes()}
    return [process for process in wanted if (process.pid, process.start) in living]


def _look(path: Path) -> Process | None:
    try:
        title = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        fields = (path / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # it ended while we looked
        return None
    state, parent, session, start = fields[0], int(fields[1]), int(fields[3]), int(fields[19])
    return None if state == "Z" else Process(int(path.name), parent, session, start, title)
