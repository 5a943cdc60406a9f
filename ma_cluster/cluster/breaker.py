"""Tells a broken fleet from bad photographs: crash after crash with no success in between is no photograph's fault."""

from __future__ import annotations

import threading

from ma_cluster.cluster.replicas import Reading, Segmentation
from ma_cluster.cluster.shard_scorer import Scorer
from ma_cluster.errors import FleetBrokenError, WorkerLostError
from ma_cluster.images.store import Entry


class Breaker:
    """A `Scorer` that gives up after `limit` lost workers in a row; a segmented photograph starts the count anew.

    A decoder's death in its child process does not count: it is known to be its photograph's. Threads may share it.
    """

    def __init__(self, scorer: Scorer, limit: int) -> None:
        self._scorer, self._limit, self._in_a_row = scorer, limit, 0
        self._lock = threading.Lock()

    def read(self, entry: Entry) -> Reading:
        """As the scorer does.

        Raises:
            FleetBrokenError: too many workers were lost in a row, by this photograph or before.
        """
        self._check()
        try:
            return self._scorer.read(entry)
        except WorkerLostError as lost:
            self._count(lost)
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
            self._count(lost)
            raise
        with self._lock:
            self._in_a_row = 0
        return segmentation

    def _count(self, lost: WorkerLostError) -> None:
        with self._lock:
            self._in_a_row += 1
        self._check(lost)

    def _check(self, lost: WorkerLostError | None = None) -> None:
        if self._in_a_row >= self._limit:
            detail = f": {lost.detail}" if lost else ""
            raise FleetBrokenError(
                f"{self._in_a_row} workers were lost in a row{detail}; no photograph is the cause of that: see the "
                "replicas' logs, look at memory and model, and give the command again, with --retry-failed"
            )
