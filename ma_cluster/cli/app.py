"""The application that the commands register with, how it ends, and the options that several commands share."""

from __future__ import annotations

import logging
import signal
import sys
import textwrap
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from ma_cluster import __version__
from ma_cluster.config import OperatingPoint
from ma_cluster.errors import BundleError, MaClusterError, RunConflictError, UsageError
from ma_cluster.machine import cores


def _whole_or_share(gpus: float) -> float:
    if gpus <= 1 or gpus % 1 == 0:
        return gpus
    raise typer.BadParameter("it takes a whole number, or a share of one")


app = typer.Typer(
    help="Finds microaneurysms in colour fundus photographs, one at a time or by the archive.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Model = Annotated[str, typer.Option(help="Name of a model that ships with the package, or a bundle's folder or URL.")]
Address = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Head of a running Ray cluster; a local Ray without it.")
]
Replicas = Annotated[
    int | None, typer.Option(min=1, help="Photographs segmented at a time; by default one for each core.")
]
Readers = Annotated[
    int, typer.Option(min=1, help="Replicas that fetch, decode and enhance: one for sixteen others, twenty for a GPU.")
]
Gpus = Annotated[
    float,
    typer.Option(min=0, callback=_whole_or_share, help="GPUs for each replica of the networks; a share is allowed."),
]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads of each replica of the networks.")]
Point = Annotated[
    OperatingPoint,
    typer.Option("--operating-point", help="default: the lesions that are sure; sensitive: every place outlined."),
]
FieldDegrees = Annotated[
    float,
    typer.Option(
        min=0, max=360, help="Angle of the photographs' disc where it is known, such as 45; 0 assumes the usual 50."
    ),
]
NoSurround = Annotated[
    bool,
    typer.Option(
        "--no-surround", help="The photographs have no dark surround: --field-degrees lie across their longer side."
    ),
]
Dest = Annotated[str, typer.Argument(metavar="DEST", help="Folder or s3:// prefix of the run.")]

INCOMPLETE = 3
"""Exit status of a run that finished though some photographs were refused or failed."""
_MOST_TILES = 4  # at a time: a photograph's 0.5x grid has no more, and each takes some 300 MB
_LONGEST_MESSAGE = 300  # characters: torch lists every tensor that does not fit


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script: runs a command and exits with its status. The arguments are the process's own by default."""
    signal.signal(signal.SIGTERM, _leave)
    _show_log()
    try:
        app(arguments)
    except MaClusterError as error:
        usage = isinstance(error, UsageError | RunConflictError | BundleError)
        sys.exit(_complain(error, 2 if usage else 1))
    except OSError as error:
        sys.exit(_complain(error, 1))
    sys.exit(0)


def _show_log() -> None:
    """What the package logs goes to stderr as it is: what a command is about, and what it waits for."""
    lines = logging.StreamHandler()
    logger = logging.getLogger("ma_cluster")
    logger.setLevel(logging.INFO)
    logger.handlers = [lines]


def detector_threads() -> int:
    """Threads of a detector that has this process to itself."""
    return min(_MOST_TILES, cores())


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
