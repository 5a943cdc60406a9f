"""What a service under mixed load grows by: `bench_soak.py --out FILE.json [--minutes 20]`.

A real `ma-cluster serve`, tiny networks, small photographs: one upload at a time, good ones and bad, lists and metrics
between them, and one archive job after the other, each into a destination of its own. Every few seconds memory, file
descriptors and threads of each kind of process, the object store, and Ray's session folder; slopes are those of the
second half, when everything has been loaded.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
from PIL import Image

from ma_cluster import machine
from ma_cluster.images.sample import retina

sys.path.insert(0, str(Path(__file__).parents[1]))
from processes import Process, descendants
from servers import free_ports
from untrained import untrained_bundle

from ma_cluster.bundle import save_bundle
from ma_cluster.storage.local import LocalStore

EYES = 6  # of each archive
KEPT = 5  # destinations; older ones are removed, as nobody keeps them on this disk
REPLICAS = ("gateway", "reader", "segmenter", "ProxyActor", "ServeController", "raylet", "gcs_server", "sandbox_child")
PASSING = ("DriverProcess", "_Worker", "SharedCount", "ma_cluster score")  # of an archive job, as long as it runs
KINDS = (*REPLICAS, *PASSING)
SHOWN = 12  # looks that are written; slopes are of all
BAD = (b"", b"<html>", b"\xff\xd8\xff" * 40)


def main() -> None:
    """Serve, load, look, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two uploads")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two looks")
    parser.add_argument("--job-every", type=float, default=45.0, help="seconds between two archive jobs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as service:
        load = Load(service.port, Path(folder), arguments.pause, arguments.job_every)
        for work in (load.upload, load.archives):
            threading.Thread(target=work, daemon=True).start()
        looks, began = [], time.monotonic()
        while (after_s := time.monotonic() - began) < 60 * arguments.minutes:
            try:
                looks.append({"seconds": round(after_s, 1), **look(service.process.pid)})
            except OSError:  # Ray's exporter has its turn last where the machine has others to serve
                load.unseen += 1
            if looks:
                write(arguments.out, after_s / 60, load, looks)  # what is known outlives whatever ends this
            time.sleep(arguments.every)
        load.ended.set()


def write(out: Path, minutes: float, load: Load, looks: list[dict[str, Any]]) -> None:
    """The figures so far."""
    answers = {str(status): count for status, count in sorted(load.answers.items())}
    report = {"benchmark": "soak", "machine": machine.describe(), "minutes": round(minutes, 1), "answers": answers}
    report |= {"jobs": dict(load.jobs), "looks_in_vain": load.unseen, "slopes": slopes(looks)}
    report |= {"looks": looks[:: -(-len(looks) // SHOWN)]}
    out.write_text(json.dumps(report, indent=2) + "\n")


@dataclass(frozen=True, slots=True)
class Serving:
    """A service that is up."""

    process: subprocess.Popen[str]
    port: int


@contextmanager
def serving(folder: Path) -> Iterator[Serving]:
    """`ma-cluster serve` with tiny networks, on a Ray of its own."""
    save_bundle(untrained_bundle(), folder / "model")
    source = LocalStore(folder / "source")
    for number in range(EYES):
        source.put(f"eye-{number}.jpg", photograph(300 + number))
    source.put("page.jpg", BAD[1])
    (port,) = free_ports(1)
    options = ["--model", str(folder / "model"), "--state", str(folder / "state"), "--port", str(port)]
    command = [sys.executable, "-m", "ma_cluster", "serve", *options, "--replicas", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert "listening" in process.stdout.readline()
        yield Serving(process, port)
    finally:
        process.terminate()
        process.wait(timeout=120)


def photograph(side: int) -> bytes:
    """A real photograph, small, encoded."""
    out = io.BytesIO()
    Image.fromarray(retina()).resize((side, side)).save(out, "JPEG", quality=90)
    return out.getvalue()


class Load:
    """What is asked of the service, from two threads, and what it answers."""

    def __init__(self, port: int, folder: Path, pause_s: float, job_every_s: float) -> None:
        self._port, self._folder, self._pause_s, self._job_every_s = port, folder, pause_s, job_every_s
        self.answers: Counter[int] = Counter()
        self.jobs: Counter[str] = Counter()
        self.ended = threading.Event()
        self.unseen = 0
        """Looks that Ray did not answer."""

    def upload(self) -> None:
        """Photographs, one at a time; each tenth is none, and lists and metrics are asked for beside them."""
        eyes, number = [photograph(300 + side) for side in range(EYES)], 0
        while not self.ended.wait(self._pause_s):
            number += 1
            body = BAD[number // 10 % len(BAD)] if number % 10 == 0 else eyes[number % EYES]
            accept = ("application/json", "image/png", "image/jpeg")[number % 3]
            self._ask("POST", "/v1/segment", body, Accept=accept)
            if number % 5 == 0:
                self._ask("GET", ("/v1/archives", "/metrics", "/healthz", "/nowhere")[number // 5 % 4])

    def archives(self) -> None:
        """One archive job after the other, each followed to its end."""
        number = 0
        while not self.ended.wait(self._job_every_s):
            number += 1
            wanted = {"source": str(self._folder / "source"), "destination": str(self._folder / f"dest-{number}")}
            job = self._ask("POST", "/v1/archives", json.dumps(wanted).encode(), Content_Type="application/json")
            while not self.ended.wait(2.0):
                state = self._ask("GET", f"/v1/archives/{job['id']}")["state"]
                if state not in ("queued", "running"):
                    self.jobs[state] += 1
                    break
            shutil.rmtree(self._folder / f"dest-{number - KEPT}", ignore_errors=True)

    def _ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Any:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)) as connection:
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            data = answer.read()
        self.answers[answer.status] += 1
        return json.loads(data) if answer.getheader("Content-Type") == "application/json" else data


def look(pid: int) -> dict[str, Any]:
    """Figures of the processes below one, summed by kind, and of the Ray they belong to."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    session = None
    for process in descendants(pid):
        found = re.search(r"--session_dir=(\S+)", process.title)
        session = Path(found[1]) if found else session
        kinds[kind_of(process)].update(figures(process.pid))
    kinds["serve"].update(figures(pid))
    assert session is not None
    written = sum(file.stat().st_size for file in session.rglob("*") if file.is_file())
    return {"processes": kinds, "object_store_bytes": object_store(session), "session_bytes": written}


def kind_of(process: Process) -> str:
    """A word for what a process is."""
    return next((kind for kind in KINDS if kind in process.title), "other")


def figures(pid: int) -> dict[str, int]:
    """Processes (1), anonymous memory, file descriptors and threads; nothing of one that has ended meanwhile."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return {}
    values = dict(re.findall(r"^(RssAnon|Threads):\s+(\d+)", status, re.MULTILINE))
    memory = 1024 * int(values.get("RssAnon", 0))
    return {"processes": 1, "memory_bytes": memory, "descriptors": descriptors, "threads": int(values["Threads"])}


def object_store(session: Path) -> float:
    """Bytes that objects take, as the Ray's exporter says."""
    listed = json.loads((session / "prom_metrics_service_discovery.json").read_text())
    with urlopen(f"http://{listed[0]['targets'][0]}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return sum(float(value) for value in re.findall(r"^ray_object_store_memory\{.*\} (\S+)$", text, re.MULTILINE))


def slopes(looks: list[dict[str, Any]]) -> dict[str, Any]:
    """Growth an hour, by least squares over the second half, with the figure at its end."""
    half = looks[len(looks) // 2 :]
    hours = np.array([look["seconds"] for look in half]) / 3600
    found: dict[str, Any] = {}
    for kind in sorted(set.intersection(*(set(look["processes"]) for look in half))):
        for name in ("memory_bytes", "descriptors", "threads"):
            values = [look["processes"][kind][name] for look in half]
            found[f"{kind} {name}"] = {"last": values[-1], "an_hour": _slope(hours, values)}
    for name in ("object_store_bytes", "session_bytes"):
        values = [look[name] for look in half]
        found[name] = {"last": values[-1], "an_hour": _slope(hours, values)}
    return found


def _slope(hours: Any, values: list[float]) -> float:
    return round(float(np.polyfit(hours, values, 1)[0]), 1) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
