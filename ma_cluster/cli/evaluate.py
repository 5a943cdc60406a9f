"""Commands that say how good a model is."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ma_cluster.cli.app import Address, Model, app
from ma_cluster.errors import UsageError


class Part(StrEnum):
    """The part of a data set that a model is evaluated on."""

    VALIDATION = "validation"
    TEST = "test"


@app.command()
def evaluate(
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder or s3:// prefix of the results.")],
    data: Annotated[
        str | None, typer.Option(metavar="URL", help="Data set with masks: IDRiD's layout, or a manifest.")
    ] = None,
    grades: Annotated[
        str | None, typer.Option(metavar="CSV", help="Photographs and their grades of retinopathy: image, grade, ...")
    ] = None,
    split: Annotated[Part, typer.Option(help="Photographs that are looked at; of the grades, test means all.")] = (
        Part.TEST
    ),
    model: Model = "lite",
    rows: Annotated[str, typer.Option(metavar="all|NAME,...", help="Rows of the table, by name.")] = "all",
    healthy: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Photographs without lesions, to count what is called on them; test: all."),
    ] = None,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs for each photograph under way; a share is allowed.")] = 0.0,
    address: Address = None,
) -> None:
    """Compare a model with annotated photographs (the paper's Table 2), with graded ones, or with both.

    With --data, writes DIR/table.json, table.md, pr.png, froc.png and examples/; with --grades, DIR/images.json and
    images.md: how well the image score tells retinopathy, by each other column of CSV as well.
    """
    from ma_cluster.bundle import load_bundle
    from ma_cluster.cluster import distributed_evaluation as look
    from ma_cluster.report import evaluation_report, image_report
    from ma_cluster.storage.store import open_store

    if data is None and grades is None:
        raise UsageError("there is nothing to compare with: give --data, --grades or both")
    if data is None and (healthy is not None or rows != "all"):
        raise UsageError("--rows and --healthy are of the comparison with masks: give --data as well")
    bundle, store = load_bundle(model), open_store(out)
    request = look.EvaluationRequest(
        data=data,
        split=split.value,
        rows=None if rows == "all" else tuple(rows.split(",")),
        healthy=healthy,
        grades=grades,
        gpus=gpus,
        address=address,
    )
    lines: list[str] = []
    if data is not None:
        tally = look.evaluate(bundle, request, _tell)
        values = evaluation_report.table(tally, bundle, split.value)
        evaluation_report.write_evaluation(store, values, tally)
        lines += evaluation_report.markdown(values)
    if grades is not None:
        values = image_report.images_table(look.evaluate_grades(bundle, request, _tell), bundle, split.value)
        image_report.write_images(store, values)
        lines += ["", *image_report.images_markdown(values)] if lines else image_report.images_markdown(values)
    typer.echo("\n".join(lines))


def _tell(done: int, total: int) -> None:
    typer.echo(f"{done} of {total} photographs", err=True)


@app.command()
def pool(
    evaluations: Annotated[list[str], typer.Argument(metavar="DIR...", help="Of `evaluate`: of five folds, say.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder or s3:// prefix of the results.")],
    against: Annotated[
        list[str] | None, typer.Option(metavar="DIR", help="Of another model on the same photographs; may be repeated.")
    ] = None,
) -> None:
    """Pool evaluations of different photographs, and compare them with another model's, photograph by photograph.

    Writes table.json and table.md: the rows of all photographs together, and for each row the difference in average
    precision and in FROC mean with a paired interval. Scores are binned more coarsely than in `evaluate` (within 1e-3).
    """
    from ma_cluster.report import pooled_report as report
    from ma_cluster.storage.store import open_store

    ours = report.pooled_tally(open_store(url) for url in evaluations)
    theirs = report.pooled_tally(open_store(url) for url in against) if against else None
    values = report.pooled_table(ours, theirs)
    report.write_pooled(open_store(out), values)
    typer.echo("\n".join(report.pooled_markdown(values)))


@app.command()
def card(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a bundle; its README.md is written.")],
    table: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="table.json of an evaluation of it.")],
    pictures: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="DIR of an evaluation of it on photographs that may be published (those of `sample`): "
            "the examples are copied beside the card.",
        ),
    ] = None,
) -> None:
    """Write a model's card: what it is for, how good it is, where it fails."""
    from ma_cluster.report.model_card import write_card

    values = json.loads(table.read_text())
    typer.echo(write_card(model, values, pictures))
