"""Commands that watch what runs."""

from __future__ import annotations

import time
from collections import deque
from typing import Annotated

import typer

from ma_cluster.cli.app import app
from ma_cluster.errors import UsageError

_WINDOW_S = 60.0  # of rates: Ray's exporters have new values every 10 s


@app.command()
def top(
    prometheus: Annotated[str | None, typer.Option(metavar="URL", help="Read this Prometheus.")] = None,
    where: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            metavar="URL|FILE",
            help="Read an exporter, or those in a file that Ray lists them in; by default this machine's Ray.",
        ),
    ] = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 10.0,
    once: Annotated[bool, typer.Option("--once", help="Show one frame, after two looks, and end.")] = False,
) -> None:
    """Watch rates, refusals, stage times and losses in the terminal; Ctrl-C ends it."""
    from rich.console import Console
    from rich.live import Live

    from ma_cluster.report.exporters import LOCAL_RAY, Exporters, Prometheus
    from ma_cluster.report.top import View, frame

    if prometheus is not None and where is not None:
        raise UsageError("--prometheus and --metrics exclude each other: name one place to read")
    source = Exporters(where or LOCAL_RAY) if prometheus is None else Prometheus(prometheus)
    pages = deque([source.read()])
    console = Console()
    if once:
        time.sleep(every)
        console.print(frame(View(pages[0], source.read())))
        return
    with Live(frame(View(pages[0], pages[0])), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(every)
            pages.append(source.read())
            while len(pages) > 2 and pages[-1].at_s - pages[1].at_s >= _WINDOW_S:
                pages.popleft()
            live.update(frame(View(pages[0], pages[-1])), refresh=True)
