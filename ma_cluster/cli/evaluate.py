"""Commands that say how good a model is."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ma_cluster.cli.app import Address, Model, app


class Part(StrEnum):
    """The part of a data set that a model is evaluated on."""

    VALIDATION = "validation"
    TEST = "test"


@app.command()
def evaluate(
    data: Annotated[str, typer.Option(metavar="URL", help="Data set: IDRiD's layout, or a manifest.")],
    split: Annotated[Part, typer.Option(help="Its photographs that are looked at.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder or s3:// prefix of the results.")],
    model: Model = "lite",
    rows: Annotated[str, typer.Option(metavar="all|NAME,...", help="Rows of the table, by name.")] = "all",
    healthy: Annotated[
        str | None, typer.Option(metavar="URL", help="Photographs without lesions, to count what is called on them.")
    ] = None,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs for each photograph under way; a share is allowed.")] = 0.0,
    address: Address = None,
) -> None:
    """Reproduce the paper's Table 2 on annotated photographs.

    Writes DIR/table.json, table.md, pr.png, froc.png and examples/.
    """
    from ma_cluster.bundle import load_bundle
    from ma_cluster.cluster.distributed_evaluation import EvaluationRequest
    from ma_cluster.cluster.distributed_evaluation import evaluate as look
    from ma_cluster.report.evaluation_report import markdown, table, write_evaluation
    from ma_cluster.storage.store import open_store

    bundle, store = load_bundle(model), open_store(out)
    request = EvaluationRequest(
        data=data,
        split=split.value,
        rows=None if rows == "all" else tuple(rows.split(",")),
        healthy=healthy,
        gpus=gpus,
        address=address,
    )
    tally = look(bundle, request, lambda done, total: typer.echo(f"{done} of {total} photographs", err=True))
    values = table(tally, bundle, split.value)
    write_evaluation(store, values, tally)
    for line in markdown(values):
        typer.echo(line)


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
