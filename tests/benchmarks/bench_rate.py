"""How many photographs a second one driver and one fleet carry, were networks fast: `bench_rate.py --out FILE.json`.

Everything is real but the networks, which sleep: shards, worker processes, Serve's routing, arrays of a 12-megapixel
photograph through the object store, masks, overlays and outcomes on a local disk. Three kinds of reader tell apart what
holds a run back:

    real       fetches, decodes and prepares each photograph
    arrays     hands over one that was prepared before: what is left is the way of the pixels and of the results
    nothing    hands over no pixels: what is left are messages

Of each run the file says the rate from its first commit to its last, and how many cores each kind of process kept busy
meanwhile. Then the same on 1, 2 and 4 raylets of this machine, with as many Segmenters: `efficiency` is the rate over
that of one raylet.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import ray
from PIL import Image
from ray import serve

sys.path.insert(0, str(Path(__file__).parents[1]))
from processes import descendants, kill
from second_node import second_node

from ma_cluster import machine
from ma_cluster.archive import plan
from ma_cluster.archive.run import begin_run, pending
from ma_cluster.archive.shard_scorer import Segmentation
from ma_cluster.cluster.fleet.replicas import Fleet, Model, Reader
from ma_cluster.cluster.fleet.scoring_app import ScoringApp, reader_app
from ma_cluster.cluster.fleet.workers import OnProgress, Progress, WorkerSpec, score_shards, workers_for
from ma_cluster.config import ImageConfig
from ma_cluster.errors import Triage
from ma_cluster.images.decode import decode
from ma_cluster.images.reading import read_bytes
from ma_cluster.images.sample import retina
from ma_cluster.lesions.findings import Findings
from ma_cluster.storage.local import LocalStore
from ma_cluster.storage.store import Entry

_SIDE_PX = 3464
_STORE_BYTES = 10**9
_SEGMENTERS = 4
_MASK, _OVERLAY = os.urandom(15_000), os.urandom(1_200_000)  # as large as those of 12 megapixels
_FLEET = Fleet(segmenters=_SEGMENTERS, readers=1)


class StubReader:
    """Hands over the same photograph time and again, with its pixels or without."""

    def __init__(self, data: bytes, pixels: bool) -> None:
        self._read = read_bytes(data, ImageConfig(), lambda data: decode(data, ImageConfig()))
        self._pixels = pixels

    def read(self, source: str, entry: Entry) -> Iterator[Any]:
        prepared, facts = self._read
        yield facts
        yield prepared if self._pixels else None


class StubSegmenter:
    """Networks that sleep; `calls` grows by a byte with each photograph."""

    def __init__(self, seconds: float, calls: str) -> None:
        self._seconds, self._calls = seconds, calls

    def segment(self, prepared: Any, operating_point: str) -> Segmentation:
        time.sleep(self._seconds)
        with open(self._calls, "ab") as calls:  # noqa: PTH123
            calls.write(b".")
        return Segmentation(Findings((), 0.1, Triage.NONE), _MASK, _OVERLAY, {"hgn": self._seconds})


@dataclass(frozen=True, slots=True)
class Case:
    """One run."""

    reader: str
    network_ms: int
    photographs: int
    raylets: int = 1


def cases(photographs: int) -> list[Case]:
    """Runs of about as many seconds each."""
    slept = [0, 20, 50]
    return [
        *[Case("real", ms, photographs) for ms in slept],
        *[Case("arrays", ms, 4 * photographs) for ms in slept],
        *[Case("nothing", ms, 16 * photographs) for ms in slept],
        *[Case(kind, 50, 4 * photographs, raylets) for kind in ("arrays", "nothing") for raylets in (1, 2, 4)],
    ]


def main() -> None:
    """Measure each case and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--photographs", type=int, default=24, help="of a run that reads them; others have more")
    parser.add_argument("--raylets", type=int, default=4, help="at most")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="ma-rate-") as name:
        folder = Path(name)
        source, wanted = write_photographs(folder / "source", 16 * given.photographs), cases(given.photographs)
        for raylets in sorted({case.raylets for case in wanted if case.raylets <= given.raylets}):
            with ExitStack() as nodes:
                start(raylets, nodes)
                for case in (case for case in wanted if case.raylets == raylets):
                    rows.append(measure(case, source, folder / f"dest-{len(rows)}"))
                    print(json.dumps(rows[-1]))  # noqa: T201
    for row in rows:
        one = [r for r in rows if r["raylets"] == 1 and all(r[k] == row[k] for k in ("reader", "network_ms"))][-1]
        row["efficiency"] = row["photographs_per_second"] / one["photographs_per_second"]
    report = {"benchmark": "rate", "segmenters": _SEGMENTERS, "machine": machine.describe(), "runs": rows}
    given.out.write_text(json.dumps(report, indent=2) + "\n")


def start(raylets: int, nodes: ExitStack) -> None:
    """A Ray of so many raylets that have the same CPUs together."""
    cpus = (_SEGMENTERS + 4) // raylets
    settings: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _STORE_BYTES, "log_to_driver": False}
    ray.init(address="local", _node_ip_address="127.0.0.1", num_cpus=cpus, **settings)
    nodes.callback(ray.shutdown)
    nodes.callback(serve.shutdown)
    for _ in range(raylets - 1):
        nodes.enter_context(second_node(cpus, _STORE_BYTES))


def measure(case: Case, source: LocalStore, dest: Path) -> dict[str, Any]:
    """One case: its rate, and the cores that each kind of process kept busy."""
    at: list[tuple[float, int, dict[str, float]]] = []

    def note(progress: Progress) -> None:
        if len(at) < 2 or progress.done == progress.total:
            at.append((time.monotonic(), progress.done, busy_seconds()))

    score(case, source, dest, note)
    (began, before, busy), (ended, after, busy_then) = at[1], at[-1]
    cores = {kind: round((spent - busy.get(kind, 0.0)) / (ended - began), 3) for kind, spent in busy_then.items()}
    return {
        "reader": case.reader,
        "network_ms": case.network_ms,
        "raylets": case.raylets,
        "photographs": case.photographs,
        "photographs_per_second": (after - before) / (ended - began),
        "cores": dict(sorted(cores.items(), key=lambda item: -item[1])),
        "cores_in_all": round(sum(cores.values()), 3),
        "load_average_1min": os.getloadavg()[0],
    }


def score(case: Case, source: LocalStore, dest: Path, on_progress: OnProgress) -> float:
    """Drive the run of a case, and say when its first worker was asked for."""
    dest.mkdir()
    app = deploy(case, source, f"{dest}/calls")
    run = begin_run(source, LocalStore(dest), "m" * 64, "c" * 64, islice(source.list(), case.photographs))
    workers, in_flight = workers_for(case.photographs, _FLEET)
    spec = WorkerSpec(partial(ScoringApp, app.name, _FLEET, source.url), str(dest), str(dest), run, in_flight)
    began = time.monotonic()
    score_shards(pending(LocalStore(dest), run), spec, workers, on_progress)
    app.delete()
    return began


def lose_a_worker(photographs: int, network_ms: int, shards: int) -> dict[str, Any]:
    """A run without pixels, whole, and again with a worker killed half way: seconds, and photographs scored again."""
    case, found = Case("nothing", network_ms, photographs), dict[str, Any]()
    with tempfile.TemporaryDirectory(prefix="ma-rate-") as name, ExitStack() as nodes:
        source = write_photographs(Path(name, "source"), photographs)
        start(1, nodes)
        nodes.enter_context(mock.patch.object(plan, "SHARDS_WANTED", shards))  # as an archive of many more has them
        score(replace(case, photographs=32), source, Path(name, "warm-up"), print)
        for way in ("whole", "killed"):
            commits, killed = list[float](), list[float]()

            def note(progress: Progress, way: str = way, commits: Any = commits, killed: Any = killed) -> None:
                commits.append(time.monotonic())
                if way == "killed" and not killed and progress.done > photographs // 2:
                    killed.append(time.monotonic())
                    kill([p for p in descendants(os.getpid()) if kind_of(p.title) == "workers"][:1])

            began = score(case, source, Path(name, way), note)
            again = Path(name, way, "calls").stat().st_size - photographs
            found[way] = {"seconds": commits[-1] - began, "first_commit_s": commits[0] - began, "again": again}
            found[way] |= {"killed_s": killed[0] - began} if killed else {}
    return found | {"photographs": photographs, "network_ms": network_ms, "shards": shards}


def deploy(case: Case, source: LocalStore, calls: str) -> ScoringApp:
    """The fleet of a case, under the names by which `ScoringApp` knows one."""
    name = f"rate-{case.reader}-{case.network_ms}"
    if case.reader == "real":
        reading = reader_app(Model("", "", ImageConfig()), _FLEET)
    else:
        children = _FLEET.sandbox.children
        stub = serve.deployment(name=Reader.__name__, max_ongoing_requests=children)(StubReader)
        reading = stub.bind(source.get("eye-00000.jpg"), case.reader == "arrays")
    segmenting = serve.deployment(
        name="Segmenter", num_replicas=_SEGMENTERS, max_ongoing_requests=1, ray_actor_options={"num_cpus": 1}
    )(StubSegmenter)
    targets = {"reader": reading, "segmenter": segmenting.bind(case.network_ms / 1000, calls)}
    serve.start(proxy_location="Disabled")
    serve.run_many([serve.RunTarget(app, name=f"{name}-{part}", route_prefix=None) for part, app in targets.items()])
    return ScoringApp(name, replace(_FLEET, name=name), source.url)


def write_photographs(folder: Path, count: int) -> LocalStore:
    """One real photograph of 12 megapixels, under many names."""
    out = io.BytesIO()
    Image.fromarray(retina()).resize((_SIDE_PX, _SIDE_PX), Image.Resampling.LANCZOS).save(out, "JPEG", quality=92)
    store = LocalStore(folder)
    store.put("eye-00000.jpg", out.getvalue())
    for number in range(1, count):
        (folder / f"eye-{number:05d}.jpg").symlink_to("eye-00000.jpg")
    return store


def busy_seconds() -> dict[str, float]:
    """CPU seconds so far of this process and of all below it, by what they are."""
    found, tick = defaultdict[str, float](float), os.sysconf("SC_CLK_TCK")
    for pid, title in [(os.getpid(), "driver"), *((each.pid, each.title) for each in descendants(os.getpid()))]:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended while we looked
            continue
        found[kind_of(title)] += (int(fields[11]) + int(fields[12])) / tick
    return found


def kind_of(title: str) -> str:
    """What a process is, by its title."""
    known = {
        "driver": "^driver$",
        "readers": "ServeReplica:.*-reader",
        "decoders": "sandbox_child",
        "segmenters": "ServeReplica:.*-segmenter",
        "workers": "_Worker",
        "raylets": "raylet/raylet",
        "gcs": "gcs_server",
        "serve": "ServeController",
    }
    return next((kind for kind, pattern in known.items() if re.search(pattern, title)), "other")


if __name__ == "__main__":
    main()
