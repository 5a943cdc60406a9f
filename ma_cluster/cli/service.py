"""The command that serves over HTTP."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from ma_cluster.cli.app import Address, Gpus, Model, Readers, Replicas, Threads, app


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
