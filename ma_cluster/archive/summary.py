"""What a run came to, retries included: counts over its committed shards, and summary.json. No Ray in here."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from ma_cluster.archive.outcomes import SECONDS
from ma_cluster.archive.retry import latest_outcomes, retries
from ma_cluster.archive.run import Run, committed_at, mark_finished, read_outcomes
from ma_cluster.errors import MaClusterError
from ma_cluster.storage.store import Store

COUNTED = [
    "status",
    "reason",
    "detail",
    "lesion_count",
    "triage",
    "gradable",
    "flags",
    "height",
    "width",
    *SECONDS.values(),
]
"""Columns that `count_outcomes` reads."""

RUN_SUMMARY = "run_summary.json"
"""Beside the summary of a retry: that of its whole run, after the retry."""
_NUMBER = re.compile(r"\b\d+(\.\d+)?\b")


@dataclass(frozen=True, slots=True)
class PartCounts:
    """Counts of one committed shard."""

    committed_at: float
    """Seconds since 1970."""
    images: int
    statuses: Counter[str]
    reasons: Counter[str]
    details: Counter[tuple[str, str]]
    """Reasons with their words, in which each number is a #."""
    lesions: int
    triage: Counter[str]
    """Scored photographs by what is to be done with them."""
    ungradable: int
    """Scored photographs on which the lack of lesions means nothing."""
    clean: int
    """Gradable photographs without lesions."""
    flags: Counter[str]
    megapixels: float
    """Of the photographs that could be read."""
    seconds: dict[str, float]
    """By stage, over all photographs; stages of different photographs run beside each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A finished run: how many photographs ended how. Also what summary.json holds."""

    run: str
    images: int
    skipped: int
    """Files of the source that were taken for no photographs: sidecars, system files, those of earlier runs."""
    statuses: dict[str, int]
    reasons: dict[str, int]
    details: dict[str, dict[str, int]]
    """By reason, its words and how often they were said, most often first."""
    lesions: int
    triage: dict[str, int]
    """How many photographs are to be referred, how many not, and how many could not be judged and are not referred."""
    ungradable: int
    """Scored photographs on which the lack of lesions means nothing, referred ones among them."""
    clean: int
    """Gradable photographs without lesions."""
    flags: dict[str, int]
    """How many photographs have each flag."""
    megapixels: float
    seconds: dict[str, float]
    """By stage, over all photographs."""
    started: str
    finished: str

    @property
    def complete(self) -> bool:
        """Whether every photograph was scored."""
        return self.statuses.get("scored", 0) == self.images


def count_parts(dest: Store, run: Run) -> Iterator[PartCounts]:
    """Counts of each committed shard; a photograph that was retried counts where it was last."""
    return (count_outcomes(outcomes) for outcomes in latest_outcomes(dest, run, COUNTED))


def count_part(dest: Store, run: Run, number: int) -> PartCounts:
    """Counts of one committed shard of a run without retries."""
    return count_outcomes(read_outcomes(dest, run, number, COUNTED))


def count_outcomes(outcomes: pa.Table) -> PartCounts:
    """Counts of outcomes that were committed together, with the columns `COUNTED`."""
    statuses, reasons = Counter(outcomes["status"].to_pylist()), Counter(outcomes["reason"].to_pylist())
    reasons.pop(None, None)
    said = zip(outcomes["reason"].to_pylist(), outcomes["detail"].to_pylist(), strict=True)
    details = Counter((reason, _NUMBER.sub("#", words)) for reason, words in said if reason and words)
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
    return PartCounts(
        committed_at=committed_at(outcomes),
        images=outcomes.num_rows,
        statuses=statuses,
        reasons=reasons,
        details=details,
        lesions=lesions,
        triage=triage,
        ungradable=ungradable,
        clean=clean,
        flags=flags,
        megapixels=megapixels,
        seconds=seconds,
    )


def total(parts: Iterable[PartCounts]) -> PartCounts:
    """The sum; `committed_at` is the latest."""
    seconds = dict.fromkeys(SECONDS, 0.0)
    out = PartCounts(0.0, 0, Counter(), Counter(), Counter(), 0, Counter(), 0, 0, Counter(), 0.0, seconds)
    for part in parts:
        out = PartCounts(
            max(out.committed_at, part.committed_at),
            out.images + part.images,
            out.statuses + part.statuses,
            out.reasons + part.reasons,
            out.details + part.details,
            out.lesions + part.lesions,
            out.triage + part.triage,
            out.ungradable + part.ungradable,
            out.clean + part.clean,
            out.flags + part.flags,
            out.megapixels + part.megapixels,
            {stage: seconds + part.seconds[stage] for stage, seconds in out.seconds.items()},
        )
    return out


def by_reason(details: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """The words of each reason with their counts, most often first."""
    found: dict[str, dict[str, int]] = {reason: {} for reason, _ in sorted(details)}
    for (reason, words), count in sorted(details.items(), key=lambda item: (-item[1], item[0])):
        found[reason][words] = count
    return found


def finish_run(dest: Store, run: Run) -> Summary:
    """Check that each photograph has its outcome, and write `finished` and summary.json.

    After a retry the same of the whole run lies beside the retry's own, as retries/0001/run_summary.json.

    Raises:
        MaClusterError: outcomes are missing.
        PartDamagedError: a part of them is damaged, or foreign.
    """
    counts = total(count_parts(dest, run))
    if counts.images != run.plan.images:
        raise MaClusterError(
            f"{run.plan.images - counts.images} photographs of run {run.id} have no outcome; start it again to resume"
        )
    run = mark_finished(dest, run)
    assert run.finished is not None
    summary = Summary(
        run=run.id,
        images=counts.images,
        skipped=run.plan.skipped,
        statuses=dict(sorted(counts.statuses.items())),
        reasons=dict(sorted(counts.reasons.items())),
        details=by_reason(counts.details),
        lesions=counts.lesions,
        triage=dict(sorted(counts.triage.items())),
        ungradable=counts.ungradable,
        clean=counts.clean,
        flags=dict(sorted(counts.flags.items())),
        megapixels=round(counts.megapixels, 3),
        seconds={stage: round(seconds, 3) for stage, seconds in counts.seconds.items()},
        started=run.started,
        finished=run.finished,
    )
    text = (json.dumps(dataclasses.asdict(summary), indent=2) + "\n").encode()
    dest.create("summary.json", text)
    finished = [parts for parts, retry in retries(dest) if retry.finished is not None]
    if finished:
        finished[-1].create(RUN_SUMMARY, text)
    return summary
