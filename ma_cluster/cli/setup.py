"""Commands on the machine itself."""

from __future__ import annotations

from typing import Annotated

import typer

from ma_cluster.cli.app import Model, app


@app.command()
def doctor(
    store: Annotated[str | None, typer.Option(metavar="URL", help="Also try this folder or s3:// prefix.")] = None,
    model: Model = "lite",
) -> None:
    """Check this machine, the store and the model.

    Versions, cores, memory, disk, ports, GPU, the model, Ray; exit status 1 on a fault.
    """
    from ma_cluster.report.console import finding_line
    from ma_cluster.report.doctor import Level, examine

    failed = False
    for finding in examine(model, store):
        failed = failed or finding.level is Level.FAIL
        typer.echo(finding_line(finding))
    if failed:
        raise typer.Exit(1)
