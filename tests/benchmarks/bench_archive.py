"""What an archive run costs beside the photographs: `bench_archive.py --out FILE.json [--sizes 1000 10000 100000]`.

A local archive of empty objects is planned, driven through workers and committed, with a fleet that answers at once:
what is left is the listing, the plan, the streaming of shards, the outcome parts and the summary. Each size runs in a
process of its own, so that the peak memory is its own; `growth` compares it with the smallest size's.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from ma_cluster import machine
from ma_cluster.archive.run import Run, begin_run, pending
from ma_cluster.archive.shard_scorer import Reading, Segmentation
from ma_cluster.archive.summary import finish_run
from ma_cluster.cluster.fleet.workers import WorkerSpec, score_shards
from ma_cluster.errors import ImageRefusedError, Reason
from ma_cluster.storage.local import LocalStore
from ma_cluster.storage.store import Entry

_WORKERS, _IN_FLIGHT = 2, 8


class StubFleet:
    """Refuses every photograph at once: no pixels, no masks."""

    def read(self, entry: Entry) -> Reading:
        raise ImageRefusedError(Reason.NOT_AN_IMAGE, "an empty object")

    def segment(self, reading: Reading) -> Segmentation:
        raise AssertionError("nothing was read")


class EmptyObjects:
    """A source that lists so many keys; a listing of real objects is the store's own speed."""

    def __init__(self, images: int) -> None:
        self.url = f"empty://{images}"
        self._images = images

    def list(self) -> Iterator[Entry]:
        for number in range(self._images):
            yield Entry(f"2026/{number // 1000:06d}/photograph_{number:09d}.jpg", 0, f"{number:032x}")

    def head(self, key: str) -> Entry:
        return Entry(key, 0, "")

    def get(self, key: str, *, max_bytes: int | None = None, etag: str | None = None) -> bytes:
        return b""


def main() -> None:
    """Measure each size in a child process and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        arguments.out.write_text(json.dumps(measure(arguments.one)))
        return
    rows = []
    for size in arguments.sizes:
        command = [sys.executable, __file__, "--out", str(arguments.out), "--one", str(size)]
        subprocess.run(command, check=True)
        rows.append(json.loads(arguments.out.read_text()))
    for row in rows:
        row["growth_bytes_per_key"] = (row["peak_bytes"] - rows[0]["peak_bytes"]) / row["keys"]
    report = {
        "benchmark": "archive",
        "workers": _WORKERS,
        "in_flight": _IN_FLIGHT,
        "machine": machine.describe(),
        "sizes": rows,
    }
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


def measure(images: int) -> dict[str, Any]:
    """One size: seconds and keys a second of planning, driving and the summary; the driver's peak memory."""
    ray.init(address="local", _node_ip_address="127.0.0.1", num_cpus=4, include_dashboard=False, log_to_driver=False)
    warm_up()
    ready = _peak_bytes()
    with tempfile.TemporaryDirectory() as folder:
        dest, seconds = LocalStore(Path(folder)), {}
        began = time.perf_counter()
        run = begin_run(EmptyObjects(images), dest, "model", "config")
        seconds["plan"] = time.perf_counter() - began
        drive(dest, run)
        seconds["drive"] = time.perf_counter() - began - seconds["plan"]
        summary = finish_run(dest, run)
        seconds["finish"] = time.perf_counter() - began - seconds["plan"] - seconds["drive"]
    ray.shutdown()
    assert summary.counts.statuses == {"refused": images}
    return {
        "keys": images,
        "seconds": seconds,
        "keys_per_second": {name: images / value for name, value in seconds.items()},
        "peak_bytes": _peak_bytes(),
        "peak_bytes_before": ready,
    }


def drive(dest: LocalStore, run: Run) -> None:
    """Score all that is pending."""
    spec = WorkerSpec(StubFleet, dest.url, dest.url, run, _IN_FLIGHT)
    score_shards(pending(dest, run), spec, min(_WORKERS, run.plan.images))


def warm_up() -> None:
    """Ray's workers are up before anything is measured."""
    with tempfile.TemporaryDirectory() as folder:
        dest = LocalStore(Path(folder))
        drive(dest, begin_run(EmptyObjects(2), dest, "model", "config"))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
