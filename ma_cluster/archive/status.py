"""How a run stands, from the object store alone, from any machine and at any time. No Ray in here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ma_cluster.archive.retry import retries
from ma_cluster.archive.run import Run, read_run, undecided
from ma_cluster.archive.summary import PartCounts, by_reason, count_parts, total
from ma_cluster.errors import UsageError
from ma_cluster.storage.store import Store, open_store

_RATE_PARTS = 50
"""Latest shards over which the rate is taken: an interruption long ago does not slow it."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Counts of a run, and how it proceeds."""

    run: Run
    decided: int
    statuses: dict[str, int]
    reasons: dict[str, int]
    details: dict[str, dict[str, int]]
    """By reason, its words and how often they were said, most often first."""
    retries: int
    lesions: int
    ungradable: int
    """Scored photographs on which the lack of lesions means nothing."""
    clean: int
    """Gradable photographs without lesions."""
    flags: dict[str, int]
    """How many photographs have each flag."""
    triage: dict[str, int]
    """How many photographs are to be referred, how many not, and how many could not be judged and are not referred."""
    seconds: dict[str, float]
    """By stage, over all photographs."""
    images_per_second: float | None
    """Over the latest shards; None before there are two."""

    @property
    def remaining(self) -> int:
        """Photographs without an outcome."""
        return self.run.plan.images - self.decided

    @property
    def eta_seconds(self) -> float | None:
        """Time to the end at this rate, were the run still going on."""
        return self.remaining / self.images_per_second if self.images_per_second else None


def read_status(dest_url: str) -> RunStatus:
    """The status of the run under a URL.

    Raises:
        UsageError: there is no run.
    """
    dest, run = open_run(dest_url)
    return status_of(dest, run, list(count_parts(dest, run)))


def status_of(dest: Store, run: Run, parts: Sequence[PartCounts]) -> RunStatus:
    """The status of a run whose committed shards have these counts."""
    counts = total(parts)
    return RunStatus(
        run=run,
        decided=counts.images,
        statuses=dict(sorted(counts.statuses.items())),
        reasons=dict(sorted(counts.reasons.items())),
        details=by_reason(counts.details),
        retries=len(retries(dest)),
        lesions=counts.lesions,
        ungradable=counts.ungradable,
        clean=counts.clean,
        flags=dict(sorted(counts.flags.items())),
        triage=dict(sorted(counts.triage.items())),
        seconds=counts.seconds,
        images_per_second=rate(parts),
    )


def missing_keys(dest_url: str) -> Iterator[str]:
    """Keys of the plan that have no outcome yet, in the plan's order.

    Raises:
        UsageError: there is no run.
    """
    dest, run = open_run(dest_url)
    return (entry.key for entry in undecided(dest, run))


def rate(parts: Sequence[PartCounts]) -> float | None:
    """Photographs a second between the first and the last of the latest commits."""
    latest = sorted(parts, key=lambda part: part.committed_at)[-_RATE_PARTS:]
    if len(latest) < 2 or latest[-1].committed_at <= latest[0].committed_at:
        return None
    return sum(part.images for part in latest[1:]) / (latest[-1].committed_at - latest[0].committed_at)


def to_json(status: RunStatus) -> dict[str, Any]:
    """The status as plain values."""
    return {
        "run": status.run.id,
        "source": status.run.source,
        "started": status.run.started,
        "finished": status.run.finished,
        "images": status.run.plan.images,
        "decided": status.decided,
        "remaining": status.remaining,
        "statuses": status.statuses,
        "skipped": status.run.plan.skipped,
        "retries": status.retries,
        "reasons": status.reasons,
        "details": status.details,
        "lesions": status.lesions,
        "ungradable": status.ungradable,
        "clean": status.clean,
        "flags": status.flags,
        "triage": status.triage,
        "seconds": status.seconds,
        "images_per_second": status.images_per_second,
        "eta_seconds": status.eta_seconds,
    }


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
