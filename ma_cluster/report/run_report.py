"""An archive run as people look at it: a page, DEST/report/index.html, and its masks against reference masks.

The page comes from the outcomes in the store alone: what was counted, how long it took, why photographs were refused,
and the overlays with the most lesions first. A key is somebody else's text: the template escapes all that it shows.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count, pairwise
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np

from ma_cluster.archive.retry import latest_outcomes
from ma_cluster.archive.run import Run
from ma_cluster.archive.summary import COUNTED, RunStatus, count_outcomes, open_run, status_of
from ma_cluster.config import SplitConfig
from ma_cluster.errors import Status, UsageError
from ma_cluster.evaluation.agreement import Agreement, agree
from ma_cluster.images.datasets import Sample, decode_mask, read_dataset, read_object
from ma_cluster.storage.store import Store

INDEX = "report/index.html"
_SHOWN = 120
"""Photographs of each kind on the page: a browser holds so many overlays, a person looks at fewer."""
_TRIAGE = {"none": "no referral", "refer": "to refer", "ungradable": "ungradable, not referred", None: "no triage"}
_LESION_BINS = (0, 1, 2, 3, 5, 10, 20, 50, 100)
_COLUMNS = [
    "status",
    "reason",
    "detail",
    "attempts",
    "lesion_count",
    "triage",
    "image_score",
    "overlay_key",
    "gradable",
    "quality",
]


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a chart: what it counts, how many, and its length over the longest."""

    label: str
    value: str
    share: float


@dataclass
class Digest:
    """What the page shows of a run's outcomes, gathered part by part."""

    most: list[tuple[int, int, dict[str, Any]]] = field(default_factory=list)
    """A heap of (lesions, order of arrival, row)."""
    ungradable: list[tuple[float, int, dict[str, Any]]] = field(default_factory=list)
    """A heap of (lack of quality, order of arrival, row)."""
    unscored: list[dict[str, Any]] = field(default_factory=list)
    unscored_in_all: int = 0
    lesion_counts: np.ndarray = field(default_factory=lambda: np.zeros(len(_LESION_BINS), np.int64))
    _arrival: Iterator[int] = field(default_factory=lambda: count(0, -1))

    def add(self, row: dict[str, Any]) -> None:
        """Take one photograph's outcome."""
        if row["status"] != Status.SCORED:
            self.unscored_in_all += 1
            if len(self.unscored) < _SHOWN:
                self.unscored.append(row)
            return
        _keep(self.most, (row["lesion_count"], next(self._arrival), row))
        if row["gradable"] is False:
            _keep(self.ungradable, (-row["quality"], next(self._arrival), row))
        else:
            self.lesion_counts[np.searchsorted(_LESION_BINS, row["lesion_count"], side="right") - 1] += 1

    def photographs(self) -> list[dict[str, Any]]:
        """Those with the most lesions, most first."""
        return _shown(self.most)

    def worst(self) -> list[dict[str, Any]]:
        """The ungradable ones, the worst first."""
        return _shown(self.ungradable)

    def lesion_bars(self) -> list[Bar]:
        """How many gradable photographs have how many lesions."""
        last = len(_LESION_BINS) - 1
        ends = [
            str(first) if first + 1 == after else f"{first} to {after - 1}" for first, after in pairwise(_LESION_BINS)
        ]
        return _bars([*ends, f"{_LESION_BINS[last]} or more"], self.lesion_counts.tolist(), "{:,}")


def _keep(heap: list[tuple[Any, int, dict[str, Any]]], item: tuple[Any, int, dict[str, Any]]) -> None:
    push = heapq.heappush if len(heap) < _SHOWN else heapq.heappushpop
    push(heap, item)


def _shown(heap: list[tuple[Any, int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of a heap, largest first, with what is said below each overlay."""
    return [row | {"overlay": quote(row["overlay_key"]), "seen": _seen(row)} for *_, row in sorted(heap, reverse=True)]


def _seen(row: dict[str, Any]) -> str:
    score = "" if row["image_score"] is None else f" (image score {row['image_score']:.2f})"
    return f"{_TRIAGE[row['triage']]}{score}, {row['detail'] or 'gradable'}"


def write_report(dest_url: str) -> str:
    """Write the page of a run, finished or not, and return its URL; an earlier one is replaced.

    Raises:
        UsageError: there is no run.
        StoreError: an outcome cannot be read, or the page not be written.
    """
    dest, run = open_run(dest_url)
    digest, parts = Digest(), []
    for table in latest_outcomes(dest, run, [*_COLUMNS, *(name for name in COUNTED if name not in _COLUMNS)]):
        parts.append(count_outcomes(table))
        for row in table.select(["key", *_COLUMNS]).to_pylist():
            digest.add(row)
    dest.put(INDEX, render(status_of(dest, run, parts), digest).encode())
    return f"{dest.url}/{INDEX}"


def render(status: RunStatus, digest: Digest) -> str:
    """The page as HTML. It loads nothing but the overlays, by paths relative to itself."""
    loader = jinja2.PackageLoader("ma_cluster.report")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    reasons = _bars(list(status.counts.reasons), list(status.counts.reasons.values()), "{:,}")
    stages = _bars(list(status.counts.seconds), list(status.counts.seconds.values()), "{:,.1f} s")
    flags = _bars(list(status.counts.flags), list(status.counts.flags.values()), "{:,}")
    page: str = environment.get_template("run.html").render(
        status=status,
        digest=digest,
        reasons=reasons,
        stages=stages,
        flags=flags,
        triage=_TRIAGE,
        written=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return page


def _bars(labels: Sequence[str], values: Sequence[float | int], form: str) -> list[Bar]:
    longest = max(values, default=0) or 1
    return [Bar(label, form.format(value), value / longest) for label, value in zip(labels, values, strict=True)]


def compare_run(dest_url: str, data_url: str) -> Agreement:
    """Pool the agreement over the data set's test split, photographs matched by the stem of their name.

    Raises:
        UsageError: there is no run, the data set has no test split, or a stem is not unique in the run.
        StoreError: a mask cannot be read.
    """
    samples = [sample for sample in read_dataset(data_url, SplitConfig()) if sample.split == "test"]
    if not samples:
        raise UsageError(f"{data_url} has no photographs in its test split to compare with")
    dest, run = open_run(dest_url)
    masks = _masks_by_stem(dest, run)
    return sum((_compare_sample(sample, masks.get(sample.name), dest) for sample in samples), Agreement())


def _compare_sample(sample: Sample, mask_key: str | None, dest: Store) -> Agreement:
    reference = None if sample.mask is None else decode_mask(read_object(sample.mask))
    called = None if mask_key is None else decode_mask(dest.get(mask_key))
    if reference is None and called is None:
        return Agreement(photographs=1, unscored=1)
    if called is None or reference is None:
        empty = np.zeros_like(called if reference is None else reference)
        reference = empty if reference is None else reference
        return agree(empty if called is None else called, reference) + Agreement(unscored=int(called is None))
    if called.shape != reference.shape:
        raise UsageError(
            f"the run's mask of {sample.name} is {called.shape[1]} x {called.shape[0]} pixels, the reference "
            f"{reference.shape[1]} x {reference.shape[0]}: these are not the photographs that were scored"
        )
    return agree(called, reference)


def _masks_by_stem(dest: Store, run: Run) -> dict[str, str]:
    """Mask keys of the scored photographs."""
    masks: dict[str, str] = {}
    for outcomes in latest_outcomes(dest, run, ["mask_key"]):
        for row in outcomes.to_pylist():
            stem, mask_key = PurePosixPath(row["key"]).stem, row["mask_key"]
            if mask_key is not None and masks.setdefault(stem, mask_key) != mask_key:
                raise UsageError(f"the run holds two photographs named {stem}; they cannot be told apart")
    return masks
