"""What `ma-cluster top` makes of two pages of metrics, and where it finds them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from rich.console import Console

from ma_cluster import metrics
from ma_cluster.cli import main
from ma_cluster.report.top import Page, View, frame, parse, quantile, read_page

BEFORE = """\
# HELP ray_ma_images_total Photographs decided [1]
# TYPE ray_ma_images_total counter
ray_ma_images_total{WorkerId="a",status="scored"} 100.0
ray_ma_images_total{WorkerId="b",status="scored"} 50.0
ray_ma_refused_total{WorkerId="a",reason="truncated"} 2.2250738585072014e-308
ray_node_cpu_utilization{ip="127.0.0.1"} 99.0
"""
NOW = """\
ray_ma_images_total{WorkerId="a",status="scored"} 120.0
ray_ma_images_total{WorkerId="b",status="scored"} 5.0
ray_ma_images_total{WorkerId="c",status="refused"} 15.0
ray_ma_images_in_flight{WorkerId="a"} 3.0
ray_ma_refused_total{WorkerId="c",reason="truncated"} 15.0
ray_ma_refused_total{WorkerId="c",reason="no_fov"} 2.2250738585072014e-308
ray_ma_stage_seconds_bucket{WorkerId="a",stage="hgn",le="1.0"} 0.0
ray_ma_stage_seconds_bucket{WorkerId="a",stage="hgn",le="3.0"} 10.0
ray_ma_stage_seconds_bucket{WorkerId="a",stage="hgn",le="+Inf"} 10.0
ray_ma_stage_seconds_count{WorkerId="a",stage="hgn"} 10.0
ray_ma_stage_seconds_sum{WorkerId="a",stage="hgn"} 20.0
ray_ma_train_patches_total{WorkerId="t",stage="prn"} 640.0
ray_ma_train_wait_seconds_total{WorkerId="t",stage="prn"} 1.0
ray_ma_train_loss{WorkerId="t",stage="prn",term="total"} 0.75
ray_ma_validation_aupr{WorkerId="t",stage="prn"} 0.5
ray_ma_ledger_patches{WorkerId="l"} 3000.0
ray_ma_ledger_patches{WorkerId="m"} 1000.0
ray_ma_ledger_loss_mean{WorkerId="l"} 0.1
ray_ma_ledger_loss_mean{WorkerId="m"} 0.5
ma_archive_remaining{run="77aa"} 1234.0
ma_archive_images{run="77aa",status="scored"} 5678.0
"""
VIEW = View(Page(100.0, parse(BEFORE)), Page(110.0, parse(NOW)))


def shown(view: View) -> list[list[str]]:
    """The words of each line."""
    page = io.StringIO()
    Console(file=page, width=150).print(frame(view))
    return [line.split() for line in page.getvalue().splitlines()]


def test_rates_count_new_series_from_nothing_and_restarted_ones_anew() -> None:
    assert VIEW.rate(metrics.IMAGES) == pytest.approx((20 + 5 + 15) / 10)
    assert VIEW.rate(metrics.IMAGES, status="scored") == pytest.approx(2.5)
    assert VIEW.rate(metrics.LESIONS) is None
    assert View(VIEW.now, VIEW.now).rate(metrics.IMAGES) is None


def test_a_frame_holds_what_runs() -> None:
    lines = shown(VIEW)
    assert ["4", "-", "3", "-", "125", "15", "-"] in lines
    assert ["77aa", "1,234", "5,678", "-", "-"] in lines
    assert ["hgn", "10", "2", "2.9"] in lines
    assert ["truncated", "15", "1.5"] in lines and not any("no_fov" in line for line in lines)
    assert ["prn", "64", "10%", "-", "-", "-", "0.75", "0.5"] in lines
    assert ["4,000", "0.2", "-", "-"] in lines
    assert lines[-1] == ["rates", "over", "the", "last", "10", "s"]


def test_what_each_proxy_tells_of_an_archive_counts_once() -> None:
    pages = "".join(
        f'ma_archive_remaining{{instance="{pod}:8000",run="{run}"}} {left}.0\n'
        f'ma_archive_images{{instance="{pod}:8000",run="{run}",status="scored"}} {100 - left}.0\n'
        f'ray_ma_images_in_flight{{instance="{pod}:8080"}} 3.0\n'
        for pod in ("10.0.0.1", "10.0.0.2")
        for run, left in (("77aa", 7), ("88bb", 5))
    )
    page = Page(0.0, parse(pages))
    assert page.total(metrics.ARCHIVE_REMAINING, run="77aa") == 7
    assert page.total(metrics.ARCHIVE_REMAINING) == 12
    assert page.total(metrics.ARCHIVE_IMAGES, status="scored") == 188
    assert page.total(metrics.IN_FLIGHT) == 6


def test_an_idle_ray_is_told_in_words() -> None:
    idle = Page(0.0, parse('ray_node_cpu_utilization{ip="127.0.0.1"} 1.0\n'))
    assert shown(View(idle, idle))[0][:3] == ["no", "Ray", "that"]


def test_a_quantile_is_interpolated_within_its_bucket() -> None:
    buckets = [(1.0, 10.0), (3.0, 90.0), (float("inf"), 100.0)]
    assert quantile(0.5, buckets) == pytest.approx(2.0)
    assert quantile(0.05, buckets) == pytest.approx(0.5)
    assert quantile(0.99, buckets) == 3.0


@contextmanager
def serving(text: str) -> Iterator[tuple[str, list[str]]]:
    """A server whose every page is the text; yields its address and the paths it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which a Ray of this machine lists its exporters; there is none yet."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    file = tmp_path / "ray" / "session_latest" / "prom_metrics_service_discovery.json"
    file.parent.mkdir(parents=True)
    return file


def test_pages_of_all_exporters_that_answer_are_read(listed: Path) -> None:
    with serving('ray_ma_lesions_total{WorkerId="z"} 7.0\n') as (one, _), serving(NOW) as (other, _):
        listed.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": [one, "127.0.0.1:9", other]}]))
        page = read_page()
    assert (page.total(metrics.LESIONS), page.total(metrics.IMAGES)) == (7, 140)
    assert page.values_of(metrics.IMAGES, "status") == ["refused", "scored"]


def test_a_prometheus_is_asked_for_our_metrics_alone() -> None:
    with serving(NOW) as (address, asked):
        assert read_page(f"http://{address}/").total(metrics.IN_FLIGHT) == 3
    assert asked == ["/federate?match%5B%5D=%7B__name__%3D~%22ray_ma_.%2B%7Cma_archive_.%2B%22%7D"]


def test_one_frame_is_printed_for_pipes(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(NOW) as (address, _), pytest.raises(SystemExit) as ended:
        main(["top", "--prometheus", f"http://{address}", "--once", "--every", "0.1"])
    assert ended.value.code == 0
    assert "photographs/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "exporters", "word"),
    [
        ([], None, "lists no exporters (FileNotFoundError); start a run"),
        ([], ["127.0.0.1:9"], "is it still up?"),
        (["--prometheus", "http://127.0.0.1:9"], None, "make monitor"),
        (["--prometheus", "localhost:9090"], None, "make monitor"),
    ],
)
def test_whoever_does_not_answer_is_named_with_a_cure(
    options: list[str], exporters: list[str] | None, word: str, listed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if exporters is not None:
        listed.write_text(json.dumps([{"targets": exporters}]))
    with pytest.raises(SystemExit) as ended:
        main(["top", "--once", *options])
    assert ended.value.code == 1
    assert word in capsys.readouterr().err
