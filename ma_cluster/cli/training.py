"""Commands that make a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from ma_cluster.cli.app import Address, app, detector_threads
from ma_cluster.config import RECIPES, Negatives, Recipe, SplitConfig
from ma_cluster.errors import ObjectMissingError, UsageError

if TYPE_CHECKING:
    from ma_cluster.bundle import Bundle
    from ma_cluster.training.run import Network

train = typer.Typer(help="Train a network; ends with a checkpoint that `bundle` packs.", no_args_is_help=True)
app.add_typer(train, name="train")
_HEALTHY = "Photographs without retinopathy as well: a folder, or a CSV of image and grade."
_ON_RAY = ("workers", "min_workers", "gpus", "store_mib", "address")
"""Options that say what of Ray a training takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """The options of both kinds of network: each becomes one of the command line."""

    data: Annotated[str, typer.Option(metavar="URL", help="Data set: IDRiD's layout, or a manifest.")]
    out: Annotated[str, typer.Option(metavar="URL", help="Where checkpoints and log go.")]
    recipe: Annotated[str, typer.Option(help=f"One of {', '.join(RECIPES)}.")] = "lite"
    healthy: Annotated[str | None, typer.Option(metavar="URL", help=_HEALTHY)] = None
    fold: Annotated[
        int, typer.Option(min=1, max=5, help="Fifth of IDRiD's photographs that validates; 5 is 45-54.")
    ] = 5
    hgn_half: Annotated[str | None, typer.Option(metavar="URL", help="Train more where this one errs.")] = None
    init: Annotated[str | None, typer.Option(metavar="MODEL|URL", help="Begin with these weights.")] = None
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps, instead of the recipe's.")] = None
    minutes: Annotated[
        float | None, typer.Option(help="With --local: end when these are up, the learning rate by the clock.")
    ] = None
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate, instead of the recipe's.")] = None
    epoch_steps: Annotated[int | None, typer.Option(min=1, help="Steps between two checkpoints.")] = None
    seed: Annotated[int, typer.Option(min=0, help="Seed of first weights and draws.")] = 1
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run at --out.")] = False
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch in each worker.")] = None
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False
    device: Annotated[str | None, typer.Option(help="With --local: cpu, cuda, cuda:1, ...")] = None
    workers: Annotated[int | None, typer.Option(min=1, help="Train workers of Ray; 1 by default.")] = None
    min_workers: Annotated[int | None, typer.Option(min=1, help="Go on with as few where nodes are lost.")] = None
    gpus: Annotated[float | None, typer.Option(min=0, help="GPUs of each worker; none by default.")] = None
    store_mib: Annotated[
        int | None, typer.Option(min=80, help="A local Ray's memory for photographs, MiB; the rest is spilled to disk.")
    ] = None
    address: Address = None

    def train(
        self, network: Network, recipe: Recipe, *, selective: bool = True, ledger_shards: int | None = None
    ) -> None:
        """Train a network of a recipe and say where its checkpoints are."""
        from ma_cluster.storage.store import open_store
        from ma_cluster.training.run import TrainRequest

        self._check_place(ledger_shards)
        most = self.workers or 1
        request = TrainRequest(
            network=network,
            data=self.data,
            out=open_store(self.out).url,  # a relative path leads elsewhere in the workers
            recipe=recipe if self.fold == 5 else replace(recipe, split=SplitConfig.fold(self.fold)),
            healthy=self.healthy,
            hgn_half=self.hgn_half,
            init=self.init,
            steps=self.steps,
            minutes=self.minutes,
            learning_rate=self.learning_rate,
            epoch_steps=self.epoch_steps,
            seed=self.seed,
            resume=self.resume,
            threads=self.threads,
            workers=most if self.min_workers is None else (self.min_workers, most),
            gpus_per_worker=self.gpus or 0.0,
            object_store_bytes=None if self.store_mib is None else self.store_mib * 2**20,
            address=self.address,
            selective=selective,
            ledger_shards=ledger_shards or 1,
        )
        if self.local:
            from ma_cluster.training.start import train_local

            done = train_local(request, self.device or "cpu", typer.echo)
        else:
            from ma_cluster.cluster.training.launch import train_on_ray

            done = train_on_ray(request, typer.echo)
        typer.echo(f"best  {done.best}")
        typer.echo(f"last  {done.last}")

    def _check_place(self, ledger_shards: int | None) -> None:
        """Options of Ray and those of --local exclude each other."""
        given = {name: getattr(self, name) for name in _ON_RAY} | {"ledger_shards": ledger_shards}
        named = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
        if self.local and named:
            raise UsageError(f"{', '.join(named)} is for training on Ray; leave it out, or --local")
        if self.minutes is not None and not self.local:
            raise UsageError("--minutes is for training with --local; several workers have no one clock")
        if self.device is not None and not self.local:
            raise UsageError("--device is for training with --local; on Ray --gpus says what each worker has")


def _train_command(command: Callable[..., None]) -> Callable[..., None]:
    """A command of `train` whose options are those of `TrainOptions`, which it is given first, and its own."""

    def run(**given: Any) -> None:
        options = TrainOptions(**{each.name: given.pop(each.name) for each in fields(TrainOptions)})
        command(options, **given)

    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    shared = inspect.signature(TrainOptions, eval_str=True).parameters.values()
    options = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*shared, *own)]
    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in options}
    train.command(command.__name__, help=command.__doc__)(run)
    return command


@_train_command
def hgn(
    options: TrainOptions,
    scale: Annotated[str, typer.Option(help="Scale of the network: 1x or 0.5x.")] = "1x",
) -> None:
    """Train a hypothesis network."""
    if scale not in ("1x", "0.5x"):
        raise UsageError(f"scales are 1x and 0.5x, not '{scale}'")
    options.train("hgn_1x" if scale == "1x" else "hgn_half", _recipe(options.recipe))


@_train_command
def prn(
    options: TrainOptions,
    triplet: Annotated[bool, typer.Option(help="Without it: the ablation `cls`.")] = True,
    uniform: Annotated[bool, typer.Option("--uniform", help="Draw negatives uniformly, not by their loss.")] = False,
    negatives: Annotated[
        str, typer.Option(help="Where negatives come from: regions, photographs or both.")
    ] = "regions",
    healthy_per_image: Annotated[
        int | None, typer.Option(min=1, help="Places of each photograph in the pool, instead of the recipe's.")
    ] = None,
    ledger_shards: Annotated[
        int | None, typer.Option(min=1, help="Actors that keep the healthy pool's losses; 1 by default.")
    ] = None,
) -> None:
    """Train the refinement network."""
    if negatives not in get_args(Negatives):
        raise UsageError(f"negatives are {', '.join(get_args(Negatives))}, not '{negatives}'")
    recipe = _recipe(options.recipe)
    pool = recipe.prn.healthy_per_image if healthy_per_image is None else healthy_per_image
    own = replace(recipe.prn, negatives=cast(Negatives, negatives), healthy_per_image=pool)
    network: Network = "prn" if triplet else "cls"
    options.train(network, replace(recipe, prn=own), selective=not uniform, ledger_shards=ledger_shards)


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise UsageError(f"recipes are {', '.join(RECIPES)}, not '{name}'")
    return RECIPES[name]()


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
    grades: Annotated[
        str | None,
        typer.Option(metavar="CSV", help="Photographs and their grades of retinopathy: image, grade, split."),
    ] = None,
    judge: Annotated[
        bool, typer.Option("--judge", help="With --data: fit the judge of candidates on its training photographs.")
    ] = False,
) -> None:
    """Pack the checkpoints of training into a model. An option given twice means the mean of both weights.

    Of a run's folder its best checkpoint is taken. With --data, regions of interest, fusion and threshold are chosen on
    its validation photographs, and with --healthy how sure a lesion must be to be called. With --grades, the image
    score is fitted to those that train, and calibrated on those that validate, where it refers most of grade 2 and up.
    The figures are written into bundle.json.
    """
    from ma_cluster.bundle import save_bundle
    from ma_cluster.storage.store import open_store
    from ma_cluster.training.checkpoints import pack

    chosen = None if recipe is None else _recipe(recipe)
    with suppress(ObjectMissingError):
        open_store(out).head("bundle.json")
        raise UsageError(f"{out} holds a bundle already, and nothing is overwritten; name another place")
    named = {"hgn_1x": hgn_1x, "hgn_half": hgn_half, "prn": prn, "cls": cls}
    checkpoints = {name: urls for name, urls in named.items() if urls}
    if (judge or healthy) and not data:
        raise UsageError("--judge and --healthy go with photographs whose lesions are outlined: give --data as well")
    packed = pack(checkpoints, chosen, attribution)
    if data and judge:
        packed = _judged(packed, data, healthy)
    packed = _calibrated(packed, data, healthy, grades)
    typer.echo(f"{out}  digest {save_bundle(packed, out)}")
    own = {name: packed.validation[name] for name in ("detector",) if name in packed.validation}
    for name, figures in (packed.validation.get("rows", {}) | own).items():
        typer.echo(f"{name:<15} average precision {figures['average_precision']:.4f}  best F1 {figures['f1']:.4f}")
    if figures := packed.validation.get("grading"):
        said = "  ".join(f"{name} {figures[name]:.4f}" for name in ("area", "sensitivity", "specificity"))
        typer.echo(f"{'image score':<15} {said}")


def _judged(packed: Bundle, data: str, healthy: str | None) -> Bundle:
    """The bundle with a judge of candidates, fitted on the photographs that train."""
    from ma_cluster.images.datasets import read_split
    from ma_cluster.training.checkpoints import with_judge

    return with_judge(packed, read_split(data, packed.recipe.split, "training", healthy), detector_threads())


def _calibrated(packed: Bundle, data: str | None, healthy: str | None, grades: str | None) -> Bundle:
    """The bundle with what photographs choose, of the data sets that are given."""
    from ma_cluster.evaluation.calibration import calibrate, fit_grading
    from ma_cluster.images.datasets import read_dataset, read_graded, read_split

    split = packed.recipe.split
    if data:
        packed = calibrate(packed, read_split(data, split, "validation", healthy), detector_threads())
    if grades:
        annotated = read_dataset(data, split) if data else []
        packed = fit_grading(packed, read_graded(grades, split, annotated), detector_threads())
    return packed
