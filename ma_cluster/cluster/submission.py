"""Jobs of jobs/ on a cluster at a distance: what is sent with them, and how they are followed.

In: the name of a job, its arguments, the URL of the cluster's dashboard. Out: the job's lines as they come, and how it
ended. The package's source travels with the job: the cluster needs its dependencies only, and runs what is here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import shutil
import tempfile
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
_SHORTEST_SECRET = 6  # characters: shorter values are ports and switches, and would be blotted out everywhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A job as it is sent."""

    job: str
    """Name of a file of jobs/, with or without .py."""
    arguments: tuple[str, ...] = ()
    """Of the job's own command line."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Variables that job and workers get on top of the cluster's. Ray keeps them, and its nodes' logs hold them."""
    package: bool = True
    """Send the source of the package; without it the cluster's installed one is used."""
    install: bool = False
    """Let the cluster install the package's dependencies first, into an environment of the job."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job ended."""

    status: int
    """Exit status; 1 where it has none, because it was stopped or never began."""
    why: str
    """Empty where it succeeded."""


class SubmittedJob:
    """A job that the cluster has taken; it goes on whether somebody follows it or not."""

    def __init__(self, client: JobSubmissionClient, job_id: str, environment: Mapping[str, str]) -> None:
        self._client, self.id = client, job_id
        self._blots = {form: f"<{name}>" for name, value in environment.items() for form in _forms(value)}

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
        return Ended(1, f"{info.status.lower()}: {self._blotted(info.message or 'Ray says no more')}")

    async def _follow(self, write: Callable[[str], object]) -> None:
        written = 0
        while True:  # a connection may break, and the next one tells everything from the beginning
            read = 0
            async for text in self._lines():
                write(self._blotted(text[max(0, written - read) :]))
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

    def _blotted(self, text: str) -> str:
        """Without the values that were sent: Ray writes a job's environment into its log."""
        for value, name in self._blots.items():
            text = text.replace(value, name)
        return text


def submit(submission: Submission, address: str) -> SubmittedJob:
    """Send a job to a cluster. Ray's token goes along where RAY_AUTH_MODE is `token`.

    Args:
        submission: the job.
        address: URL of the cluster's dashboard, http://HEAD:8265.

    Raises:
        UsageError: no such job, no checkout, not an URL, or the cluster wants another token.
        MaClusterError: the cluster refuses the job.
        OSError: the cluster cannot be reached.
    """
    source = find_source()
    command = entrypoint(source, submission)
    with _refusals(), tempfile.TemporaryDirectory() as folder:
        _quieten()
        client = _client(address)
        job_id = client.submit_job(
            entrypoint=command, runtime_env=runtime_env(source, submission, Path(folder) / "source")
        )
    return SubmittedJob(client, job_id, submission.environment)


def find_source() -> Path:
    """The checkout whose jobs are meant: the working directory, else the one this package is imported from.

    Raises:
        UsageError: there is none.
    """
    for folder in (Path.cwd(), Path(__file__).parents[2]):
        if (folder / _JOBS).is_dir() and (folder / _PACKAGE / "__init__.py").is_file():
            return folder
    raise UsageError("jobs/ is not part of the installed package: give the command in a checkout of ma_cluster")


def entrypoint(source: Path, submission: Submission) -> str:
    """The job's command line, from the folder that is sent.

    Raises:
        UsageError: jobs/ has no such file.
    """
    known = sorted(path.stem for path in (source / _JOBS).glob("*.py"))
    name = Path(submission.job).name.removesuffix(".py")
    if name not in known:
        raise UsageError(f"there is no job '{submission.job}'; jobs/ has {', '.join(known)}")
    return shlex.join(["python", f"{_JOBS}/{name}.py", *submission.arguments])


def runtime_env(source: Path, submission: Submission, folder: Path) -> dict[str, Any]:
    """Ray's description of what a job runs in.

    Args:
        source: a checkout.
        submission: the job.
        folder: takes a copy of what is sent, and no more of the checkout; it need not exist.
    """
    for name in (_PACKAGE, _JOBS) if submission.package else (_JOBS,):
        shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment: dict[str, Any] = {"working_dir": str(folder)}
    if submission.environment:
        environment["env_vars"] = dict(submission.environment)
    if submission.install:
        environment["pip"] = _dependencies(source)
    return environment


def exit_status(driver_exit_code: int) -> int:
    """As a shell would have it: 128 and the signal where one ended the job, which Ray tells as a negative number."""
    return driver_exit_code if driver_exit_code >= 0 else 128 - driver_exit_code


def _dependencies(source: Path) -> list[str]:
    """Of the package, but for Ray, whose version is the cluster's."""
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    return [requirement for requirement in project["dependencies"] if not requirement.startswith("ray[")]


def _client(address: str) -> JobSubmissionClient:
    if not address.startswith(("http://", "https://")):
        raise UsageError(f"'{address}' is not the URL of a dashboard, such as http://HEAD:8265")
    with _only_address(address):
        return JobSubmissionClient(address)


def _quieten() -> None:
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)


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
    try:
        yield
    except AuthenticationError as error:
        raise UsageError(
            "the cluster does not take the token, or was given none: "
            "put its own into RAY_AUTH_TOKEN or ~/.ray/auth_token (`ray get-auth-token` shows it there)"
        ) from error
    except RuntimeError as error:
        raise MaClusterError(f"the cluster refuses: {error}") from error


def _forms(value: str) -> set[str]:
    return {value, json.dumps(value)[1:-1]} if len(value) >= _SHORTEST_SECRET else set()
