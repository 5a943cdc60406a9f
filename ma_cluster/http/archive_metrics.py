"""How the archives of a service stand, as Prometheus asks: computed at each scrape from what their stores hold.

`Looks` asks many destinations at a time, so that one whose store is down hides no other.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ma_cluster.archive.retry import retries
from ma_cluster.archive.run import Run, committed, read_run
from ma_cluster.archive.summary import Counts, count_part, count_parts
from ma_cluster.errors import MaClusterError, Status, StoreError
from ma_cluster.metrics import ARCHIVE_STATE
from ma_cluster.storage.store import Store, open_store

log = logging.getLogger(__name__)
_Found = TypeVar("_Found")
_LOOKS = 8  # at destinations of one store at a time
_WITHIN_S = 5.0  # less than Prometheus waits for a scrape


class Looks(Generic[_Found]):
    """Looks at destinations, for some seconds at most. Each store has threads of its own: one that is down, and takes
    minutes to say so, holds up no other, and is not asked again meanwhile.
    """

    def __init__(self, look: Callable[[str], _Found], within_s: float = _WITHIN_S) -> None:
        self._look, self._within_s = look, within_s
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._under_way: dict[str, Future[_Found]] = {}
        self._beginning = threading.Lock()

    def __call__(self, urls: Iterable[str]) -> dict[str, _Found | MaClusterError]:
        """What is found at each URL, or why nothing is."""
        with self._beginning:
            looks = {url: self._begun(url) for url in urls}
        wait(looks.values(), self._within_s)
        return {url: self._found(look) for url, look in looks.items()}

    def _begun(self, url: str) -> Future[_Found]:
        under_way = self._under_way.get(url)
        if under_way is None or under_way.done():
            store = "/".join(url.split("/")[:3]) if "://" in url else "local"
            threads = self._threads.setdefault(store, ThreadPoolExecutor(_LOOKS))
            under_way = self._under_way[url] = threads.submit(self._look, url)
        return under_way

    def _found(self, look: Future[_Found]) -> _Found | MaClusterError:
        if not look.done():
            return StoreError(f"its store did not answer within {self._within_s:g} s")
        error = look.exception()
        if error is None:
            return look.result()
        if isinstance(error, MaClusterError):
            return error
        log.error("a destination was looked at in vain", exc_info=error)
        return StoreError("its destination cannot be read; the service's log says more")


class ArchiveMetrics(Collector):
    """`ma_archive_images{run,status}`, `ma_archive_remaining{run}` and `ma_archive_ungradable{run}` of the runs at some
    destinations."""

    def __init__(self, destinations: Callable[[], Iterable[str]]) -> None:
        self._destinations = destinations
        self._counts: dict[str, _RunCounts] = {}
        self._looks = Looks(self._count)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def describe(self) -> list[Metric]:
        """The families without values: registering must not ask a store."""
        return list(_families())

    def collect(self) -> Iterator[Metric]:
        """One scrape. A run whose store does not answer is left out, so that its series end and an alert can say so."""
        images, remaining, ungradable = _families()
        for counted in self._looks(set(self._destinations())).values():
            if isinstance(counted, MaClusterError):
                log.warning("an archive is not counted: %s", counted)
                continue
            run, counts = counted
            if run is None:
                continue
            for status in Status:
                images.add_metric([run.id, status], counts.statuses[status])
            remaining.add_metric([run.id], run.plan.images - counts.images)
            ungradable.add_metric([run.id], counts.ungradable)
        yield from (images, remaining, ungradable)

    def _count(self, url: str) -> tuple[Run | None, Counts]:
        return self._counts.setdefault(url, _RunCounts(open_store(url))).now()

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)


class _RunCounts:
    """Counts at one destination. A part never changes, so each is read once; with retries all are counted anew as they
    grow, and so they are where another run has taken the place of the first.
    """

    def __init__(self, dest: Store) -> None:
        self._dest = dest
        self._begun: str | None = None
        self._retried: list[int] = []
        self._parts: set[int] = set()
        self._counts = Counts()

    def now(self) -> tuple[Run | None, Counts]:
        """The run, None before it is planned, and its counts."""
        run = read_run(self._dest)
        if run is None:
            return None, self._counts
        if run.started != self._begun:
            self._begun, self._retried, self._parts, self._counts = run.started, [], set(), Counts()
        parts = committed(self._dest)
        retried = [len(committed(parts)) for parts, _ in retries(self._dest)]
        if retried != self._retried or (retried and parts != self._parts):
            self._counts = sum(count_parts(self._dest, run), Counts())
        elif not retried:
            new = (count_part(self._dest, run, number) for number in sorted(parts - self._parts))
            self._counts = sum(new, self._counts)
        self._parts, self._retried = parts, retried
        return run, self._counts


def _families() -> tuple[GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily]:
    images, remaining, ungradable = (
        GaugeMetricFamily(metric.name, metric.help, labels=list(metric.labels)) for metric in ARCHIVE_STATE
    )
    return images, remaining, ungradable
