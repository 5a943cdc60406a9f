"""Commands that make a model."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from ma_cluster.cli.app import Address, app, detector_threads
from ma_cluster.config import RECIPES, Negatives, Recipe
from ma_cluster.errors import ObjectMissingError, UsageError

if TYPE_CHECKING:
    from ma_cluster.training.request import Network


class Stage(StrEnum):
    """What `train` trains."""

    HGN = "hgn"
    PRN = "prn"


@app.command()
def train(
    stage: Annotated[Stage, typer.Argument(help="hgn: a hypothesis network; prn: the refinement network.")],
    data: Annotated[str, typer.Option(metavar="URL", help="Data set: IDRiD's layout, or a manifest.")],
    out: Annotated[str, typer.Option(metavar="URL", help="Where checkpoints and log go.")],
    recipe: Annotated[str, typer.Option(help=f"One of {', '.join(RECIPES)}.")] = "lite",
    scale: Annotated[str, typer.Option(help="Of a hypothesis network: 1x or 0.5x.")] = "1x",
    healthy: Annotated[str | None, typer.Option(metavar="URL", help="Photographs without retinopathy as well.")] = None,
    hgn_half: Annotated[str | None, typer.Option(metavar="URL", help="Train more where this one errs.")] = None,
    init: Annotated[str | None, typer.Option(metavar="MODEL|URL", help="Begin with these weights.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Train workers.")] = 1,
    min_workers: Annotated[int | None, typer.Option(min=1, help="Go on with as few where nodes are lost.")] = None,
    gpus: Annotated[float, typer.Option(min=0, help="For each worker.")] = 0.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps, instead of the recipe's.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak, instead of the recipe's.")] = None,
    epoch_steps: Annotated[int | None, typer.Option(min=1, help="Steps between two checkpoints.")] = None,
    triplet: Annotated[bool, typer.Option(help="Without it: the ablation `cls`.")] = True,
    uniform: Annotated[bool, typer.Option("--uniform", help="Draw negatives uniformly, not by their loss.")] = False,
    negatives: Annotated[str, typer.Option(help="Of the refinement: regions, photographs or both.")] = "regions",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run at --out.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of first weights and draws.")] = 1,
    ledger_shards: Annotated[int, typer.Option(min=1, help="Actors that keep the healthy pool's losses.")] = 1,
    store_mib: Annotated[
        int | None, typer.Option(min=80, help="A local Ray's memory for photographs, MiB; the rest is spilled to disk.")
    ] = None,
    address: Address = None,
) -> None:
    """Train a network on Ray; ends with a checkpoint that `bundle` packs."""
    from ma_cluster.cluster.training.train_hgn import train_hgn
    from ma_cluster.cluster.training.train_prn import train_prn
    from ma_cluster.storage.store import open_store
    from ma_cluster.training.request import TrainRequest

    if recipe not in RECIPES or scale not in ("1x", "0.5x"):
        raise UsageError(f"recipes are {', '.join(RECIPES)}, scales 1x and 0.5x")
    request = TrainRequest(
        network=_network(stage, scale, triplet=triplet),
        data=data,
        out=open_store(out).url,  # a relative path leads elsewhere in the workers
        recipe=_recipe(recipe, negatives),
        healthy=healthy,
        hgn_half=hgn_half,
        init=init,
        workers=workers if min_workers is None else (min_workers, workers),
        gpus_per_worker=gpus,
        steps=steps,
        learning_rate=learning_rate,
        epoch_steps=epoch_steps,
        selective=not uniform,
        resume=resume,
        seed=seed,
        ledger_shards=ledger_shards,
        object_store_bytes=None if store_mib is None else store_mib * 2**20,
        address=address,
    )
    fit = train_hgn if stage is Stage.HGN else train_prn
    done = fit(request, on_progress=lambda progress: typer.echo(str(progress)))
    typer.echo(f"best  {done.best}")
    typer.echo(f"last  {done.last}")


def _recipe(name: str, negatives: str) -> Recipe:
    if negatives not in get_args(Negatives):
        raise UsageError(f"negatives are {', '.join(get_args(Negatives))}, not '{negatives}'")
    recipe = RECIPES[name]()
    return dataclasses.replace(recipe, prn=dataclasses.replace(recipe.prn, negatives=cast(Negatives, negatives)))


def _network(stage: Stage, scale: str, *, triplet: bool) -> Network:
    if stage is Stage.HGN:
        return "hgn_1x" if scale == "1x" else "hgn_half"
    return "prn" if triplet else "cls"


@app.command()
def bundle(
    hgn_1x: Annotated[
        list[str],
        typer.Option("--hgn-1x", metavar="URL", help="Checkpoint of the 1x hypothesis network, or its run's folder."),
    ],
    hgn_half: Annotated[list[str], typer.Option("--hgn-half", metavar="URL", help="Of the 0.5x hypothesis network.")],
    out: Annotated[str, typer.Option(metavar="URL", help="Where the bundle goes; it must not hold one yet.")],
    prn: Annotated[list[str] | None, typer.Option(metavar="URL", help="Of the refinement network.")] = None,
    cls: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="Of the refinement without triplet loss.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help=f"{', '.join(RECIPES)}; by default what the checkpoints say they are of.")
    ] = None,
    attribution: Annotated[str, typer.Option(help="Of the data they were trained on, as its licence asks.")] = "",
    data: Annotated[str | None, typer.Option(metavar="URL", help="Data set whose validation split calibrates.")] = None,
    healthy: Annotated[
        str | None, typer.Option(metavar="URL", help="With --data: photographs without retinopathy as well.")
    ] = None,
) -> None:
    """Pack the checkpoints of training into a model. An option given twice means the mean of both weights.

    Of a run's folder its best checkpoint is taken. With --data, regions of interest, fusion and threshold are chosen on
    its validation photographs, and with --healthy how sure a lesion must be to be called; the figures are written into
    bundle.json.
    """
    from ma_cluster.bundle import save_bundle
    from ma_cluster.evaluation.calibration import calibrate
    from ma_cluster.evaluation.packing import pack
    from ma_cluster.images.datasets import read_dataset
    from ma_cluster.storage.store import open_store

    if recipe is not None and recipe not in RECIPES:
        raise UsageError(f"no recipe '{recipe}'; there are {', '.join(RECIPES)}")
    with suppress(ObjectMissingError):
        open_store(out).head("bundle.json")
        raise UsageError(f"{out} holds a bundle already, and nothing is overwritten; name another place")
    named = {"hgn_1x": hgn_1x, "hgn_half": hgn_half, "prn": prn, "cls": cls}
    checkpoints = {name: urls for name, urls in named.items() if urls}
    packed = pack(checkpoints, RECIPES[recipe]() if recipe else None, attribution)
    if data:
        unseen = [each for each in read_dataset(data, packed.recipe.split, healthy) if each.split == "validation"]
        if not any(sample.mask for sample in unseen):
            raise UsageError(f"no annotated validation photographs in {data}")
        validation = [sample for sample in unseen if sample.mask or sample.label == "healthy"]
        packed = calibrate(packed, validation, detector_threads())
    typer.echo(f"{out}  digest {save_bundle(packed, out)}")
    own = {name: packed.validation[name] for name in ("detector",) if name in packed.validation}
    for name, figures in (packed.validation.get("rows", {}) | own).items():
        typer.echo(f"{name:<15} average precision {figures['average_precision']:.4f}  best F1 {figures['f1']:.4f}")
