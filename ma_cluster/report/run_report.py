"""An archive run as people look at it: one page that may be mailed, DEST/report/index.html; its masks against others.

The page comes from the outcomes in the store alone: what was counted, how long it took and what it cost, why
photographs were refused, and small pictures of the surest ones. A key is somebody else's text: the template escapes it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count, pairwise
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from ma_cluster.archive.retry import latest_outcomes
from ma_cluster.archive.run import Run
from ma_cluster.archive.summary import COUNTED, Counts, RunStatus, count_outcomes, open_run, status_of
from ma_cluster.config import SplitConfig
from ma_cluster.errors import ObjectMissingError, Status, UsageError
from ma_cluster.evaluation.agreement import Agreement, agree
from ma_cluster.images.datasets import Sample, decode_mask, look_at_each, read_dataset, read_object
from ma_cluster.report.charts import Bar, bars, embedded, parts, render
from ma_cluster.review.pictures import thumbnail
from ma_cluster.storage.store import Store, open_store

INDEX = "report/index.html"
_SHOWN = 48
"""Photographs of each kind on the page: some 10 kB each."""
_LISTED = 120
_THUMBNAIL_PX = 220
_READS = 8
_TRIAGE = {"none": "no referral", "refer": "to refer", "ungradable": "ungradable, not referred", None: "no triage"}
_STATUSES = {"scored": "scored", "refused": "refused", "failed": "failed", "left": "without an outcome"}
_LESION_BINS = (0, 1, 2, 3, 5, 10, 20, 50, 100)
_SHARES = 20  # bins of what lies in 0..1
_TIMES = 48  # bins of a run's time
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


@dataclass
class Digest:
    """What the page shows of a run's outcomes, gathered part by part."""

    surest: list[tuple[tuple[float, int], int, dict[str, Any]]] = field(default_factory=list)
    """A heap of ((image score, lesions), order of arrival, row)."""
    ungradable: list[tuple[float, int, dict[str, Any]]] = field(default_factory=list)
    """A heap of (lack of quality, order of arrival, row)."""
    unscored: list[dict[str, Any]] = field(default_factory=list)
    unscored_in_all: int = 0
    lesion_counts: np.ndarray = field(default_factory=lambda: np.zeros(len(_LESION_BINS), np.int64))
    scores: np.ndarray = field(default_factory=lambda: np.zeros(_SHARES, np.int64))
    qualities: np.ndarray = field(default_factory=lambda: np.zeros(_SHARES, np.int64))
    commits: list[tuple[float, int]] = field(default_factory=list)
    """When each part was committed, seconds since 1970, and its photographs."""
    _arrival: Iterator[int] = field(default_factory=lambda: count(0, -1))

    def take(self, part: pa.Table) -> Counts:
        """Take the outcomes of a part, and count them."""
        counts = count_outcomes(part)
        self.commits.append((counts.committed_at, counts.images))
        for row in part.select(["key", *_COLUMNS]).to_pylist():
            self.add(row)
        return counts

    def add(self, row: dict[str, Any]) -> None:
        """Take one photograph's outcome."""
        if row["status"] != Status.SCORED:
            self.unscored_in_all += 1
            if len(self.unscored) < _LISTED:
                self.unscored.append(row)
            return
        score = row["image_score"]
        _keep(self.surest, ((score or 0.0, row["lesion_count"]), next(self._arrival), row))
        if score is not None:
            self.scores[_share_bin(score)] += 1
        if row["quality"] is not None:
            self.qualities[_share_bin(row["quality"])] += 1
        if row["gradable"] is False:
            _keep(self.ungradable, (-row["quality"], next(self._arrival), row))
        else:
            self.lesion_counts[np.searchsorted(_LESION_BINS, row["lesion_count"], side="right") - 1] += 1

    def lesion_bars(self) -> list[Bar]:
        """How many gradable photographs have how many lesions."""
        last = len(_LESION_BINS) - 1
        ends = [
            str(first) if first + 1 == after else f"{first} to {after - 1}" for first, after in pairwise(_LESION_BINS)
        ]
        return bars([*ends, f"{_LESION_BINS[last]} or more"], self.lesion_counts.tolist())

    def score_bars(self) -> list[Bar]:
        """How many photographs have which image score."""
        return bars(_share_labels(), self.scores.tolist())

    def quality_bars(self) -> list[Bar]:
        """How many photographs have which quality."""
        return bars(_share_labels(), self.qualities.tolist())


def _share_bin(value: float) -> int:
    return min(_SHARES - 1, int(value * _SHARES))


def _share_labels() -> list[str]:
    return [f"{place / _SHARES:.2f}" for place in range(_SHARES)]


def _keep(heap: list[tuple[Any, int, dict[str, Any]]], item: tuple[Any, int, dict[str, Any]]) -> None:
    push = heapq.heappush if len(heap) < _SHOWN else heapq.heappushpop
    push(heap, item)


def _shown(dest: Store, heap: list[tuple[Any, int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of a heap, largest first, with a small picture and what is said below it."""
    rows = [row for *_, row in sorted(heap, reverse=True)]
    with ThreadPoolExecutor(_READS) as readers:
        pictures = readers.map(lambda row: _picture(dest, row["overlay_key"]), rows)
        return [row | {"picture": seen, "seen": _seen(row)} for row, seen in zip(rows, pictures, strict=True)]


def _picture(dest: Store, key: str) -> str:
    """Of an overlay; nothing where it is gone, or damaged."""
    try:
        return embedded(thumbnail(dest.get(key), _THUMBNAIL_PX))
    except (ObjectMissingError, ValueError):
        return ""


def _seen(row: dict[str, Any]) -> str:
    score = "" if row["image_score"] is None else f", {row['image_score']:.2f}"
    return f"{_TRIAGE[row['triage']]}{score}"


def is_training(url: str) -> bool:
    """Whether a training lies there, and no archive run."""
    try:
        return b'"network"' in open_store(url).get("run.json")
    except ObjectMissingError:
        return False


def write_report(dest_url: str, price: float | None = None) -> str:
    """Write the page of a run, finished or not, and return its URL; an earlier one is replaced.

    Args:
        dest_url: of the run.
        price: of an hour of all that the run was given; None says nothing of cost.

    Raises:
        UsageError: there is no run.
        StoreError: an outcome cannot be read, or the page not be written.
    """
    dest, run = open_run(dest_url)
    digest, columns = Digest(), [*_COLUMNS, *(name for name in COUNTED if name not in _COLUMNS)]
    status = status_of(dest, run, (digest.take(part) for part in latest_outcomes(dest, run, columns)))
    counts, rate = status.counts, status.images_per_second
    page = render(
        "run.html",
        status=status,
        digest=digest,
        outcomes=_outcomes(status),
        triages=parts({todo: (_TRIAGE[todo], number) for todo, number in counts.triage.items()}),
        triage=_TRIAGE,
        throughput=throughput(digest.commits),
        reasons=bars(list(counts.reasons), list(counts.reasons.values())),
        stages=bars(list(counts.seconds), list(counts.seconds.values()), "{:,.1f} s"),
        flags=bars([flag.replace("_", " ") for flag in counts.flags], list(counts.flags.values())),
        price=price,
        cost=None if price is None or not rate else price * 1000 / rate / 3600,
        worst=_shown(dest, digest.surest),
        ungradable=_shown(dest, digest.ungradable),
    )
    dest.put(INDEX, page.encode())
    return f"{dest.url}/{INDEX}"


def _outcomes(status: RunStatus) -> Any:
    numbers = dict(status.counts.statuses) | {"left": status.remaining}
    return parts({kind: (words, numbers.get(kind, 0)) for kind, words in _STATUSES.items()})


def throughput(commits: Sequence[tuple[float, int]]) -> list[Bar]:
    """Photographs by the time at which they were committed, in at most so many stretches of equal length."""
    known = np.array([commit for commit in commits if np.isfinite(commit[0])], np.float64).reshape(-1, 2)
    if len(known) < 2:
        return []
    numbers, edges = np.histogram(known[:, 0], min(_TIMES, len(known)), weights=known[:, 1])
    form = "%H:%M" if edges[-1] - edges[0] < 86_400 else "%m-%d %H:%M"
    labels = [datetime.fromtimestamp(edge, UTC).strftime(form) for edge in edges[:-1].tolist()]
    return bars(labels, numbers.astype(np.int64).tolist())


def compare_run(dest_url: str, data_url: str) -> Agreement:
    """Pool the agreement over the data set's test split, photographs matched by the stem of their name.

    Raises:
        UsageError: there is no run, the data set has no test split, a stem is not unique in the run, or a mask is of
            another size than what was scored.
        StoreError: a mask cannot be read.
    """
    samples = [sample for sample in read_dataset(data_url, SplitConfig()) if sample.split == "test"]
    if not samples:
        raise UsageError(f"{data_url} has no photographs in its test split to compare with")
    dest, run = open_run(dest_url)
    masks = _masks_by_stem(dest, run)
    return sum(look_at_each(samples, lambda sample: _compare_sample(sample, masks.get(sample.name), dest)), Agreement())


def _compare_sample(sample: Sample, mask_key: str | None, dest: Store) -> Agreement:
    called = None if mask_key is None else decode_mask(dest.get(mask_key))
    shape = None if called is None else called.shape
    reference = None if sample.mask is None else decode_mask(read_object(sample.mask), shape)
    if reference is None and called is None:
        return Agreement(photographs=1, unscored=1)
    if called is None or reference is None:
        empty = np.zeros_like(called if reference is None else reference)
        reference = empty if reference is None else reference
        return agree(empty if called is None else called, reference) + Agreement(unscored=int(called is None))
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
