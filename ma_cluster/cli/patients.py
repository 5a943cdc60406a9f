"""Commands on patients: what a run says of each, and what has changed since they were last photographed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ma_cluster.cli.app import INCOMPLETE, Dest, FieldDegrees, Model, app, detector_threads


@app.command()
def patients(dest: Dest) -> None:
    """Roll a run up to eyes and visits: DEST/patients/eyes and visits, each as .parquet and .csv.

    A finished run has them already. The eye is the one that the manifest names, else the photograph's header, else the
    one that the picture shows where that is sure; where it is not, the eye is unknown, and such photographs have a row
    of their own: they make no visit none. Triage none asks for a gradable photograph of each eye that is none; whatever
    could not be judged is ungradable.
    """
    from ma_cluster.archive.patients import write_patients
    from ma_cluster.archive.summary import open_run
    from ma_cluster.report.console import patients_lines

    store, run = open_run(dest)
    for line in patients_lines(write_patients(store, run)):
        typer.echo(line)
    typer.echo(f"{store.url}/patients")


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", exists=True, dir_okay=False, readable=True)],
    after: Annotated[Path, typer.Argument(metavar="AFTER", exists=True, dir_okay=False, readable=True)],
    out: Annotated[str, typer.Option(metavar="DIR", help="Where the results go.")],
    years: Annotated[
        float | None, typer.Option(min=0.001, help="Time between both, for rates; without it there are none.")
    ] = None,
    model: Model = "lite",
    field_degrees: FieldDegrees = 0.0,
) -> None:
    """Compare two photographs of one eye: which lesions persist, which are new or gone.

    Writes DIR/compare.json, and DIR/compare.html with both photographs registered. Exit status 3 where they cannot be
    registered: then nothing is said of lesions.
    """
    from ma_cluster.config import KnownField
    from ma_cluster.lesions.detector import Detector
    from ma_cluster.report.console import change_line
    from ma_cluster.report.turnover import compare_files
    from ma_cluster.storage.store import open_store

    detector = Detector.load(model, threads=detector_threads()).knowing(KnownField(field_degrees))
    values = compare_files(detector, (before, after), years, open_store(out))
    typer.echo(change_line(values))
    if not values["registered"]:
        raise typer.Exit(INCOMPLETE)


@app.command()
def turnover(dest: Dest) -> None:
    """Compare the photographs of each eye at each two visits that a run knows by their dates.

    Photographs whose eye is unknown are compared with none. Writes DEST/turnover.parquet, a row for each pair, and a
    page for each that can be registered. Exit status 3 where one cannot.
    """
    from ma_cluster.report.console import change_line, printable
    from ma_cluster.report.turnover import turnover_of_run

    unregistered = 0

    def show(row: dict[str, Any]) -> None:
        nonlocal unregistered
        unregistered += not row["registered"]
        names = " ".join(row[name] for name in ("patient", "eye", "before", "after"))
        typer.echo(f"{printable(names)}: {change_line(row)}")

    typer.echo(turnover_of_run(dest, show))
    if unregistered:
        raise typer.Exit(INCOMPLETE)
