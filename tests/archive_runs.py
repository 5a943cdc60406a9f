"""Archive runs as tests need them: photographs, outcomes by key, the fleet's processes, drivers that may be killed."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from processes import Process, descendants, kill, processes, wait_until_gone

from ma_cluster.archive.outcomes import SCHEMA
from ma_cluster.archive.retry import latest_outcomes
from ma_cluster.archive.run import read_run
from ma_cluster.storage.store import Store

JOB = Path(__file__).parents[1] / "jobs" / "score_archive.py"


def upload_eyes(source: Store, count: int) -> None:
    """Variants of a small real photograph, no two alike."""
    from ma_cluster.images.sample import retina

    eye = Image.fromarray(retina())
    for number in range(count):
        out, side = io.BytesIO(), 300 + number
        eye.resize((side, side)).rotate(90 * (number % 4)).save(out, "JPEG", quality=90)
        source.put(f"eye-{number:02d}.jpg", out.getvalue())


def rows(dest: Store) -> dict[str, dict[str, Any]]:
    """The latest outcomes by key; a key that is there twice fails."""
    run = read_run(dest)
    assert run is not None
    listed = [row for table in latest_outcomes(dest, run, SCHEMA.names) for row in table.to_pylist()]
    by_key = {row["key"]: row for row in listed}
    assert len(by_key) == len(listed)
    return by_key


def results(dest: Store, *but: str) -> dict[str, dict[str, Any]]:
    """Outcomes without what differs from run to run: times, and the columns named."""
    return {
        key: {name: value for name, value in row.items() if not name.startswith("seconds_") and name not in but}
        for key, row in rows(dest).items()
    }


def masks(dest: Store) -> dict[str, bytes]:
    """The masks of the photographs that were scored, by key."""
    return {key: dest.get(row["mask_key"]) for key, row in rows(dest).items() if row["status"] == "scored"}


def replicas(kind: str = "") -> list[Process]:
    """Processes of the fleet on this test run's own Ray, which names them after the deployment."""
    own = descendants(os.getpid())
    prefix = "ray::ServeReplica:ma-cluster-"
    return [process for process in own if process.title.startswith(prefix) and kind in process.title]


@contextmanager
def driver(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """The scoring job as a process of its own, with a Ray of its own; whatever of it is left at the end is killed.

    Args:
        arguments: of `ma-cluster score`.
        log: where its output goes.
        environment: variables that differ from this process's.
    """
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, str(JOB), *arguments],
            stdout=out,
            stderr=out,
            start_new_session=True,
            env=os.environ | dict(environment or {}),
        )
    try:
        yield process
    finally:
        # Ray's own processes end with the driver they belong to, its workers with those.
        left = family(process)
        process.kill()
        process.wait()
        wait_until_gone(left, timeout_s=30)
        kill(left)


def family(process: subprocess.Popen[bytes]) -> list[Process]:
    """All that a driver has started, and itself; some of it outlives its parent."""
    started = descendants(process.pid) + [other for other in processes() if other.session == process.pid]
    return list(dict.fromkeys(started))
