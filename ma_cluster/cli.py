"""The command line: each command parses, calls one function of the package, and writes lines.

Exit status: 0 all scored; 1 the run failed; 2 wrong usage; 3 finished, but some photographs were refused or failed;
130 on Ctrl-C; 143 on SIGTERM. torch and Ray are imported by the commands that need them.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import textwrap
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ma_cluster import __version__
from ma_cluster.config import RECIPES
from ma_cluster.errors import BundleError, MaClusterError, RunConflictError, UsageError

app = typer.Typer(
    help="Finds microaneurysms in colour fundus photographs, one at a time or by the archive.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Model = Annotated[str, typer.Option(help="Name of a model that ships with the package, or a bundle's folder.")]
Dest = Annotated[str, typer.Argument(metavar="DEST", help="Folder or s3:// prefix of the run.")]

_INCOMPLETE = 3
_LONGEST_MESSAGE = 300  # characters: torch lists every tensor that does not fit


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script: runs a command and exits with its status. The arguments are the process's own by default."""
    signal.signal(signal.SIGTERM, _leave)
    try:
        app(arguments)
    except MaClusterError as error:
        usage = isinstance(error, UsageError | RunConflictError | BundleError)
        sys.exit(_complain(error, 2 if usage else 1))
    except OSError as error:
        sys.exit(_complain(error, 1))
    sys.exit(0)


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _complain(error: Exception, status: int) -> int:
    message = textwrap.shorten(str(error), _LONGEST_MESSAGE, placeholder=" ...")
    typer.echo(f"ma-cluster: {message}", err=True)
    return status


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"ma-cluster {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


@app.command()
def detect(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", exists=True, dir_okay=False, readable=True)],
    out: Annotated[str, typer.Option(metavar="DIR", help="Where the results go.")],
    model: Model = "lite",
) -> None:
    """Score single photographs, without a cluster.

    Writes DIR/STEM.json (lesions), STEM_mask.png and STEM_overlay.jpg for each, and one line.
    """
    from ma_cluster.images.store import open_store
    from ma_cluster.lesions.detector import Detector
    from ma_cluster.report.console import printable
    from ma_cluster.report.detections import check_stems, detect_file

    check_stems(images)
    detector, store = Detector.load(model), open_store(out)
    refused = 0
    for image in images:
        outcome = detect_file(detector, image, store)
        refused += outcome.refusal is not None
        typer.echo(printable(str(outcome)))
    if refused:
        raise typer.Exit(_INCOMPLETE)


@app.command()
def score(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder or s3:// prefix of the photographs.")],
    dest: Dest,
    model: Model = "lite",
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Photographs segmented at a time; by default one for each core.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster; a local Ray without it.")] = None,
) -> None:
    """Score an archive; a run cut short goes on where it was."""
    from rich.console import Console

    from ma_cluster.cluster.driver import Progress, score_archive
    from ma_cluster.cluster.scoring_app import Fleet
    from ma_cluster.report.console import summary_lines
    from ma_cluster.report.progress import progress_display

    last: list[Progress] = []
    with progress_display(Console(stderr=True)) as move:

        def follow(progress: Progress) -> None:
            last[:] = [progress]
            move(progress)

        fleet = Fleet(segmenters=replicas, address=address)
        summary = score_archive(source, dest, fleet, model=model, on_progress=follow)
    rate = last[0].images_per_second if last else None
    for line in summary_lines(summary, rate):
        typer.echo(line)
    if not summary.complete:
        raise typer.Exit(_INCOMPLETE)


@app.command()
def status(
    dest: Dest,
    missing: Annotated[bool, typer.Option("--missing", help="List the keys that are not yet decided.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
    truth: Annotated[
        str | None, typer.Option(metavar="DATA", help="Compare with the masks of this data set's test split.")
    ] = None,
) -> None:
    """Show how an archive run stands."""
    from ma_cluster.report import console
    from ma_cluster.report.status import missing_keys, read_status, to_json
    from ma_cluster.report.truth import compare_run

    if as_json:
        values = to_json(read_status(dest))
        values |= {"missing": list(missing_keys(dest))} if missing else {}
        values |= {"truth": dataclasses.asdict(compare_run(dest, truth))} if truth else {}
        typer.echo(json.dumps(values, indent=2))
        return
    if missing:
        for key in missing_keys(dest):
            typer.echo(console.printable(key))
    else:
        for line in console.status_lines(read_status(dest)):
            typer.echo(line)
    if truth is not None:
        for line in console.agreement_lines(compare_run(dest, truth)):
            typer.echo(line)


@app.command()
def sample(
    dest: Annotated[str, typer.Argument(metavar="DEST", help="Folder or s3:// prefix of the archive.")],
    images: Annotated[int, typer.Option(min=1, help="Photographs.")] = 6,
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws other lesions.")] = 0,
) -> None:
    """Write a small archive with known truth.

    The lesions are drawn into variations of a public-domain photograph; the layout is IDRiD's.
    """
    from ma_cluster.images.datasets import IMAGES_FOLDER
    from ma_cluster.images.sample_archive import write_sample

    archive = write_sample(dest, images, seed)
    drawn = sum(photograph.microaneurysms for photograph in archive.photographs)
    typer.echo(f"{len(archive.photographs)} photographs with {drawn} microaneurysms")
    typer.echo(f"photographs  {archive.url}/{IMAGES_FOLDER.rstrip('/')}")
    typer.echo(f"data set     {archive.url}")


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
    healthy: Annotated[str | None, typer.Option(metavar="URL", help="Photographs without retinopathy.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Train workers.")] = 1,
    min_workers: Annotated[int | None, typer.Option(min=1, help="Go on with as few where nodes are lost.")] = None,
    gpus: Annotated[float, typer.Option(min=0, help="For each worker.")] = 0.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps, instead of the recipe's.")] = None,
    epoch_steps: Annotated[int | None, typer.Option(min=1, help="Steps between two checkpoints.")] = None,
    triplet: Annotated[bool, typer.Option(help="Without it: the ablation `cls`.")] = True,
    uniform: Annotated[bool, typer.Option("--uniform", help="Draw negatives uniformly, not by their loss.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run at --out.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of first weights and draws.")] = 1,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster; a local Ray without it.")] = None,
) -> None:
    """Train a network on Ray; ends with a checkpoint that `bundle` packs."""
    from ma_cluster.cluster.train_hgn import train_hgn
    from ma_cluster.cluster.train_prn import train_prn
    from ma_cluster.cluster.training import Network, TrainRequest

    if recipe not in RECIPES or scale not in ("1x", "0.5x"):
        raise UsageError(f"recipes are {', '.join(RECIPES)}, scales 1x and 0.5x")
    hypothesis: Network = "hgn_1x" if scale == "1x" else "hgn_half"
    refinement: Network = "prn" if triplet else "cls"
    request = TrainRequest(
        network=hypothesis if stage is Stage.HGN else refinement,
        data=data,
        out=out,
        recipe=RECIPES[recipe](),
        healthy=healthy,
        workers=workers if min_workers is None else (min_workers, workers),
        gpus_per_worker=gpus,
        steps=steps,
        epoch_steps=epoch_steps,
        selective=not uniform,
        resume=resume,
        seed=seed,
        address=address,
    )
    fit = train_hgn if stage is Stage.HGN else train_prn
    done = fit(request, on_progress=lambda progress: typer.echo(str(progress)))
    typer.echo(f"best  {done.best}")
    typer.echo(f"last  {done.last}")


@app.command()
def bundle(
    hgn_1x: Annotated[str, typer.Option("--hgn-1x", metavar="URL", help="Checkpoint of the 1x hypothesis network.")],
    hgn_half: Annotated[str, typer.Option("--hgn-half", metavar="URL", help="Of the 0.5x hypothesis network.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the bundle; it must not hold one yet.")],
    prn: Annotated[str | None, typer.Option(metavar="URL", help="Of the refinement network.")] = None,
    cls: Annotated[str | None, typer.Option(metavar="URL", help="Of the refinement without triplet loss.")] = None,
    recipe: Annotated[str, typer.Option(help=f"Recipe of the networks: {', '.join(RECIPES)}.")] = "lite",
    attribution: Annotated[str, typer.Option(help="Of the data they were trained on, as its licence asks.")] = "",
    data: Annotated[str | None, typer.Option(metavar="URL", help="Data set whose validation split calibrates.")] = None,
) -> None:
    """Pack the checkpoints of training into a model.

    With --data, regions of interest, fusion and threshold are chosen on its validation photographs, and the figures are
    written into bundle.json.
    """
    from ma_cluster.bundle import save_bundle
    from ma_cluster.images.datasets import read_dataset
    from ma_cluster.lesions.packing import pack

    if recipe not in RECIPES:
        raise UsageError(f"no recipe '{recipe}'; there are {', '.join(RECIPES)}")
    if (out / "bundle.json").exists():
        raise UsageError(f"{out} holds a bundle already, and nothing is overwritten; name another folder")
    chosen = RECIPES[recipe]()
    samples = read_dataset(data, chosen.split) if data else []
    validation = [sample for sample in samples if sample.split == "validation" and sample.mask]
    if data and not validation:
        raise UsageError(f"no annotated validation photographs in {data}")
    named = {"hgn_1x": hgn_1x, "hgn_half": hgn_half, "prn": prn, "cls": cls}
    checkpoints = {name: url for name, url in named.items() if url is not None}
    packed = pack(checkpoints, chosen, attribution, validation)
    typer.echo(f"{out}  digest {save_bundle(packed, out)}")
    for name, figures in packed.validation.get("rows", {}).items():
        typer.echo(f"{name:<15} average precision {figures['average_precision']:.4f}  best F1 {figures['f1']:.4f}")


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
