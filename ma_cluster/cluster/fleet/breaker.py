"""Tells a broken fleet from bad photographs: crash after crash with no success in between is no photograph's fault.

All worker processes of a run share one count, an actor; `Breaker` stands between a worker and the fleet.
"""

from __future__ import annotations

import uuid
from typing import Any, Protocol, runtime_checkable

import ray

from ma_cluster.archive.shard_scorer import Reading, Scorer, Segmentation
from ma_cluster.errors import FleetBrokenError, WorkerLostError
from ma_cluster.storage.store import Entry


@runtime_checkable
class Count(Protocol):
    """Workers lost since the last success."""

    def lost(self) -> int:
        """One more; returns how many in a row."""

    def won(self) -> None:
        """None any more."""


class PlainCount:
    """A `Count` in this process, for one thread."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def lost(self) -> int:
        self._in_a_row += 1
        return self._in_a_row

    def won(self) -> None:
        self._in_a_row = 0


class SharedCount:
    """A `Count` that processes of a job share, until it is closed. It goes from one to another as a name: of a handle
    among the arguments of an actor Ray complains, on the terminal, that the actor may not start again.
    """

    def __init__(self, name: str | None = None) -> None:
        """The count of that name, or a new one."""
        self._name = name or f"crashes-{uuid.uuid4().hex}"
        # Without a CPU of its own; after its node's death it counts anew.
        known = {"name": self._name, "get_if_exists": True}
        actor = ray.remote(PlainCount).options(num_cpus=0, max_restarts=-1, max_task_retries=-1, **known)
        self._actor: Any = actor.remote()

    def __reduce__(self) -> tuple[type[SharedCount], tuple[str]]:
        return SharedCount, (self._name,)

    def lost(self) -> int:
        in_a_row: int = ray.get(self._actor.lost.remote())
        return in_a_row

    def won(self) -> None:
        ray.get(self._actor.won.remote())  # or it might come after `close`, and Ray would complain of it

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._actor)


class Breaker:
    """A `Scorer` that gives up after `limit` lost workers in a row; a segmented photograph starts the count anew.

    A decoder's death in its child process does not count: it is known to be its photograph's. Threads may share it.
    """

    def __init__(self, scorer: Scorer, count: Count, limit: int) -> None:
        self._scorer, self._count, self._limit = scorer, count, limit
        self._fault: str | None = None

    def read(self, entry: Entry) -> Reading:
        """As the scorer does.

        Raises:
            FleetBrokenError: too many workers were lost in a row, by this photograph or before.
        """
        self._check()
        try:
            return self._scorer.read(entry)
        except WorkerLostError as lost:
            self._note(lost)
            raise

    def segment(self, reading: Reading) -> Segmentation:
        """As the scorer does.

        Raises:
            FleetBrokenError: too many workers were lost in a row, by this photograph or before.
        """
        self._check()
        try:
            segmentation = self._scorer.segment(reading)
        except WorkerLostError as lost:
            self._note(lost)
            raise
        self._count.won()
        return segmentation

    def _note(self, lost: WorkerLostError) -> None:
        if (in_a_row := self._count.lost()) >= self._limit:
            self._fault = f"{in_a_row} workers were lost in a row, the last as {lost.detail}"
            self._check()

    def _check(self) -> None:
        if self._fault is not None:
            raise FleetBrokenError(
                f"{self._fault}; no photograph is the cause of that: see the replicas' logs, look at memory and model, "
                "and give the command again, with --retry-failed"
            )
