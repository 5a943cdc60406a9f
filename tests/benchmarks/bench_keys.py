"""What an archive run costs beside its photographs: `bench_keys.py --out FILE.json [--sizes 10000 100000 1000000]`.

A manifest of so many keys is planned. Half of the shards are committed here, as if by an earlier driver, with rows as
long as those of scored photographs; then `status` and `status --missing` are asked. The other half goes through the
worker processes of a real Ray, with a fleet that refuses each photograph at once. Then the run is finished, counted and
reported. Each step has a process of its own, so that its peak memory is its own. `cpu_seconds` are its own, too (those
of Ray's processes are not in them), and hold beside other work. Of 10^7 keys the file says what follows from the last
two sizes, were each step a straight line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from ma_cluster import machine
from ma_cluster.archive.audit import write_audit
from ma_cluster.archive.outcomes import Outcome
from ma_cluster.archive.plan import read_shard, shards
from ma_cluster.archive.run import begin_run, commit, pending
from ma_cluster.archive.shard_scorer import Reading, Segmentation
from ma_cluster.archive.summary import finish_run, open_run
from ma_cluster.errors import ImageRefusedError, Reason, Triage
from ma_cluster.images.fundus import Fov
from ma_cluster.images.quality import Quality
from ma_cluster.images.reading import Facts
from ma_cluster.lesions.findings import Findings, Lesion
from ma_cluster.metrics import STAGES
from ma_cluster.storage.manifest import open_source
from ma_cluster.storage.store import Entry, open_store

_WORKERS, _IN_FLIGHT = 2, 8
_FORECAST = 10**7
_FOLDER = 1000  # photographs; all folders are links to the first
_LESION = Lesion(1, 1400.5, 2100.5, (1395, 2095, 1406, 2106), 90, 10.7, 0.8, 0.6, 0.9, 500.0)
_SCORED = Outcome(
    key="",
    etag="",
    reason=None,
    attempts=1,
    facts=Facts(2848, 4288, Fov(1424.0, 2144.0, 3410.0), Quality(0.4, 0.1, 0.08, 0.02, 0.2, 0.9, True, ()), {}),
    findings=Findings((_LESION, replace(_LESION, id=2)), 0.7, Triage.REFER),
    mask_key="masks/photograph-0123456789abcdef.png",
    overlay_key="overlays/photograph-0123456789abcdef.jpg",
    seconds=dict.fromkeys(STAGES, 0.5),
)


class StubFleet:
    """Refuses every photograph at once: no pixels, no masks."""

    def read(self, entry: Entry) -> Reading:
        raise ImageRefusedError(Reason.NOT_AN_IMAGE, "an empty object")

    def segment(self, reading: Reading) -> Segmentation:
        raise AssertionError("nothing was read")


def main() -> None:
    """Measure each size and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5, 10**6])
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        print(json.dumps(STEPS[given.step](given.out) | {"peak_bytes": _peak_bytes()}))  # noqa: T201
        return
    rows = [measure(size) for size in given.sizes]
    report = {"benchmark": "keys", "workers": _WORKERS, "in_flight": _IN_FLIGHT, "machine": machine.describe()}
    report |= {"sizes": rows, "forecast": forecast(*rows[-2:])}
    given.out.write_text(json.dumps(report, indent=2) + "\n")


def measure(keys: int) -> dict[str, Any]:
    """One size: seconds and peak memory of each step."""
    steps: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="ma-keys-") as name:
        folder, dest = Path(name), f"{name}/dest"
        write_archive(folder, keys)
        for step in ("plan", "commit"):
            steps[step] = _own(step, folder)
        steps["status"], _ = _command("status", dest)
        steps["status --missing"], listed = _command("status", dest, "--missing")
        for step in ("drive", "finish"):
            steps[step] = _own(step, folder)
        for command in ("status", "report"):
            steps[f"{command}, finished"], _ = _command(command, dest)
        summary = json.loads((folder / "dest/summary.json").read_text())
        missing = summary["statuses"]["refused"]
        assert sum(summary["statuses"].values()) == keys and listed.count(b"\n") == missing > 0
        plan_bytes = sum(part.stat().st_size for part in (folder / "dest/plan").iterdir())
    return {"keys": keys, "missing": missing, "plan_bytes": plan_bytes, "steps": steps}


def write_archive(folder: Path, keys: int) -> None:
    """A manifest of so many photographs; a thousand small files, under many names."""
    first = folder / "day-00000"
    first.mkdir(parents=True)
    (folder / "dest").mkdir()
    for number in range(min(keys, _FOLDER)):
        (first / f"photograph-{number:03d}.jpg").write_bytes(b"")
    for day in range(1, -(-keys // _FOLDER)):
        (folder / f"day-{day:05d}").symlink_to(first)
    with (folder / "manifest.csv").open("w") as lines:
        lines.write("key\n")
        lines.writelines(f"day-{n // _FOLDER:05d}/photograph-{n % _FOLDER:03d}.jpg\n" for n in range(keys))


def plan(folder: Path) -> dict[str, float]:
    """List the manifest and write the plan."""
    source = open_source(f"{folder}/manifest.csv")
    return _timed(lambda: begin_run(source, open_store(folder / "dest"), "m" * 64, "c" * 64))


def commit_half(folder: Path) -> dict[str, float]:
    """Commit and audit every other half of the plan's shards."""
    dest, run = open_run(f"{folder}/dest")

    def work() -> None:
        half = sum(1 for _ in shards(dest, run.plan)) // 2
        for shard in islice(pending(dest, run), half):
            known = [replace(_SCORED, key=entry.key, etag=entry.etag) for entry in read_shard(dest, shard)]
            commit(dest, run, shard, known)
            write_audit(dest, run, shard.number)

    return _timed(work)


def drive(folder: Path) -> dict[str, float]:
    """Send what is pending through the workers of a Ray that is up."""
    import ray

    from ma_cluster.cluster.fleet.workers import WorkerSpec, score_shards

    ray.init(address="local", _node_ip_address="127.0.0.1", num_cpus=4, include_dashboard=False, log_to_driver=False)
    dest, run = open_run(f"{folder}/dest")
    ready = _peak_bytes()
    spec = WorkerSpec(StubFleet, dest.url, dest.url, run, _IN_FLIGHT)
    measured = _timed(lambda: score_shards(pending(dest, run), spec, _WORKERS))
    ray.shutdown()
    return measured | {"peak_bytes_before": ready}


def finish(folder: Path) -> dict[str, float]:
    """Count all outcomes and write the summary."""
    return _timed(lambda: finish_run(*open_run(f"{folder}/dest")))


STEPS: dict[str, Callable[[Path], dict[str, float]]] = {
    "plan": plan,
    "commit": commit_half,
    "drive": drive,
    "finish": finish,
}


def forecast(smaller: dict[str, Any], larger: dict[str, Any]) -> dict[str, Any]:
    """What each step would take of `_FORECAST` keys."""
    more, keys = (_FORECAST - larger["keys"]) / (larger["keys"] - smaller["keys"]), larger["keys"]
    steps = {
        step: {name: value + more * (value - smaller["steps"][step][name]) for name, value in measured.items()}
        for step, measured in larger["steps"].items()
    }
    return {"keys": _FORECAST, "from": [smaller["keys"], keys], "steps": steps}


def _own(step: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--step", step, "--out", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _command(*arguments: str) -> tuple[dict[str, float], bytes]:
    """A command as users give it: seconds from its start to its end, peak memory, and what it prints."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen([sys.executable, "-m", "ma_cluster", *arguments], stdout=out)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        out.seek(0)
        cpu_seconds = used.ru_utime + used.ru_stime
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": used.ru_maxrss * 1024}, out.read()


def _timed(work: Callable[[], object]) -> dict[str, float]:
    began, cpu = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
