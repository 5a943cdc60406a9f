"""What `ma-cluster top` shows: pages of metrics, read twice -> rates, counts and stage times -> tables for a terminal.

A page is Prometheus's text format. Ray's exporters write it, and a Prometheus hands on under /federate what it scraped
last, so both are read alike; rates are always taken between two pages of this process.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ma_cluster import metrics
from ma_cluster.errors import MaClusterError
from ma_cluster.metrics import Metric

PREFIXES = ("ray_ma_", "ma_archive_")
"""Beginnings of the names of our metrics on a page."""
Labels = frozenset[tuple[str, str]]
_TIMEOUT_S = 10.0
_NONE = "-"
_STATUSES = metrics.IMAGES.labels["status"]


@dataclass(frozen=True, slots=True)
class Page:
    """All our samples at a moment, of all exporters."""

    at_s: float
    """When it was read, seconds on a monotonic clock."""
    samples: Mapping[tuple[str, Labels], float]

    def series(self, metric: Metric, suffix: str = "", **labels: str) -> Iterator[tuple[str, Labels]]:
        """The series of a metric that have some labels."""
        name = exported(metric) + suffix
        return (series for series in self.samples if series[0] == name and labels.items() <= series[1])

    def total(self, metric: Metric, suffix: str = "", **labels: str) -> float | None:
        """Sum over the series of a metric that have some labels; None where there is none.

        How an archive stands is told by each proxy of the service alike, and counts once.
        """
        values = dict[Labels, float]()
        for series in self.series(metric, suffix, **labels):
            pairs = series[1]
            if metric in metrics.ARCHIVE_STATE:
                pairs = frozenset(pair for pair in pairs if pair[0] in metric.labels)
            values[pairs] = max(self.samples[series], values.get(pairs, -math.inf))
        return math.fsum(values.values()) if values else None

    def values_of(self, metric: Metric, label: str) -> list[str]:
        """Values of a label, sorted."""
        return sorted({dict(labels)[label] for _, labels in self.series(metric)})


@dataclass(frozen=True, slots=True)
class View:
    """Two pages, and what changed between them."""

    before: Page
    now: Page

    @property
    def seconds(self) -> float:
        """Time between the two pages."""
        return self.now.at_s - self.before.at_s

    def rate(self, metric: Metric, **labels: str) -> float | None:
        """Increase of a counter, per second; None where it does not exist.

        A series that was not there before has counted from 0; one that went down began anew.
        """
        increases = []
        for series in self.now.series(metric, **labels):
            value, was = self.now.samples[series], self.before.samples.get(series, 0.0)
            increases.append(value - was if value >= was else value)
        return math.fsum(increases) / self.seconds if increases and self.seconds > 0 else None


def read_page(prometheus: str | None = None) -> Page:
    """Our metrics now: from a Prometheus by its URL, or from the exporters of the Ray that was started last here.

    Exporters that do not answer are left out: Ray lists a lost node for a while.

    Raises:
        MaClusterError: none answers.
    """
    if prometheus is None:
        urls, place, cure = _local_exporters(), "this machine's Ray", "is it still up? Or name a --prometheus"
    else:
        match = '{__name__=~"' + "|".join(f"{prefix}.+" for prefix in PREFIXES) + '"}'
        urls = [f"{prometheus.rstrip('/')}/federate?{urlencode({'match[]': match})}"]
        place, cure = prometheus, "start a Prometheus with `make monitor`"
    samples: dict[tuple[str, Labels], float] = {}
    failures = []
    for url in urls:
        try:
            with urlopen(url, timeout=_TIMEOUT_S) as answer:
                samples |= parse(answer.read().decode())
        except (OSError, HTTPException, ValueError) as error:  # ValueError: no URL, or a page of something else
            failures.append(str(error))
    if len(failures) == len(urls):
        raise MaClusterError(f"no metrics from {place} ({'; '.join(failures) or 'no exporters'}); {cure}")
    return Page(time.monotonic(), samples)


def parse(text: str) -> dict[tuple[str, Labels], float]:
    """Our samples on a page; lines of other metrics, which are most, are left out unread.

    Raises:
        ValueError: a line is not of the format.
    """
    ours = "".join(f"{line}\n" for line in text.splitlines() if line.startswith(PREFIXES))
    families = text_string_to_metric_families(ours)
    return {(each.name, frozenset(each.labels.items())): each.value for family in families for each in family.samples}


def _local_exporters() -> list[str]:
    """The exporters in the file in which Ray lists them for Prometheus."""
    listed = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray/session_latest/prom_metrics_service_discovery.json")
    try:
        groups = json.loads(listed.read_text())
        return [f"http://{target}/metrics" for group in groups for target in group["targets"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        cure = "start a run on this machine, or name a --prometheus"
        raise MaClusterError(f"{listed} lists no exporters ({type(error).__name__}); {cure}") from error


def exported(metric: Metric) -> str:
    """A metric's name on a page."""
    return metric.name if metric in metrics.ARCHIVE_STATE else f"ray_{metric.name}"


def quantile(share: float, buckets: Sequence[tuple[float, float]]) -> float:
    """A quantile of a histogram, interpolated within its bucket as PromQL's histogram_quantile does.

    Args:
        share: 0..1.
        buckets: upper end and count of all values up to it, ascending; the last end is infinite.
    """
    rank = share * buckets[-1][1]
    lower, below = 0.0, 0.0
    for upper, count in buckets:
        if count >= rank and count > below:
            return lower if math.isinf(upper) else lower + (upper - lower) * (rank - below) / (count - below)
        lower, below = (lower if math.isinf(upper) else upper), count
    return lower


def frame(view: View) -> RenderableType:
    """Everything there is to see, as rich draws it; a word where there is nothing yet."""
    tables = [table for build in (_archives, _runs, _stages, _refusals, _training, _ledger) for table in build(view)]
    if not tables:
        return Text("no Ray that is up here has scored a photograph or trained")
    return Group(*tables, Text(f"rates over the last {view.seconds:.0f} s", style="dim"))


def _archives(view: View) -> Iterator[Table]:
    now = view.now
    row = (
        _number(view.rate(metrics.IMAGES)),
        _number(view.rate(metrics.MEGAPIXELS)),
        _count(now.total(metrics.IN_FLIGHT)),
        _count(now.total(metrics.LESIONS)),
        *(_count(now.total(metrics.IMAGES, status=status)) for status in _STATUSES),
    )
    columns = ("photographs/s", "megapixels/s", "in flight", "lesions", *_STATUSES)
    yield from _table("archives", columns, [row] if now.total(metrics.IMAGES) is not None else [])


def _runs(view: View) -> Iterator[Table]:
    rows = []
    for run in view.now.values_of(metrics.ARCHIVE_REMAINING, "run"):
        decided = (view.now.total(metrics.ARCHIVE_IMAGES, run=run, status=status) for status in _STATUSES)
        rows.append((run, *map(_count, (view.now.total(metrics.ARCHIVE_REMAINING, run=run), *decided))))
    yield from _table("of the service", ("run", "remaining", *_STATUSES), rows)


def _stages(view: View) -> Iterator[Table]:
    rows = []
    for stage in metrics.STAGE_SECONDS.labels["stage"]:
        count, seconds = (view.now.total(metrics.STAGE_SECONDS, part, stage=stage) for part in ("_count", "_sum"))
        if count and seconds is not None:
            p95 = quantile(0.95, _buckets(view.now, stage))
            rows.append((stage, _count(count), _number(seconds / count), _number(p95)))
    yield from _table("stage times", ("stage", "photographs", "mean, s", "p95, s"), rows)


def _buckets(page: Page, stage: str) -> list[tuple[float, float]]:
    """Upper end and count of a stage's buckets, summed over the processes that it ran in."""
    counts: dict[float, float] = {}
    for series in page.series(metrics.STAGE_SECONDS, "_bucket", stage=stage):
        end = float(dict(series[1])["le"])
        counts[end] = counts.get(end, 0.0) + page.samples[series]
    return sorted(counts.items())


def _refusals(view: View) -> Iterator[Table]:
    counts = {reason: view.now.total(metrics.REFUSED, reason=reason) for reason in metrics.REFUSED.labels["reason"]}
    rows = [
        (reason, _count(count), _number(view.rate(metrics.REFUSED, reason=reason)))
        for reason, count in counts.items()
        if count and count >= 1
    ]
    yield from _table("refused and failed", ("reason", "photographs", "photographs/s"), rows)


def _training(view: View) -> Iterator[Table]:
    terms, rows = metrics.TRAIN_LOSS.labels["term"], []
    for stage in view.now.values_of(metrics.TRAIN_PATCHES, "stage"):
        workers = len(list(view.now.series(metrics.TRAIN_WAIT, stage=stage)))
        waiting = view.rate(metrics.TRAIN_WAIT, stage=stage)
        patches, share = view.rate(metrics.TRAIN_PATCHES, stage=stage), waiting and waiting / workers
        losses = (view.now.total(metrics.TRAIN_LOSS, stage=stage, term=term) for term in terms)
        figures = map(_number, (*losses, view.now.total(metrics.VALIDATION_AUPR, stage=stage)))
        rows.append((stage, _number(patches), _NONE if share is None else f"{share:.0%}", *figures))
    yield from _table("training", ("network", "patches/s", "waiting", *terms, "validation AUPR"), rows)


def _ledger(view: View) -> Iterator[Table]:
    sizes, means = (
        {labels: view.now.samples[name, labels] for name, labels in view.now.series(metric)}
        for metric in (metrics.LEDGER_PATCHES, metrics.LEDGER_LOSS_MEAN)
    )
    patches, rows = math.fsum(sizes.values()), []
    if patches:
        mean = math.fsum(means[shard] * size for shard, size in sizes.items() if shard in means) / patches
        rates = (view.rate(metrics.LEDGER_UPDATES), view.rate(metrics.LEDGER_DRAWS))
        rows.append((_count(patches), *map(_number, (mean, *rates))))
    yield from _table("loss ledger", ("patches", "mean loss", "updates/s", "draws/s"), rows)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[Table]:
    """A table; none without rows."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in ("run", "stage", "reason", "network") else "right")
    for row in rows:
        table.add_row(*row)
    if table.row_count:
        yield table


def _count(value: float | None) -> str:
    return _NONE if value is None else f"{value:,.0f}"


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3g}"
