"""Commands on patients: what a run says of each, and what has changed since they were last photographed."""

from __future__ import annotations

import typer

from ma_cluster.cli.app import Dest, app


@app.command()
def patients(dest: Dest) -> None:
    """Roll a run up to eyes and visits: DEST/patients/eyes and visits, each as .parquet and .csv.

    A finished run has them already. Triage none asks for a gradable photograph of each eye that is none; whatever
    could not be judged is ungradable.
    """
    from ma_cluster.archive.patients import write_patients
    from ma_cluster.archive.summary import open_run
    from ma_cluster.report.console import patients_lines

    store, run = open_run(dest)
    for line in patients_lines(write_patients(store, run)):
        typer.echo(line)
    typer.echo(f"{store.url}/patients")
