"""What `ma-cluster top` shows: pages of metrics, read twice -> rates, counts and stage times -> tables for a terminal.

A page is Prometheus's text format, be it of Ray's own exporters or of a Prometheus, whose `/federate` hands on what it
scraped last. So both are read alike, and rates are always taken between two pages of this process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ma_cluster import metrics
from ma_cluster.metrics import Metric

PREFIXES = ("ray_ma_", "ma_archive_")
"""What our metrics begin with."""
Labels = frozenset[tuple[str, str]]
_NONE = "-"


@dataclass(frozen=True, slots=True)
class Page:
    """All our samples at a moment, of all exporters."""

    at_s: float
    """On a clock that only ever goes forward."""
    samples: Mapping[tuple[str, Labels], float]

    @classmethod
    def parse(cls, at_s: float, texts: Iterable[str]) -> Page:
        """From the texts of some exporters; lines of other metrics, which are most, are left out unread.

        Raises:
            ValueError: a line is not of the format.
        """
        samples: dict[tuple[str, Labels], float] = {}
        for text in texts:
            ours = "".join(f"{line}\n" for line in text.splitlines() if line.startswith(PREFIXES))
            for family in text_string_to_metric_families(ours):
                samples |= {(sample.name, frozenset(sample.labels.items())): sample.value for sample in family.samples}
        return cls(at_s, samples)

    def total(self, metric: Metric, suffix: str = "", **labels: str) -> float | None:
        """Sum over the series of a metric that have some labels; None where there is none."""
        values = [self.samples[series] for series in self.series(metric, suffix, **labels)]
        return math.fsum(values) if values else None

    def series(self, metric: Metric, suffix: str = "", **labels: str) -> Iterator[tuple[str, Labels]]:
        """The series of a metric that have some labels."""
        name = exported(metric) + suffix
        return (series for series in self.samples if series[0] == name and labels.items() <= series[1])

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
        """Between the two."""
        return self.now.at_s - self.before.at_s

    def rate(self, metric: Metric, suffix: str = "", **labels: str) -> float | None:
        """Increase of a counter, per second; None where it does not exist.

        A series that was not there before has counted from 0; one that went down began anew.
        """
        increases = []
        for series in self.now.series(metric, suffix, **labels):
            value, was = self.now.samples[series], self.before.samples.get(series, 0.0)
            increases.append(value - was if value >= was else value)
        return math.fsum(increases) / self.seconds if increases and self.seconds > 0 else None


def exported(metric: Metric) -> str:
    """A metric's name on a page."""
    return metric.name if metric in metrics.ARCHIVE_STATE else f"ray_{metric.name}"


def quantile(share: float, buckets: Sequence[tuple[float, float]]) -> float:
    """Of a histogram, interpolated within its bucket as PromQL's histogram_quantile does.

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
    parts = [table for build in (_archives, _runs, _stages, _refusals, _training, _ledger) if (table := build(view))]
    if not parts:
        return Text("no Ray that is up here has scored a photograph or trained")
    return Group(*parts, Text(f"rates over the last {view.seconds:.0f} s", style="dim"))


def _archives(view: View) -> Table | None:
    if view.now.total(metrics.IMAGES) is None:
        return None
    table = _table("archives", "photographs/s", "megapixels/s", "in flight", "lesions", *_statuses())
    table.add_row(
        _number(view.rate(metrics.IMAGES)),
        _number(view.rate(metrics.MEGAPIXELS)),
        _count(view.now.total(metrics.IN_FLIGHT)),
        _count(view.now.total(metrics.LESIONS)),
        *(_count(view.now.total(metrics.IMAGES, status=status)) for status in _statuses()),
    )
    return table


def _runs(view: View) -> Table | None:
    runs = view.now.values_of(metrics.ARCHIVE_REMAINING, "run")
    table = _table("of the service", "run", "remaining", *_statuses())
    for run in runs:
        decided = [view.now.total(metrics.ARCHIVE_IMAGES, run=run, status=status) for status in _statuses()]
        table.add_row(run, _count(view.now.total(metrics.ARCHIVE_REMAINING, run=run)), *map(_count, decided))
    return table if runs else None


def _stages(view: View) -> Table | None:
    table = _table("stage times", "stage", "photographs", "mean, s", "p95, s")
    for stage in metrics.STAGE_SECONDS.labels["stage"]:
        count = view.now.total(metrics.STAGE_SECONDS, "_count", stage=stage)
        seconds = view.now.total(metrics.STAGE_SECONDS, "_sum", stage=stage)
        if count and seconds is not None:
            p95 = quantile(0.95, _buckets(view.now, stage))
            table.add_row(stage, _count(count), _number(seconds / count), _number(p95))
    return table if table.row_count else None


def _buckets(page: Page, stage: str) -> list[tuple[float, float]]:
    counts: dict[float, float] = {}
    for series in page.series(metrics.STAGE_SECONDS, "_bucket", stage=stage):
        end = float(dict(series[1])["le"])
        counts[end] = counts.get(end, 0.0) + page.samples[series]
    return sorted(counts.items())


def _refusals(view: View) -> Table | None:
    table = _table("refused and failed", "reason", "photographs", "photographs/s")
    for reason in metrics.REFUSED.labels["reason"]:
        count = view.now.total(metrics.REFUSED, reason=reason)
        if count and count >= 1:
            table.add_row(reason, _count(count), _number(view.rate(metrics.REFUSED, reason=reason)))
    return table if table.row_count else None


def _training(view: View) -> Table | None:
    terms = metrics.TRAIN_LOSS.labels["term"]
    table = _table("training", "network", "patches/s", "waiting", *terms, "validation AUPR")
    for stage in view.now.values_of(metrics.TRAIN_PATCHES, "stage"):
        workers = len(list(view.now.series(metrics.TRAIN_WAIT, stage=stage)))
        waiting = view.rate(metrics.TRAIN_WAIT, stage=stage)
        table.add_row(
            stage,
            _number(view.rate(metrics.TRAIN_PATCHES, stage=stage)),
            _NONE if waiting is None else f"{waiting / workers:.0%}",
            *(_number(view.now.total(metrics.TRAIN_LOSS, stage=stage, term=term)) for term in terms),
            _number(view.now.total(metrics.VALIDATION_AUPR, stage=stage)),
        )
    return table if table.row_count else None


def _ledger(view: View) -> Table | None:
    patches = view.now.total(metrics.LEDGER_PATCHES)
    if not patches:
        return None
    means, sizes = (
        {labels: view.now.samples[name, labels] for name, labels in view.now.series(metric)}
        for metric in (metrics.LEDGER_LOSS_MEAN, metrics.LEDGER_PATCHES)
    )
    mean = math.fsum(means[shard] * size for shard, size in sizes.items() if shard in means) / patches
    table = _table("loss ledger", "patches", "mean loss", "updates/s", "draws/s")
    rates = (view.rate(metrics.LEDGER_UPDATES), view.rate(metrics.LEDGER_DRAWS))
    table.add_row(_count(patches), _number(mean), *map(_number, rates))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in ("run", "stage", "reason", "network") else "right")
    return table


def _statuses() -> tuple[str, ...]:
    return metrics.IMAGES.labels["status"]


def _count(value: float | None) -> str:
    return _NONE if value is None else f"{value:,.0f}"


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3g}"
