"""The command that runs a job on a cluster at a distance."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated

import typer

from ma_cluster.cli.app import app
from ma_cluster.errors import UsageError


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def submit(
    job: Annotated[str, typer.Argument(metavar="JOB", help="File of jobs/, with or without .py.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[ARGS]...", help="Of the job.")] = None,
    address: Annotated[
        str, typer.Option(metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard.")
    ] = "http://127.0.0.1:8265",
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Variable that goes along, or a pattern such as 'AWS_*'; may be repeated."),
    ] = None,
    package: Annotated[bool, typer.Option(help="Send the package's source; without it the cluster's is used.")] = True,
    pip: Annotated[bool, typer.Option("--pip", help="Let the cluster install the package's dependencies.")] = False,
    wait: Annotated[bool, typer.Option(help="Follow the job and exit with its status.")] = True,
) -> None:
    """Run a job of jobs/ on a cluster and follow it; ends with its exit status.

    Ctrl-C leaves the job running.
    """
    _use_token()
    from ma_cluster.cluster.submission import Submission, submit

    environment = _chosen(env or [])
    request = Submission(
        job=job, arguments=tuple(arguments or ()), environment=environment, package=package, install=pip
    )
    submitted = submit(request, address)
    typer.echo(submitted.id)
    if environment:
        typer.echo(f"sent along: {', '.join(environment)}", err=True)
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


def _chosen(patterns: list[str]) -> dict[str, str]:
    """Variables of this process by name.

    Raises:
        UsageError: one is not set.
    """
    chosen: dict[str, str] = {}
    for pattern in patterns:
        found = {name: value for name, value in sorted(os.environ.items()) if fnmatch(name, pattern)}
        if not found:
            raise UsageError(f"--env {pattern}: no such variable is set here")
        chosen |= found
    return chosen
