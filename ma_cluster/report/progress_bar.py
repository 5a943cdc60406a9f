"""How far an archive run is, on stderr: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console

from ma_cluster.cluster.fleet.driver import Progress
from ma_cluster.report.console import pace

LOG_SECONDS = 30.0
"""Time between two lines where stderr is no terminal."""


@contextmanager
def progress_display(console: Console) -> Iterator[Callable[[Progress], None]]:
    """Count, rate and time left; yields what moves them. Nothing stays on a terminal at the end."""
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

        yield move


def _lines(console: Console) -> Callable[[Progress], None]:
    said = time.monotonic()

    def move(progress: Progress) -> None:
        nonlocal said
        if time.monotonic() - said >= LOG_SECONDS:
            said = time.monotonic()
            text = pace(progress.images_per_second, progress.eta_seconds)
            console.print(f"{progress.done} of {progress.total} photographs, {text}", highlight=False, soft_wrap=True)

    return move
