"""A real Prometheus watches a real Ray that scores archives and trains: panels have data, alerts fire when they should.

    sound archive | refused files, then a Segmenter stopped while a network is trained
    no alert      | MaRefusalsHigh ............ MaThroughputStalled

Time is short: windows of rules are seconds here, where they are minutes. promtool tests them as they are.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlencode

import pytest
from archive_runs import replicas
from deploy_files import PROMETHEUS, Query, panel_queries, rules
from fundus_set import write_training_set
from PIL import Image
from processes import kill
from ray_head import Head, running_head
from servers import free_ports

from ma_cluster.http.fleet_service import ArchiveMetrics
from ma_cluster.metrics import REFUSED
from ma_cluster.report.top import exported

pytestmark = pytest.mark.long
NEEDS_GPU = {"GPU in use", "GPU memory in use"}
"""Panels without data here: no machine with a GPU."""
INJECTED = {"MaRefusalsHigh", "MaThroughputStalled"}
_PATIENCE_S = 300.0  # each wait takes less than a minute where nothing else runs
RULES_HASTENED = {"[15m]": "[20s]", "[30m]": "[60s]", "[5m]": "[20s]", "for: 10m": "for: 50s", "for: 5m": "for: 2s"}
SCRAPES = {"scrape_interval: 15s": "scrape_interval: 1s", "evaluation_interval: 15s": "evaluation_interval: 1s"}


@dataclass(frozen=True, slots=True)
class Watch:
    """A Prometheus that is up."""

    url: str

    def ask(self, path: str, **parameters: Any) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urlencode(parameters)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def firing(self) -> set[str]:
        alerts = self.ask("alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def wait_for(self, alert: str, timeout_s: float, meanwhile: Callable[[], None] = lambda: None) -> None:
        deadline = time.monotonic() + timeout_s
        while alert not in self.firing():
            assert time.monotonic() < deadline, f"{alert} does not fire"
            meanwhile()
            time.sleep(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What the Prometheus has seen."""

    watch: Watch
    began: float
    sound_until: float
    ended: float
    exporters: Path

    def values(self, expr: str, until: float | None = None) -> list[dict[str, Any]]:
        """The series of an expression that had a value at any time."""
        promql = expr.replace("$__rate_interval", "10s").replace("$session", ".*")
        promql = promql.replace("$stage", ".*").replace("$network", ".*")
        span = {"start": self.began, "end": until or self.ended, "step": 1}
        series = self.watch.ask("query_range", query=promql, **span)["result"]
        return [one for one in series if any(value != "NaN" for _, value in one["values"])]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Iterator[Story]:
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus on the PATH: apt-get install prometheus")
    folder = tmp_path_factory.mktemp("monitoring")
    write_archives(folder)
    with ExitStack() as stack:
        stack.enter_context(exporting_every(milliseconds=2000))
        head = stack.enter_context(running_head(cpus=6))
        service = stack.enter_context(archive_metrics([folder / "sound-run", folder / "bad-run"]))
        exporters = head.folder / "session_latest" / "prom_metrics_service_discovery.json"
        watch = stack.enter_context(running_prometheus(folder / "prometheus", exporters, service))
        yield tell(head, watch, folder, tiny_bundle, exporters)


def tell(head: Head, watch: Watch, folder: Path, model: Path, exporters: Path) -> Story:
    began = time.time()
    with job(head, folder, "score_archive.py", "sound", "sound-run", "--model", str(model), "--replicas", "1") as sound:
        assert sound.wait(timeout=_PATIENCE_S) == 0
    sound_until = time.time()
    with job(head, folder, "score_archive.py", "bad", "bad-run", "--model", str(model), "--replicas", "1"):
        watch.wait_for("MaRefusalsHigh", timeout_s=_PATIENCE_S)
        stop_segmenters()
        places = ("--data", str(folder / "set"), "--out", str(folder / "prn"))
        steps = ("--steps", "4", "--epoch-steps", "2", "--recipe", "tiny")
        with job(head, folder, "train_prn.py", *places, *steps) as training:
            deadline = time.monotonic() + _PATIENCE_S
            while training.poll() is None and time.monotonic() < deadline:
                stop_segmenters()
                time.sleep(1)
            assert training.returncode == 0
        watch.wait_for("MaThroughputStalled", timeout_s=_PATIENCE_S, meanwhile=stop_segmenters)
        time.sleep(2)  # what fires now must lie on a whole step of the story's series
        kill(replicas("segmenter"))  # stopped, they would keep the head from ending
    return Story(watch=watch, began=began, sound_until=sound_until, ended=time.time(), exporters=exporters)


def stop_segmenters() -> None:
    """Those that run now: Serve replaces one that hangs, so the stall lasts only if the new one is stopped, too."""
    for segmenter in replicas("segmenter"):
        os.kill(segmenter.pid, signal.SIGSTOP)


def write_archives(folder: Path) -> None:
    """A sound archive; one of whose files a fifth are no photographs; a training set."""
    from ma_cluster.images.sample import retina

    eye = Image.fromarray(retina()).resize((400, 400))
    for name, photographs, pages in (("sound", 16, 0), ("bad", 60, 16)):
        (folder / name).mkdir()
        for number in range(pages):
            # among the photographs: a counter's first value says nothing of an increase
            (folder / name / f"b{4 * number:02}x.jpg").write_text("<html>the archive is closed</html>")
        for number in range(photographs):
            eye.rotate(5 * number).save(folder / name / f"b{number:02}.jpg")
    write_training_set(folder / "set")


@contextmanager
def exporting_every(milliseconds: int) -> Iterator[None]:
    """A Ray started within has new values so often, not every 10 s."""
    name = "RAY_metrics_report_interval_ms"
    os.environ[name] = str(milliseconds)
    try:
        yield
    finally:
        del os.environ[name]


@contextmanager
def job(head: Head, folder: Path, script: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A job of jobs/ on the cluster, run in the folder; killed at the end where it still runs."""
    command = [sys.executable, str(Path(__file__).parents[2] / "jobs" / script), *arguments]
    environment = dict(head.environment) | {"RAY_ADDRESS": head.gcs}
    with (folder / f"{script}.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def archive_metrics(destinations: list[Path]) -> Iterator[str]:
    """The Gateway's /metrics of some runs, without the Gateway; yields host and port."""
    known = ArchiveMetrics(lambda: [str(path) for path in destinations])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(known.text())

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def running_prometheus(folder: Path, exporters: Path, service: str) -> Iterator[Watch]:
    """With the configuration of deploy/, but for addresses and intervals."""
    shutil.copytree(PROMETHEUS / "rules", folder / "rules")
    for path in (folder / "rules").iterdir():
        path.write_text(replaced(path.read_text(), RULES_HASTENED))
    config = (PROMETHEUS / "prometheus.yml").read_text()
    config = re.sub(r"/tmp/ray/session_latest/\S+\.json", str(exporters), config)
    config = re.sub(r"( scrape_interval: 30s.*\n.*scrape_timeout: 25s)", " scrape_interval: 2s", config)
    (folder / "prometheus.yml").write_text(replaced(config, SCRAPES).replace("127.0.0.1:8000", service))
    (port,) = free_ports(1)
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}/-/ready", process, folder / "log.txt")
        yield Watch(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait()


def replaced(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)


def test_every_panel_has_data(story: Story) -> None:
    empty = {query.where.partition(": ")[2] for query in panel_queries() if not story.values(query.expr)}
    assert empty == NEEDS_GPU


def test_every_recording_rule_has_data(story: Story) -> None:
    records = [rule["record"] for rule in rules() if "record" in rule]
    assert [record for record in records if not story.values(record)] == []


def test_whatever_an_alert_looks_at_has_data(story: Story) -> None:
    looked_at = {name for rule in rules() if "alert" in rule for name in Query("", rule["expr"]).metrics}
    assert [name for name in looked_at if not story.values(name)] == []


def test_alerts_are_quiet_on_a_sound_archive_and_fire_on_refusals_and_a_stalled_run(story: Story) -> None:
    fired = 'ALERTS{alertstate="firing"}'
    assert story.values(fired, until=story.sound_until) == []
    assert {series["metric"]["alertname"] for series in story.values(fired)} == INJECTED


@pytest.mark.parametrize("asked", ["prometheus", "ray"])
def test_top_shows_it_in_the_terminal(story: Story, asked: str, tmp_path: Path) -> None:
    (tmp_path / "ray").symlink_to(story.exporters.parents[1])
    options = ("--prometheus", story.watch.url) if asked == "prometheus" else ()
    command = [sys.executable, "-m", "ma_cluster", "top", "--once", "--every", "1", *options]
    environment = os.environ | {"RAY_TMPDIR": str(tmp_path)}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    (refused,) = story.watch.ask("query", query=f'sum({exported(REFUSED)}{{reason="not_an_image"}})')["result"]
    assert re.search(rf"not_an_image +{refused['value'][1]} ", shown)
    for title in ("archives", "stage times", "refused and failed", "training"):
        assert title in shown


def test_a_local_ray_without_a_dashboard_tells_where_its_metrics_are() -> None:
    code = """
from ma_cluster.cluster.connection import connected
from ma_cluster.report.top import read_page
with connected(None, waiting_cpus=0):
    print(read_page().samples)
"""
    with tempfile.TemporaryDirectory(prefix="ma-") as folder:  # short: Ray makes the paths of sockets from it
        environment = os.environ | {"RAY_TMPDIR": folder}
        environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "{}\n", done.stderr
