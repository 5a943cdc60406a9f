"""Commands that make a model."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from ma_cluster.cli.app import Address, app, detector_threads
from ma_cluster.config import RECIPES, Negatives, Recipe
from ma_cluster.errors import ObjectMissingError, UsageError

if TYPE_CHECKING:
    from ma_cluster.training.loop import Progress
    from ma_cluster.training.run import Network


train = typer.Typer(help="Train a network; ends with a checkpoint that `bundle` packs.", no_args_is_help=True)
app.add_typer(train, name="train")

Data = Annotated[str, typer.Option(metavar="URL", help="Data set: IDRiD's layout, or a manifest.")]
Out = Annotated[str, typer.Option(metavar="URL", help="Where checkpoints and log go.")]
RecipeName = Annotated[str, typer.Option("--recipe", help=f"One of {', '.join(RECIPES)}.")]
Healthy = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Photographs without retinopathy as well: a folder, or a CSV of image and grade."),
]
HgnHalf = Annotated[str | None, typer.Option(metavar="URL", help="Train more where this one errs.")]
Init = Annotated[str | None, typer.Option(metavar="MODEL|URL", help="Begin with these weights.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Optimiser steps, instead of the recipe's.")]
Rate = Annotated[float | None, typer.Option(help="Peak learning rate, instead of the recipe's.")]
EpochSteps = Annotated[int | None, typer.Option(min=1, help="Steps between two checkpoints.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of first weights and draws.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run at --out.")]
TorchThreads = Annotated[int | None, typer.Option(min=1, help="Threads of torch in each worker.")]
Local = Annotated[bool, typer.Option("--local", help="In this process, without Ray.")]
Device = Annotated[str | None, typer.Option(help="With --local: cpu, cuda, cuda:1, ...")]
Workers = Annotated[int | None, typer.Option(min=1, help="Train workers of Ray; 1 by default.")]
MinWorkers = Annotated[int | None, typer.Option(min=1, help="Go on with as few where nodes are lost.")]
WorkerGpus = Annotated[float | None, typer.Option(min=0, help="GPUs of each worker; none by default.")]
StoreMib = Annotated[
    int | None, typer.Option(min=80, help="A local Ray's memory for photographs, MiB; the rest is spilled to disk.")
]


@train.command()
def hgn(
    data: Data,
    out: Out,
    recipe: RecipeName = "lite",
    scale: Annotated[str, typer.Option(help="Scale of the network: 1x or 0.5x.")] = "1x",
    healthy: Healthy = None,
    hgn_half: HgnHalf = None,
    init: Init = None,
    steps: Steps = None,
    learning_rate: Rate = None,
    epoch_steps: EpochSteps = None,
    seed: Seed = 1,
    resume: Resume = False,
    threads: TorchThreads = None,
    local: Local = False,
    device: Device = None,
    workers: Workers = None,
    min_workers: MinWorkers = None,
    gpus: WorkerGpus = None,
    store_mib: StoreMib = None,
    address: Address = None,
) -> None:
    """Train a hypothesis network."""
    if scale not in ("1x", "0.5x"):
        raise UsageError(f"scales are 1x and 0.5x, not '{scale}'")
    given = {"healthy": healthy, "hgn_half": hgn_half, "init": init, "steps": steps, "learning_rate": learning_rate}
    given |= {"epoch_steps": epoch_steps, "seed": seed, "resume": resume, "threads": threads}
    place = {"workers": workers, "min_workers": min_workers, "gpus": gpus, "store_mib": store_mib, "address": address}
    network: Network = "hgn_1x" if scale == "1x" else "hgn_half"
    _train(network, _recipe(recipe), data, out, given | _place(place, local=local, device=device))


@train.command()
def prn(
    data: Data,
    out: Out,
    recipe: RecipeName = "lite",
    healthy: Healthy = None,
    hgn_half: HgnHalf = None,
    init: Init = None,
    triplet: Annotated[bool, typer.Option(help="Without it: the ablation `cls`.")] = True,
    uniform: Annotated[bool, typer.Option("--uniform", help="Draw negatives uniformly, not by their loss.")] = False,
    negatives: Annotated[
        str, typer.Option(help="Where negatives come from: regions, photographs or both.")
    ] = "regions",
    healthy_per_image: Annotated[
        int | None, typer.Option(min=1, help="Places of each photograph in the pool, instead of the recipe's.")
    ] = None,
    steps: Steps = None,
    learning_rate: Rate = None,
    epoch_steps: EpochSteps = None,
    seed: Seed = 1,
    resume: Resume = False,
    threads: TorchThreads = None,
    local: Local = False,
    device: Device = None,
    workers: Workers = None,
    min_workers: MinWorkers = None,
    gpus: WorkerGpus = None,
    ledger_shards: Annotated[
        int | None, typer.Option(min=1, help="Actors that keep the healthy pool's losses; 1 by default.")
    ] = None,
    store_mib: StoreMib = None,
    address: Address = None,
) -> None:
    """Train the refinement network."""
    if negatives not in get_args(Negatives):
        raise UsageError(f"negatives are {', '.join(get_args(Negatives))}, not '{negatives}'")
    chosen = _recipe(recipe)
    pool = chosen.prn.healthy_per_image if healthy_per_image is None else healthy_per_image
    own = dataclasses.replace(chosen.prn, negatives=cast(Negatives, negatives), healthy_per_image=pool)
    given = {"healthy": healthy, "hgn_half": hgn_half, "init": init, "steps": steps, "learning_rate": learning_rate}
    given |= {"epoch_steps": epoch_steps, "seed": seed, "resume": resume, "threads": threads, "selective": not uniform}
    place = {"workers": workers, "min_workers": min_workers, "gpus": gpus, "store_mib": store_mib, "address": address}
    place |= {"ledger_shards": ledger_shards}
    network: Network = "prn" if triplet else "cls"
    chosen = dataclasses.replace(chosen, prn=own)
    _train(network, chosen, data, out, given | _place(place, local=local, device=device))


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise UsageError(f"recipes are {', '.join(RECIPES)}, not '{name}'")
    return RECIPES[name]()


def _place(options: dict[str, Any], *, local: bool, device: str | None) -> dict[str, Any]:
    """Where a run runs, from the options of Ray and those of --local; of one kind none may be given with the other."""
    given = {name: value for name, value in options.items() if value is not None}
    if local:
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageError(f"{names} is for training on Ray; leave it out, or --local")
        return {"device": device or "cpu"}
    if device is not None:
        raise UsageError("--device is for training with --local; on Ray --gpus says what each worker has")
    fewest, most = given.pop("min_workers", None), given.pop("workers", 1)
    renamed = {"gpus": "gpus_per_worker", "store_mib": "object_store_bytes"}
    place = {renamed.get(name, name): value * 2**20 if name == "store_mib" else value for name, value in given.items()}
    return place | {"workers": most if fewest is None else (fewest, most)}


def _train(network: Network, recipe: Recipe, data: str, out: str, given: dict[str, Any]) -> None:
    from ma_cluster.storage.store import open_store
    from ma_cluster.training.run import TrainRequest

    device = given.pop("device", None)
    url = open_store(out).url  # a relative path leads elsewhere in the workers
    request = TrainRequest(network=network, data=data, out=url, recipe=recipe, **given)

    def tell(progress: Progress) -> None:
        typer.echo(str(progress))

    if device is not None:
        from ma_cluster.training.start import train_local

        done = train_local(request, device, tell)
    else:
        from ma_cluster.cluster.training.launch import train_on_ray

        done = train_on_ray(request, tell)
    typer.echo(f"best  {done.best}")
    typer.echo(f"last  {done.last}")


@app.command()
def bundle(
    hgn_1x: Annotated[
        list[str],
        typer.Option("--hgn-1x", metavar="URL", help="Checkpoint of the 1x hypothesis network, or its run's folder."),
    ],
    hgn_half: Annotated[
        list[str], typer.Option("--hgn-half", metavar="URL", help="Checkpoint of the 0.5x hypothesis network.")
    ],
    out: Annotated[str, typer.Option(metavar="URL", help="Where the bundle goes; it must not hold one yet.")],
    prn: Annotated[list[str] | None, typer.Option(metavar="URL", help="Checkpoint of the refinement network.")] = None,
    cls: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="Checkpoint of the refinement without triplet loss.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help=f"{', '.join(RECIPES)}; by default what the checkpoints say they are of.")
    ] = None,
    attribution: Annotated[str, typer.Option(help="The data they were trained on, named as its licence asks.")] = "",
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
    from ma_cluster.images.datasets import read_dataset
    from ma_cluster.storage.store import open_store
    from ma_cluster.training.checkpoints import pack

    chosen = None if recipe is None else _recipe(recipe)
    with suppress(ObjectMissingError):
        open_store(out).head("bundle.json")
        raise UsageError(f"{out} holds a bundle already, and nothing is overwritten; name another place")
    named = {"hgn_1x": hgn_1x, "hgn_half": hgn_half, "prn": prn, "cls": cls}
    checkpoints = {name: urls for name, urls in named.items() if urls}
    packed = pack(checkpoints, chosen, attribution)
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
