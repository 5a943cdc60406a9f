"""Commands on photographs: single ones, archives, samples."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from ma_cluster.cli.app import (
    INCOMPLETE,
    Address,
    Dest,
    FieldDegrees,
    Gpus,
    Model,
    NoSurround,
    Point,
    Readers,
    Replicas,
    Threads,
    app,
    detector_threads,
)
from ma_cluster.config import KnownField
from ma_cluster.errors import ImageError, UsageError
from ma_cluster.machine import cores

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Folder, s3:// prefix or dicomweb+https:// server of photographs, or a .csv or .parquet that names them.",
    ),
]
FleetName = Annotated[
    str | None, typer.Option("--fleet", metavar="NAME", help="Score on this warm fleet of the cluster.")
]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Go once more over the photographs that failed.")]
Repair = Annotated[bool, typer.Option("--repair", help="First put damaged parts of the run aside, under DEST/damaged.")]
Dicom = Annotated[bool, typer.Option("--dicom", help="Write results as DICOM, too: see `ma-cluster dicom`.")]
KeepIds = Annotated[bool, typer.Option("--keep-ids", help="Results have patients' ids themselves, not pseudonyms.")]


@app.command()
def detect(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", exists=True, dir_okay=False, readable=True)],
    out: Annotated[str, typer.Option(metavar="DIR", help="Where the results go.")],
    model: Model = "lite",
    operating_point: Point = "default",
    field_degrees: FieldDegrees = 0.0,
    no_surround: NoSurround = False,
    device: Annotated[str, typer.Option(help="Where the networks run: cpu, cuda, cuda:1, ...")] = "cpu",
    in_flight: Annotated[
        int | None, typer.Option(min=1, help="Photographs at a time; by default one, and on a GPU one for each core.")
    ] = None,
) -> None:
    """Score single photographs, without a cluster.

    Writes DIR/STEM.json (lesions), STEM_mask.png and STEM_overlay.jpg for each, and one line.
    """
    from ma_cluster.lesions.detector import Detector
    from ma_cluster.report.console import printable
    from ma_cluster.report.detections import check_stems, detect_files
    from ma_cluster.storage.store import open_store

    check_stems(images)
    on_cpu = device == "cpu"
    detector = Detector.load(model, device=device, threads=detector_threads() if on_cpu else None).knowing(
        KnownField(field_degrees, no_surround)
    )
    store = open_store(out)
    unscored = 0
    at_a_time = in_flight or (1 if on_cpu else cores())
    for outcome in detect_files(detector, images, store, operating_point, at_a_time):
        unscored += isinstance(outcome.result, ImageError)
        typer.echo(printable(str(outcome)))
    if unscored:
        raise typer.Exit(INCOMPLETE)


@app.command()
def score(
    source: Source,
    dest: Dest,
    model: Model = "lite",
    replicas: Replicas = None,
    readers: Readers = 1,
    gpus: Gpus = 0.0,
    threads: Threads = 1,
    address: Address = None,
    operating_point: Point = "default",
    fleet_name: FleetName = None,
    retry_failed: RetryFailed = False,
    repair: Repair = False,
    field_degrees: FieldDegrees = 0.0,
    no_surround: NoSurround = False,
    keep_ids: KeepIds = False,
    dicom: Dicom = False,
) -> None:
    """Score an archive; a run cut short goes on where it was.

    A manifest has a column `key`; its columns `field_degrees`, `no_surround`, `patient`, `eye` and `visit` may say more
    of each photograph. Patients get pseudonyms under a salt: MA_CLUSTER_SALT, or one in ~/.local/state/ma_cluster.
    """
    from rich.console import Console

    if fleet_name is not None and (replicas, readers, gpus, threads) != (None, 1, 0.0, 1):
        raise UsageError("a warm fleet has its own sizes: leave out --replicas, --readers, --gpus and --threads")
    from ma_cluster.archive.retry import repair_run
    from ma_cluster.cluster.fleet.driver import retry_archive, score_archive
    from ma_cluster.cluster.fleet.replicas import Fleet
    from ma_cluster.cluster.fleet.workers import Progress
    from ma_cluster.report.console import progress_display, repair_lines, summary_lines
    from ma_cluster.storage.manifest import Photographs
    from ma_cluster.storage.store import open_store

    photographs = Photographs(source, KnownField(field_degrees, no_surround), keep_ids)
    if repair:
        for line in repair_lines(repair_run(photographs.open(), open_store(dest))):
            typer.echo(line)
    last: list[Progress] = []
    with progress_display(Console(stderr=True)) as move:

        def follow(progress: Progress) -> None:
            last[:] = [progress]
            move(progress)

        fleet = Fleet(
            segmenters=replicas,
            readers=readers,
            gpus_per_segmenter=gpus,
            threads_per_segmenter=threads,
            name=fleet_name,
            address=address,
            operating_point=operating_point,
            dicom=dicom,
        )
        run = retry_archive if retry_failed else score_archive
        summary = run(photographs, dest, fleet, model=model, on_progress=follow)
    typer.echo("\n".join(summary_lines(summary, last[0].images_per_second if last else None)))
    raise typer.Exit(0 if summary.complete else INCOMPLETE)


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
    from ma_cluster.archive.summary import missing_keys, read_status
    from ma_cluster.report import console
    from ma_cluster.report.run_report import compare_run

    if as_json:
        values = read_status(dest).to_json()
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
def report(
    dest: Annotated[str, typer.Argument(metavar="DEST|RUN", help="Folder or s3:// prefix of a run or a training.")],
    price: Annotated[
        float | None, typer.Option(min=0, help="Of an hour of all that an archive run was given: says what it cost.")
    ] = None,
) -> None:
    """Write a page of an archive run, or of a training: DEST/report/index.html, one file that may be mailed.

    Of an archive run: counts, times, cost, what was not scored and why, small pictures of the surest photographs. Of a
    training: losses, validation, the ledger. Either may still go on.
    """
    from ma_cluster.report.run_report import is_training, write_report

    if not is_training(dest):
        typer.echo(write_report(dest, price))
        return
    if price is not None:
        raise UsageError("--price is for archive runs; leave it out for a training")
    from ma_cluster.report.training_report import write_training_report

    typer.echo(write_training_report(dest))


@app.command()
def review(
    dest: Dest,
    reviewer: Annotated[
        str, typer.Option(metavar="NAME", help="Who decides; without it the page asks, and each browser keeps its own.")
    ] = "",
    host: Annotated[str, typer.Option(help="Address to listen on; other than loopback asks for MA_CLUSTER_TOKEN.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8010,
) -> None:
    """Serve a page on which people look at an archive run and correct it.

    The run may still go on. Decisions are kept under DEST/reviews/; `ma-cluster reviews` makes training data of them.
    """
    from ma_cluster.review.api import reviewing
    from ma_cluster.review.events import check_reviewer

    with reviewing(dest, check_reviewer(reviewer) if reviewer else "", host, port) as server:
        typer.echo(f"review on http://{host}:{port}; Ctrl-C ends it")
        server.run()


@app.command()
def reviews(
    dest: Dest,
    export: Annotated[
        str | None, typer.Option(metavar="URL", help="Write training data there: masks, manifest, grades, COCO, CSV.")
    ] = None,
    reviewer: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Export what these say; all without it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Show what reviewers have done, and how far they agree with each other and with the model.

    With --export, `ma-cluster train --data URL/manifest.csv` takes what is written, and so do `bundle` and `evaluate`
    with `--grades URL/grades.csv`.
    """
    from ma_cluster.archive.summary import open_run
    from ma_cluster.report.console import review_lines
    from ma_cluster.review.export import export_reviews
    from ma_cluster.review.reviews import compare_reviews
    from ma_cluster.storage.store import open_store

    store, run = open_run(dest)
    compared = compare_reviews(store, run)
    for line in [json.dumps(compared, indent=2)] if as_json else review_lines(compared):
        typer.echo(line)
    if export is not None:
        out = open_store(export)
        done = export_reviews(store, run, out, reviewer or ())
        left = f"; left out: {done.ungradable} ungradable, {done.unfinished} not done"
        typer.echo(
            f"{done.photographs} photographs, {done.with_lesions} with {done.lesions} lesions{left}", err=as_json
        )
        typer.echo(f"{out.url}/manifest.csv", err=as_json)


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
    from ma_cluster.images.sample import write_sample

    archive = write_sample(dest, images, seed)
    drawn = sum(photograph.microaneurysms for photograph in archive.photographs)
    typer.echo(f"{len(archive.photographs)} photographs with {drawn} microaneurysms")
    typer.echo(f"photographs  {archive.url}/{IMAGES_FOLDER.rstrip('/')}")
    typer.echo(f"data set     {archive.url}")
