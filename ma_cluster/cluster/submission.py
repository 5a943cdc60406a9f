"""Jobs of jobs/ on a cluster at a distance: what is sent with them, and how they are followed.

In: the name of a job, its arguments, the URL of the cluster's dashboard. Out: the job's lines as they come, and how it
ended. The package's source travels with the job: the cluster needs its dependencies only, and runs what is here. No
environment variable travels: Ray would write its value to the logs of its nodes, so keys of a store are the cluster's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from ma_cluster.errors import MaClusterError, UsageError

_PACKAGE, _JOBS = "ma_cluster", "jobs"
_POLL_S = 1.0
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers that tell of each upload and each connection."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job ended."""

    status: int
    """Exit status; 1 where it has none, because it was stopped or never began."""
    why: str
    """Empty where it succeeded."""


class SubmittedJob:
    """A job that the cluster has taken; it goes on whether somebody follows it or not."""

    def __init__(self, client: JobSubmissionClient, job_id: str) -> None:
        self._client, self.id = client, job_id

    def follow(self, write: Callable[[str], object]) -> Ended:
        """Hand on the job's lines until it ends.

        Raises:
            MaClusterError: the cluster does not know the job any more.
            OSError: the cluster cannot be reached.
        """
        with _refusals():
            asyncio.run(self._follow(write))
            info = self._client.get_job_info(self.id)
        if info.status == JobStatus.SUCCEEDED:
            return Ended(0, "")
        if info.driver_exit_code:
            return Ended(exit_status(info.driver_exit_code), f"ended with exit status {info.driver_exit_code}")
        return Ended(1, f"{info.status.lower()}: {info.message or 'Ray says no more'}")

    async def _follow(self, write: Callable[[str], object]) -> None:
        written = 0
        while True:  # a connection may break, and the next one tells everything from the beginning
            read = 0
            async for text in self._lines():
                write(text[max(0, written - read) :])
                read += len(text)
                written = max(written, read)
            if self._client.get_job_status(self.id).is_terminal():
                return
            await asyncio.sleep(_POLL_S)

    async def _lines(self) -> AsyncIterator[str]:
        try:
            async for text in self._client.tail_job_logs(self.id):
                yield text
        except RuntimeError:  # Ray's word for a connection that broke
            return


def submit(job: str, arguments: Sequence[str], address: str) -> SubmittedJob:
    """Send a job to a cluster. Ray's token goes along where RAY_AUTH_MODE is `token`.

    Args:
        job: name of a file of jobs/, with or without .py.
        arguments: what is given to it on its command line.
        address: URL of the cluster's dashboard, http://HEAD:8265.

    Raises:
        UsageError: no such job, no checkout, not an URL, or the cluster wants another token.
        MaClusterError: the cluster refuses the job.
        OSError: the cluster cannot be reached.
    """
    source = find_source()
    command = entrypoint(source, job, arguments)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    with _refusals(), tempfile.TemporaryDirectory() as folder:
        copy_source(source, Path(folder))
        client = _client(address)
        job_id = client.submit_job(entrypoint=command, runtime_env={"working_dir": folder})
    return SubmittedJob(client, job_id)


def find_source() -> Path:
    """The checkout whose jobs are meant: the working directory, else the one this package is imported from.

    Raises:
        UsageError: there is none.
    """
    for folder in (Path.cwd(), Path(__file__).parents[2]):
        if (folder / _JOBS).is_dir() and (folder / _PACKAGE / "__init__.py").is_file():
            return folder
    raise UsageError("jobs/ is not part of the installed package: give the command in a checkout of ma_cluster")


def entrypoint(source: Path, job: str, arguments: Sequence[str]) -> str:
    """The job's command line, from the folder that is sent.

    Raises:
        UsageError: jobs/ has no such file.
    """
    known = sorted(path.stem for path in (source / _JOBS).glob("*.py"))
    name = Path(job).name.removesuffix(".py")
    if name not in known:
        raise UsageError(f"there is no job '{job}'; jobs/ has {', '.join(known)}")
    return shlex.join(["python", f"{_JOBS}/{name}.py", *arguments])


def copy_source(source: Path, folder: Path) -> None:
    """What is sent of a checkout: package and jobs, and nothing else that may lie there."""
    for name in (_PACKAGE, _JOBS):
        shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def exit_status(driver_exit_code: int) -> int:
    """As a shell would have it: 128 and the signal where one ended the job, which Ray tells as a negative number."""
    return driver_exit_code if driver_exit_code >= 0 else 128 - driver_exit_code


def _client(address: str) -> JobSubmissionClient:
    if not address.startswith(("http://", "https://")):
        raise UsageError(f"'{address}' is not the URL of a dashboard, such as http://HEAD:8265")
    with _only_address(address):
        return JobSubmissionClient(address)


@contextmanager
def _only_address(address: str) -> Iterator[None]:
    """Ray lets RAY_ADDRESS overrule the address that its client is given, but not this variable."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _refusals() -> Iterator[None]:
    """Ray's words for what a cluster does not take -> ours."""
    try:
        yield
    except AuthenticationError as error:
        raise UsageError(
            "the cluster does not take the token, or was given none: "
            "put its own into RAY_AUTH_TOKEN or ~/.ray/auth_token (`ray get-auth-token` shows it there)"
        ) from error
    except RuntimeError as error:
        raise MaClusterError(f"the cluster refuses: {error}") from error
