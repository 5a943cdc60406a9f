"""How the archives of a service stand, as Prometheus asks: computed at each scrape from what their stores hold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ma_cluster.archive.retry import retries
from ma_cluster.archive.run import Run, committed, read_run
from ma_cluster.archive.summary import PartCounts, count_part, count_parts, total
from ma_cluster.errors import MaClusterError, Status
from ma_cluster.metrics import ARCHIVE_STATE
from ma_cluster.storage.store import Store, open_store

log = logging.getLogger(__name__)


class ArchiveMetrics(Collector):
    """`ma_archive_images{run,status}` and `ma_archive_remaining{run}` of the runs at some destinations."""

    def __init__(self, destinations: Callable[[], Iterable[str]]) -> None:
        self._destinations = destinations
        self._counts: dict[str, _RunCounts] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def describe(self) -> list[Metric]:
        """The families without values: registering must not ask a store."""
        return list(_families())

    def collect(self) -> Iterator[Metric]:
        """One scrape. A run whose store does not answer is left out, so that its series end and an alert can say so."""
        images, remaining = _families()
        for url in self._destinations():
            try:
                known = self._counts.setdefault(url, _RunCounts(open_store(url)))
                run, counts = known.now()
            except MaClusterError as error:
                log.warning("an archive's store does not answer: %s", error)
                continue
            if run is None:
                continue
            for status in Status:
                images.add_metric([run.id, status], counts.statuses[status])
            remaining.add_metric([run.id], run.plan.images - counts.images)
        yield from (images, remaining)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)


class _RunCounts:
    """Counts of one run. A part never changes, so each is read once; with retries all are counted anew as they grow."""

    def __init__(self, dest: Store) -> None:
        self._dest = dest
        self._retried: list[int] = []
        self._parts: set[int] = set()
        self._counts = total(())

    def now(self) -> tuple[Run | None, PartCounts]:
        """The run, None before it is planned, and its counts."""
        run = read_run(self._dest)
        if run is None:
            return None, self._counts
        parts = committed(self._dest)
        retried = [len(committed(parts)) for parts, _ in retries(self._dest)]
        if retried != self._retried or (retried and parts != self._parts):
            self._counts = total(count_parts(self._dest, run))
        elif not retried:
            new = (count_part(self._dest, run, number) for number in sorted(parts - self._parts))
            self._counts = total([self._counts, *new])
        self._parts, self._retried = parts, retried
        return run, self._counts


def _families() -> tuple[GaugeMetricFamily, GaugeMetricFamily]:
    images, remaining = (
        GaugeMetricFamily(metric.name, metric.help, labels=list(metric.labels)) for metric in ARCHIVE_STATE
    )
    return images, remaining
