"""What a run has come to and how it proceeds, retries included, from the object store alone; and summary.json.

From any machine and at any time. No Ray in here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from heapq import heappush, heappushpop
from math import isfinite
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ma_cluster.archive.audit import complete_audit
from ma_cluster.archive.outcomes import SECONDS
from ma_cluster.archive.patients import read_counts, write_patients
from ma_cluster.archive.retry import RUN_SUMMARY, latest_outcomes, retries
from ma_cluster.archive.run import Run, committed_at, mark_finished, read_outcomes, read_run, undecided
from ma_cluster.errors import MaClusterError, UsageError
from ma_cluster.storage.store import Store, open_store

COUNTED = [
    "status",
    "reason",
    "detail",
    "lesion_count",
    "triage",
    "gradable",
    "flags",
    "patient",
    "height",
    "width",
    *SECONDS.values(),
]
"""Columns that `count_outcomes` reads."""
_RATE_PARTS = 50
"""Latest shards over which the rate is taken: an interruption long ago does not slow it."""
_READS = 8  # shards counted at a time: they wait for the store, not for a core
_NUMBER = re.compile(r"\b\d+(\.\d+)?\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Counts of outcomes, as of a committed shard. Adds up."""

    committed_at: float = 0.0
    """When the latest of them were, seconds since 1970."""
    images: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    words: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Reasons with their words, in which each number is a #."""
    lesions: int = 0
    triage: Counter[str] = field(default_factory=Counter)
    """Scored photographs: those to be referred, those not, and those that could not be judged and are not referred."""
    ungradable: int = 0
    """Scored photographs on which the lack of lesions means nothing, referred ones among them."""
    clean: int = 0
    """Gradable photographs without lesions."""
    flags: Counter[str] = field(default_factory=Counter)
    """How many photographs have each flag."""
    identified: int = 0
    """Photographs whose patient is known."""
    megapixels: float = 0.0
    """Of the photographs that could be read."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SECONDS, 0.0))
    """By stage, over all photographs; stages of different photographs run beside each other."""

    def __add__(self, other: Counts) -> Counts:
        summed = [each.name for each in fields(self) if each.name not in ("committed_at", "seconds")]
        sums: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in summed}
        seconds = {stage: spent + other.seconds[stage] for stage, spent in self.seconds.items()}
        return Counts(**sums, seconds=seconds, committed_at=max(self.committed_at, other.committed_at))

    @property
    def details(self) -> dict[str, dict[str, int]]:
        """By reason, its words and how often they were said, most often first."""
        found: dict[str, dict[str, int]] = {reason: {} for reason, _ in sorted(self.words)}
        for (reason, words), count in sorted(self.words.items(), key=lambda item: (-item[1], item[0])):
            found[reason][words] = count
        return found

    def to_json(self) -> dict[str, Any]:
        """As summary.json has them."""
        return {
            "statuses": self.statuses,
            "reasons": self.reasons,
            "details": self.details,
            "lesions": self.lesions,
            "triage": self.triage,
            "ungradable": self.ungradable,
            "clean": self.clean,
            "flags": self.flags,
            "megapixels": round(self.megapixels, 3),
            "seconds": {stage: round(spent, 3) for stage, spent in self.seconds.items()},
        }


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run, what it has come to, and how it proceeds."""

    run: Run
    counts: Counts
    retries: int
    images_per_second: float | None
    """Over the latest shards; None before there are two."""
    patients: dict[str, Any] | None = None
    """Eyes and visits by triage, as they were last rolled up; None of a run that knows no patients."""

    @property
    def complete(self) -> bool:
        """Whether every photograph was scored."""
        return self.counts.statuses["scored"] == self.run.plan.images

    @property
    def remaining(self) -> int:
        """Photographs without an outcome."""
        return self.run.plan.images - self.counts.images

    @property
    def eta_seconds(self) -> float | None:
        """Time to the end at this rate, were the run still going on."""
        return self.remaining / self.images_per_second if self.images_per_second else None

    def summary(self) -> dict[str, Any]:
        """The values of summary.json, those that stay as they are once the run is finished."""
        run = self.run
        known = {"run": run.id, "images": run.plan.images, "skipped": run.plan.skipped}
        known |= {} if self.patients is None else {"patients": self.patients}
        return known | self.counts.to_json() | {"started": run.started, "finished": run.finished}

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return self.summary() | {
            "source": self.run.source,
            "decided": self.counts.images,
            "remaining": self.remaining,
            "retries": self.retries,
            "images_per_second": self.images_per_second,
            "eta_seconds": self.eta_seconds,
        }


def read_status(dest_url: str) -> RunStatus:
    """The status of the run under a URL.

    Raises:
        UsageError: there is no run.
    """
    dest, run = open_run(dest_url)
    return status_of(dest, run, count_parts(dest, run))


def status_of(dest: Store, run: Run, parts: Iterable[Counts]) -> RunStatus:
    """The status of a run whose committed shards have these counts; memory holds one of them at a time."""
    tally = Tally()
    for part in parts:
        tally.add(part)
    return tally.status(dest, run, len(retries(dest)))


@dataclass(slots=True)
class Tally:
    """What committed shards add up to, one after the other."""

    counts: Counts = field(default_factory=Counts)
    latest: list[tuple[float, int]] = field(default_factory=list)
    """A heap of the latest commits, each its time and its photographs."""

    def add(self, part: Counts) -> None:
        """One more shard."""
        self.counts += part
        if isfinite(part.committed_at):
            keep = heappush if len(self.latest) < _RATE_PARTS else heappushpop
            keep(self.latest, (part.committed_at, part.images))

    def status(self, dest: Store, run: Run, retried: int) -> RunStatus:
        """Of the run whose shards they are, which was retried so often."""
        in_order: dict[str, Any] = {
            name: Counter(dict(sorted(getattr(self.counts, name).items())))
            for name in ("statuses", "reasons", "triage", "flags")
        }
        patients = read_counts(dest) if self.counts.identified else None
        return RunStatus(run, replace(self.counts, **in_order), retried, _rate(sorted(self.latest)), patients)


def _rate(latest: Sequence[tuple[float, int]]) -> float | None:
    """Photographs a second between the first and the last of commits, each its time and its photographs."""
    if len(latest) < 2 or latest[-1][0] <= latest[0][0]:
        return None
    return sum(images for _, images in latest[1:]) / (latest[-1][0] - latest[0][0])


def count_parts(dest: Store, run: Run) -> Iterator[Counts]:
    """Counts of each committed shard; a photograph that was retried counts where it was last."""
    return (count_outcomes(outcomes) for outcomes in latest_outcomes(dest, run, COUNTED))


def count_shards(dest: Store, run: Run, numbers: Iterable[int]) -> Iterator[Counts]:
    """Counts of some committed shards of a run without retries."""
    with ThreadPoolExecutor(_READS) as readers:
        yield from readers.map(lambda number: count_outcomes(read_outcomes(dest, run, number, COUNTED)), numbers)


def count_outcomes(outcomes: pa.Table) -> Counts:
    """Counts of outcomes that were committed together, with the columns `COUNTED`."""
    statuses, reasons = Counter(outcomes["status"].to_pylist()), Counter(outcomes["reason"].to_pylist())
    reasons.pop(None, None)
    said = zip(outcomes["reason"].to_pylist(), outcomes["detail"].to_pylist(), strict=True)
    words = Counter((reason, _NUMBER.sub("#", text)) for reason, text in said if reason and text)
    lesions = sum(count or 0 for count in outcomes["lesion_count"].to_pylist())
    scored = outcomes.filter(pc.equal(outcomes["status"], "scored"))
    judged = list(zip(scored["gradable"].to_pylist(), scored["lesion_count"].to_pylist(), strict=True))
    ungradable = sum(gradable is False for gradable, _ in judged)
    clean = sum(gradable is True and not count for gradable, count in judged)
    triage = Counter(todo for todo in scored["triage"].to_pylist() if todo is not None)
    flags = Counter(flag for told in scored["flags"].to_pylist() for flag in told or ())
    sizes = zip(outcomes["height"].to_pylist(), outcomes["width"].to_pylist(), strict=True)
    megapixels = sum(height * width for height, width in sizes if height is not None) / 1e6
    seconds = {stage: pc.sum(outcomes[column]).as_py() or 0.0 for stage, column in SECONDS.items()}
    return Counts(
        committed_at=committed_at(outcomes),
        images=outcomes.num_rows,
        statuses=statuses,
        reasons=reasons,
        words=words,
        lesions=lesions,
        triage=triage,
        ungradable=ungradable,
        clean=clean,
        flags=flags,
        identified=outcomes.num_rows - outcomes["patient"].null_count,
        megapixels=megapixels,
        seconds=seconds,
    )


def finish_run(dest: Store, run: Run, *, whole: bool = True) -> RunStatus:
    """Check that each photograph has its outcome, and write `finished`, summary.json and what is known of patients.

    After a retry the same of the whole run lies beside the retry's own, as retries/0001/run_summary.json. What is not
    `whole` is the retry itself: it has some photographs of some eyes, and says nothing of patients.

    Raises:
        MaClusterError: outcomes are missing.
        PartDamagedError: a part of them is damaged, or foreign.
    """
    status = status_of(dest, run, count_parts(dest, run))
    if status.remaining:
        raise MaClusterError(
            f"{status.remaining} photographs of run {run.id} have no outcome; start it again to resume"
        )
    complete_audit(dest, run)
    patients = write_patients(dest, run) if whole and status.counts.identified else None
    status = replace(status, run=mark_finished(dest, run), patients=patients)
    text = (json.dumps(status.summary(), indent=2) + "\n").encode()
    dest.create("summary.json", text)
    finished = [parts for parts, retry in retries(dest) if retry.finished is not None]
    if finished:
        finished[-1].create(RUN_SUMMARY, text)
    return status


def missing_keys(dest_url: str) -> Iterator[str]:
    """Keys of the plan that have no outcome yet, in the plan's order.

    Raises:
        UsageError: there is no run.
    """
    dest, run = open_run(dest_url)
    return (entry.key for entry in undecided(dest, run))


def open_run(dest_url: str) -> tuple[Store, Run]:
    """The store of a destination, and the run that is there.

    Raises:
        UsageError: there is no run.
    """
    dest = open_store(dest_url)
    run = read_run(dest)
    if run is None:
        raise UsageError("there is no run at this destination: it has no run.json; check the URL")
    return dest, run
