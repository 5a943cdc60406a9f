"""Commands for whoever runs the machines: serve, plan, doctor, bench, top, submit."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ma_cluster import machine
from ma_cluster.cli.app import Address, Gpus, Model, Readers, Replicas, Threads, app
from ma_cluster.cli.photographs import Source
from ma_cluster.errors import UsageError
from ma_cluster.machine import cores

_WINDOW_S = 60.0  # of rates: Ray's exporters have new values every 10 s


@app.command()
def serve(
    model: Model = "lite",
    host: Annotated[str, typer.Option(help="Address to listen on; other than loopback asks for MA_CLUSTER_TOKEN.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    state: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where archive jobs are kept; by default ~/.local/state/ma_cluster/service."),
    ] = None,
    replicas: Replicas = None,
    readers: Readers = 1,
    gpus: Gpus = 0.0,
    threads: Threads = 1,
    archives: Annotated[int, typer.Option(min=1, help="Archives scored at a time; others wait.")] = 1,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds that one photograph's networks may take.")] = 600.0,
    address: Address = None,
) -> None:
    """Score photographs and archives over HTTP, until it is ended.

    POST /v1/segment, POST /v1/archives, GET /healthz, GET /metrics; /openapi.json says it all.
    """
    from ma_cluster.cluster.fleet.replicas import Fleet
    from ma_cluster.cluster.service.gateway import GatewayConfig, serving

    fleet = Fleet(
        segmenters=replicas,
        readers=readers,
        gpus_per_segmenter=gpus,
        threads_per_segmenter=threads,
        segment_deadline_s=deadline,
        address=address,
    )
    jobs = state or str(Path("~/.local/state/ma_cluster/service").expanduser())
    config = GatewayConfig(model=model, fleet=fleet, state=jobs, archives_at_once=archives)
    with serving(config, host, port) as url:
        typer.echo(f"listening on {url}; archive jobs in {jobs}")
        signal.pause()


@app.command()
def plan(
    source: Source,
    like: Annotated[
        str | None,
        typer.Option(metavar="DEST", help="Go by the stages' seconds of this run, on machines such as those."),
    ] = None,
    model: Model = "lite",
    replicas: Replicas = None,
    readers: Readers = 1,
    gpus: Gpus = 0.0,
    within: Annotated[
        float | None, typer.Option(min=1 / 60, metavar="HOURS", help="Say the fleet that takes no longer.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of an hour of the whole fleet, for the cost.")] = None,
    store_mb: Annotated[
        float | None, typer.Option(min=0, help="MB that the store delivers in a second, at most.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Say what an archive would take, and score nothing.

    Lists the source, reads the headers of a sample, and takes seconds of each stage from a run, --like, or from two
    photographs for each core here, which then does all by itself unless --replicas are given. For --gpus name a run on
    such, or ask where there is one: seconds of a CPU are an upper limit.
    """
    from ma_cluster.archive import forecast
    from ma_cluster.images.sandbox import SandboxConfig
    from ma_cluster.report.console import forecast_lines
    from ma_cluster.storage.manifest import open_source

    segmenters = replicas or _room_here(gpus)
    photographs = open_source(source)
    found, sample = forecast.survey(photographs)
    if like is not None:
        stages = forecast.seconds_of_run(like)
    else:
        from ma_cluster.lesions.detector import Detector

        device, at_once = ("cuda", max(1, int(1 / gpus))) if gpus and machine.gpus() else ("cpu", cores())
        detector, sandbox = Detector.load(model, device=device, threads=1), SandboxConfig(children=at_once)
        stages = forecast.seconds_here(detector, photographs, sample[: 2 * cores()], sandbox)
        if gpus and device == "cpu":
            stages = replace(stages, by="this machine's CPU, an upper limit for a GPU (go by a run on such: --like)")
    capacity = forecast.Capacity(
        segmenters=segmenters,
        reading=readers * SandboxConfig().children,
        shared_cores=cores() if like is None and replicas is None and not gpus else None,
        store_bytes_per_s=store_mb and store_mb * 1e6,
        gpus_per_segmenter=gpus,
    )
    said = forecast.forecast(found, stages, capacity, within and within * 3600)
    if as_json:
        typer.echo(forecast.to_json(found, stages, said, price))
        return
    for line in forecast_lines(found, stages, said, price):
        typer.echo(line)


def _room_here(gpus: float) -> int:
    """Replicas that this machine holds, one for each core where they take no GPUs."""
    if not gpus:
        return cores()
    from ma_cluster.cluster.fleet.replicas import Fleet

    room = Fleet(gpus_per_segmenter=gpus).room(cores(), machine.gpus())
    if not room:
        raise UsageError("this machine lacks the GPUs of one replica: say how many replicas have some, --replicas")
    return room


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


@app.command()
def bench(
    out: Annotated[Path, typer.Option(metavar="FILE.json", dir_okay=False, help="Where the figures go.")],
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="detect, monai, score; all without a name."),
    ] = None,
    model: Model = "lite",
    image: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A photograph; without it one of `sample`, at 12 megapixels."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the networks, ours and the peers'.")] = 1,
    device: Annotated[str, typer.Option(help="Where the networks run: cpu, cuda, cuda:1, ...")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="Passes of which the fastest counts.")] = 1,
) -> None:
    """Measure speed on this machine, beside its peers.

    detect: seconds of each stage, for several flips at 0.5x. monai: the hypothesis networks against MONAI's sliding
    window. score: an archive run against a bare loop. Every ratio is of times of one run.
    """
    from ma_cluster.report.bench import BENCHMARKS, Subject, run_benchmarks

    unknown = sorted(set(names or []) - BENCHMARKS.keys())
    if unknown:
        raise UsageError(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")

    def show(name: str, rows: list[dict[str, Any]] | str) -> None:
        for row in [rows] if isinstance(rows, str) else rows:
            typer.echo(f"{name}  {row if isinstance(row, str) else json.dumps(row)}")

    subject = Subject(model=model, image=image, threads=threads, device=device, repeats=repeats)
    report = run_benchmarks({name: BENCHMARKS[name] for name in names or BENCHMARKS}, subject, show)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")


@app.command()
def top(
    prometheus: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask this Prometheus; without it this machine's Ray.")
    ] = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 10.0,
    once: Annotated[bool, typer.Option("--once", help="Show one frame, after two looks, and end.")] = False,
) -> None:
    """Watch rates, refusals, stage times and losses in the terminal; Ctrl-C ends it."""
    from rich.console import Console
    from rich.live import Live

    from ma_cluster.report.top import View, frame, read_page

    pages = deque([read_page(prometheus)])
    console = Console()
    if once:
        time.sleep(every)
        console.print(frame(View(pages[0], read_page(prometheus))))
        return
    with Live(frame(View(pages[0], pages[0])), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(every)
            pages.append(read_page(prometheus))
            while len(pages) > 2 and pages[-1].at_s - pages[1].at_s >= _WINDOW_S:
                pages.popleft()
            live.update(frame(View(pages[0], pages[-1])), refresh=True)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def submit(
    job: Annotated[str, typer.Argument(metavar="JOB", help="File of jobs/, with or without .py.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[ARGS]...", help="Given to the job.")] = None,
    address: Annotated[
        str, typer.Option(metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard.")
    ] = "http://127.0.0.1:8265",
    wait: Annotated[bool, typer.Option(help="Follow the job and exit with its status.")] = True,
) -> None:
    """Run a job of jobs/ on a cluster, with this package's source, and follow it; ends with its exit status.

    Ctrl-C leaves the job running.
    """
    _use_token()
    from ma_cluster.cluster.submission import submit

    submitted = submit(job, arguments or [], address)
    typer.echo(submitted.id)
    if not wait:
        return
    try:
        ended = submitted.follow(lambda text: typer.echo(text, nl=False))
    except (KeyboardInterrupt, OSError) as error:
        typer.echo("\nthe job goes on; to follow it, or to stop it:", err=True)
        typer.echo(f"  ray job logs --address {address} --follow {submitted.id}", err=True)
        typer.echo(f"  ray job stop --address {address} {submitted.id}", err=True)
        if isinstance(error, OSError):
            raise
        raise typer.Exit(130) from None
    if ended.status:
        typer.echo(f"job {submitted.id} {ended.why}", err=True)
        raise typer.Exit(ended.status)


def _use_token() -> None:
    """Ray's job client sends no token unless told to, and is told before Ray is imported."""
    known = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if known or Path("~/.ray/auth_token").expanduser().is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
