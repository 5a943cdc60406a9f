"""Commands that measure speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ma_cluster.cli.app import Model, app


@app.command()
def bench(
    out: Annotated[Path, typer.Option(metavar="FILE.json", dir_okay=False, help="Where the figures go.")],
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...", help="detect, monai, engine, halo, dense, growth, score; all without a name."
        ),
    ] = None,
    model: Model = "lite",
    image: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A photograph; without it one of `sample`, at 12 megapixels."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the networks, ours and the peers'.")] = 1,
    device: Annotated[str, typer.Option(help="Where the networks run: cpu, cuda, cuda:1, ...")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="Passes of which the fastest counts.")] = 1,
) -> None:
    """Measure speed on this machine, beside its peers.

    detect: seconds of each stage, for several flips at 0.5x. monai: the hypothesis networks against MONAI's sliding
    window. engine: the same against a bare loop over their tiles. halo: how far tiles are from the whole photograph.
    dense: the refinement in shared computation against patch by patch. growth: time and memory against the
    photograph's size. score: an archive run against a bare loop. Every ratio is of times of one run.
    """
    from ma_cluster.report.bench.run import run_benchmarks
    from ma_cluster.report.bench.subject import Subject

    def show(name: str, rows: list[dict[str, Any]] | str) -> None:
        for row in [rows] if isinstance(rows, str) else rows:
            typer.echo(f"{name}  {row if isinstance(row, str) else json.dumps(row)}")

    subject = Subject(model=model, image=image, threads=threads, device=device, repeats=repeats)
    report = run_benchmarks(names or [], subject, show)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
