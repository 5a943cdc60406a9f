"""What the commands write to a terminal: lines of text from the results, and how far a run is.

Loads neither torch nor Ray.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

from rich import progress as bars
from rich.console import Console

from ma_cluster.archive.retry import PutAside
from ma_cluster.archive.summary import Counts, RunStatus
from ma_cluster.errors import Triage
from ma_cluster.report.doctor import Finding

_WORDS_SHOWN = 5  # of each reason

if TYPE_CHECKING:
    from ma_cluster.archive.forecast import Forecast, StageSeconds, Survey
    from ma_cluster.cluster.fleet.workers import Progress
    from ma_cluster.evaluation.agreement import Agreement

LOG_SECONDS = 30.0
"""Time between two lines of progress where stderr is no terminal."""


def printable(text: str) -> str:
    """The text with its control characters escaped: a key is someone else's, it must not steer the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def summary_lines(status: RunStatus, images_per_second: float | None) -> Iterator[str]:
    """The lines at the end of an archive run.

    Args:
        status: of the whole run.
        images_per_second: of this command; None where there was nothing left to score.
    """
    counts = status.counts
    yield f"run {status.run.id}: {_photographs(counts.images)}, {counts.lesions} lesions"
    yield from _counts(counts)
    yield from patients_lines(status.patients)
    yield from _skipped(status.run.plan.skipped)
    if images_per_second is None:
        yield "nothing was left to score"
    else:
        megapixels_per_second = images_per_second * counts.megapixels / max(counts.images, 1)
        yield f"{images_per_second:.2f} photographs/s, {megapixels_per_second:.3g} megapixels/s"
    yield from _stages(counts.seconds)


def status_lines(status: RunStatus) -> Iterator[str]:
    """The lines that say how a run stands."""
    run, counts = status.run, status.counts
    yield f"run {run.id} of {printable(run.source)}"
    yield f"started {run.started}, {f'finished {run.finished}' if run.finished else 'unfinished'}"
    yield f"{counts.images} of {_photographs(run.plan.images)} decided, {counts.lesions} lesions"
    yield from _counts(counts)
    yield from patients_lines(status.patients)
    yield from _skipped(run.plan.skipped)
    if status.retries:
        yield f"  retried {status.retries} time{'' if status.retries == 1 else 's'}"
    yield from _stages(counts.seconds)
    if status.remaining and status.images_per_second is not None:
        yield pace(status.images_per_second, status.eta_seconds)


def patients_lines(counts: Mapping[str, Any] | None) -> Iterator[str]:
    """How many patients, visits and eyes a run knows, by triage; nothing of one that knows none."""
    if counts is not None:
        yield f"  patients {counts['patients']}"
        yield from (
            f"    {kind:<6} {', '.join(f'{todo} {number}' for todo, number in counts[kind].items())}"
            for kind in ("visits", "eyes")
        )


def change_line(values: Mapping[str, Any]) -> str:
    """What has changed between two photographs of one eye."""
    if not values["registered"]:
        return f"not registered: {values['detail']}"
    kinds = ", ".join(f"{len(values[kind])} {kind}" for kind in ("persisting", "new", "gone", "outside"))
    rate = values["turnover_per_year"]
    ended = "no rates without the time between" if rate is None else f"turnover {rate:.1f} a year"
    where = f"residual {values['residual_px']:.1f} px, overlap {values['overlap']:.0%}"
    return f"{kinds}; {ended} ({where})"


def forecast_lines(found: Survey, stages: StageSeconds, said: Forecast, hourly_price: float | None) -> Iterator[str]:
    """What an archive would take, as lines."""
    size = f"{found.bytes / 1e6:,.0f} MB, {found.images * found.megapixels:,.0f} megapixels by {found.sampled} headers"
    yield f"{_photographs(found.images)}, {size}"
    yield from _skipped(found.skipped)
    if found.unreadable:
        yield f"  {found.unreadable} of {found.sampled} are too large, or their headers tell no size: such are refused"
    spent = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in stages.seconds.items() if seconds)
    yield f"seconds a photograph of {stages.megapixels:.1f} megapixels, by {stages.by}: {spent}"
    for part, rate in sorted(said.rates.items(), key=lambda item: item[1]):
        yield f"  {part:<10} {rate:10,.2f} photographs/s{'   <- holds it back' if part == said.bottleneck else ''}"
    cost = "" if hourly_price is None else f", {said.cost(hourly_price):,.2f} at {hourly_price:g} an hour"
    gpus = f" with {said.gpus:g} GPUs" if said.gpus else ""
    yield f"{said.seconds / 3600:,.2f} hours ({said.seconds:,.0f} s){gpus}{cost}"
    if said.segmenters_within is not None:
        gpus = f" ({said.gpus_within:g} GPUs)" if said.gpus_within else ""
        reading = f"{said.reading_within} photographs read at a time"
        yield f"in time with {said.segmenters_within} replicas{gpus} and {reading}"


def repair_lines(done: Sequence[PutAside]) -> Iterator[str]:
    """What a repair has put aside."""
    for each in done:
        yield f"{each.part}: {each.fault}; {f'now {each.now}' if each.now else 'written again'}"
    if not done:
        yield "nothing of the run is damaged"


def agreement_lines(agreement: Agreement) -> Iterator[str]:
    """The lines that compare a run with the reference masks."""
    yield f"against the reference, {_photographs(agreement.photographs)} ({agreement.unscored} not scored):"
    yield f"  pixels   precision {agreement.precision:.3f}, recall {agreement.recall:.3f}, F1 {agreement.f1:.3f}"
    found = f"{agreement.found_lesions} of {agreement.reference_lesions} found ({agreement.sensitivity:.0%})"
    per_photograph = agreement.false_lesions / max(agreement.photographs, 1)
    yield f"  lesions  {found}, {agreement.false_lesions} false ({per_photograph:.1f} a photograph)"


def review_lines(compared: Mapping[str, Any]) -> Iterator[str]:
    """The lines that tell what `compare_reviews` found."""
    for name, count in compared["reviewers"].items():
        judged = f"{count['accepted']} accepted, {count['rejected']} rejected, {count['drawn']} drawn"
        yield f"{name}: {_photographs(count['done'])} done, {count['graded']} graded; lesions: {judged}"
    for pair in compared["pairs"]:
        said = [f"{pair['one']} and {pair['other']}:"]
        if pair["lesion_f1"] is not None:
            said.append(f"lesion F1 {pair['lesion_f1']:.3f} on {_photographs(pair['photographs'])}")
        for name, count in (("grade", "graded"), ("triage", "triaged")):
            if pair[f"{name}_kappa"] is not None:
                said.append(f"{name} kappa {pair[f'{name}_kappa']:.3f} on {pair[count]}")
        yield f"{said[0]} {', '.join(said[1:]) or 'nothing that both have done'}"


def finding_line(finding: Finding) -> str:
    """What the doctor says of one thing, as a line."""
    cure = f"; {finding.cure}" if finding.cure else ""
    return f"{finding.level:<4}  {finding.name:<9}  {printable(finding.text)}{cure}"


@contextmanager
def progress_display(console: Console) -> Iterator[Callable[[Progress], None]]:
    """How far an archive run is, with rate and time left: a bar on a terminal, a line now and then in a log.

    Yields what moves them. Nothing stays on a terminal at the end.
    """
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[pace]}"),
    )
    with bars.Progress(*columns, console=console, transient=True) as display:
        task = display.add_task("starting", total=None, pace="")

        def move(progress: Progress) -> None:
            text = pace(progress.images_per_second, progress.eta_seconds)
            display.update(task, description="scoring", completed=progress.done, total=progress.total, pace=text)

        with _logged_to(_BesideBar(display, task)):
            yield move


class _BesideBar(logging.Handler):
    """Shows what the package is about as the bar's description, and warnings above the bar."""

    def __init__(self, display: bars.Progress, task: bars.TaskID) -> None:
        super().__init__()
        self._display, self._task = display, task

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self._display.console.print(self.format(record), markup=False, highlight=False)
        else:
            self._display.update(self._task, description=self.format(record))


@contextmanager
def _logged_to(handler: logging.Handler) -> Iterator[None]:
    """What the package logs goes to `handler` alone within the block."""
    logger = logging.getLogger("ma_cluster")
    before, logger.handlers = logger.handlers, [handler]
    try:
        yield
    finally:
        logger.handlers = before


def pace(images_per_second: float | None, eta_seconds: float | None) -> str:
    """Rate and time left; nothing where they are not known yet."""
    if images_per_second is None or eta_seconds is None:
        return ""
    minutes, seconds = divmod(round(eta_seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{images_per_second:.2f}/s, {hours}:{minutes:02d}:{seconds:02d} left"


def _counts(counts: Counts) -> Iterator[str]:
    """How photographs ended, and what the scored ones say, as far as they can be judged."""
    yield from (f"  {status:<8} {count}" for status, count in counts.statuses.items())
    for reason, count in counts.reasons.items():
        yield f"    {reason:<14} {count}"
        said = counts.details.get(reason, {})
        yield from (f"      {times} x {printable(words)}" for words, times in islice(said.items(), _WORDS_SHOWN))
        if len(said) > _WORDS_SHOWN:
            yield f"      and {len(said) - _WORDS_SHOWN} others; summary.json has all"
    if counts.triage:
        yield f"  triage   {', '.join(f'{todo} {counts.triage[todo]}' for todo in Triage)}"
    if counts.statuses["scored"]:
        yield f"  clean {counts.clean}: gradable, and without lesions"
    if counts.ungradable:
        yield f"  ungradable {counts.ungradable}: the lack of lesions on them means nothing"
    if counts.flags:
        yield "  flags " + ", ".join(f"{flag} {count}" for flag, count in counts.flags.items())


def _skipped(files: int) -> Iterator[str]:
    if files:
        yield f"  skipped {files} file{'' if files == 1 else 's'} that are no photographs, or of earlier runs"


def _stages(seconds: dict[str, float]) -> Iterator[str]:
    """Where the time went, summed over photographs that run beside each other."""
    whole = sum(seconds.values())
    if whole:
        yield from (f"  {stage:<8} {spent:10,.1f} s  {spent / whole:4.0%}" for stage, spent in seconds.items())


def _photographs(count: int) -> str:
    return f"{count} photograph{'' if count == 1 else 's'}"


def _lines(console: Console) -> Callable[[Progress], None]:
    said = time.monotonic()

    def move(progress: Progress) -> None:
        nonlocal said
        if time.monotonic() - said >= LOG_SECONDS:
            said = time.monotonic()
            text = pace(progress.images_per_second, progress.eta_seconds)
            console.print(f"{progress.done} of {progress.total} photographs, {text}", highlight=False, soft_wrap=True)

    return move
