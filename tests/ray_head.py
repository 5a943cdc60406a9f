"""A Ray of its own beside the tests' shared one: a head that asks for a token, as a cluster at a distance does."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import descendants, kill, wait_until_gone
from servers import free_ports

RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A head node that is up."""

    dashboard: str
    """URL of the dashboard, where jobs are submitted."""
    gcs: str
    """Host and port by which nodes and drivers join."""
    folder: Path
    """Sessions and their logs; short, as Ray makes the paths of sockets from it."""
    environment: Mapping[str, str]
    """Of a process that may use the cluster: with the token."""


@contextmanager
def running_head(cpus: int) -> Iterator[Head]:
    """A head on loopback, on free ports, with its own folder; its processes are ended by their ids."""
    gcs, dashboard = free_ports(2)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    path = os.pathsep.join([str(Path(RAY).parent), os.environ["PATH"]])  # jobs begin with `python`
    environment = os.environ | token | {"RAY_USAGE_STATS_ENABLED": "0", "PATH": path}
    environment.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="ma-ray-", ignore_cleanup_errors=True) as folder:
        command = [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}"]
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--dashboard-agent-listen-port=0"]
        command += [f"--temp-dir={folder}", f"--num-cpus={cpus}", "--object-store-memory=209715200"]
        with ray_process(command, environment, Path(folder) / "head.log") as process:
            head = Head(
                dashboard=f"http://127.0.0.1:{dashboard}",
                gcs=f"127.0.0.1:{gcs}",
                folder=Path(folder),
                environment=environment,
            )
            _wait_for_dashboard(head, process)
            yield head


@contextmanager
def ray_process(command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A `ray start --block`; it and all that it started are gone after the block, by their ids."""
    with log.open("wb") as lines:
        process = subprocess.Popen(command, stdout=lines, stderr=lines, env=dict(environment))
    try:
        yield process
    finally:
        started = descendants(process.pid)
        process.terminate()
        process.wait()
        kill(wait_until_gone(started, timeout_s=10))


def _wait_for_dashboard(head: Head, process: subprocess.Popen[bytes]) -> None:
    headers = {"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/", headers=headers)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(request, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the head did not come up: {(head.folder / 'head.log').read_text()[-2000:]}")
