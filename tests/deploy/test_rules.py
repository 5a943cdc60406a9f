"""Prometheus's configuration and rules, Grafana's dashboards: that they are valid, and name metrics that exist."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy_files import DASHBOARDS, DEPLOY, PROMETHEUS, RULES, Query, panel_queries, panels, rules
from servers import free_ports

from ma_cluster import metrics
from ma_cluster.report.top import exported

RAYS_OWN = {
    "ray_node_cpu_utilization",
    "ray_node_gpus_utilization",
    "ray_node_gram_used",
    "ray_node_mem_total",
    "ray_node_mem_used",
    "ray_object_store_available_memory",
    "ray_object_store_memory",
    "ray_object_store_used_memory",
    "ray_resources",
    "ray_serve_deployment_queued_queries",
    "ray_serve_deployment_replica_healthy",
    "ray_serve_deployment_replica_starts_total",
}
"""What Ray 2.60 itself exports; test_monitoring sees that it does."""
OURS = (*metrics.ARCHIVE_METRICS, *metrics.LEDGER_METRICS, *metrics.TRAIN_METRICS, *metrics.ARCHIVE_STATE)


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("no promtool on the PATH: apt-get install prometheus")
    return found


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_configuration_is_valid(promtool: str) -> None:
    assert "2 rule files found" in run(promtool, "check", "config", "prometheus.yml")


def test_the_rules_are_valid(promtool: str) -> None:
    run(promtool, "check", "rules", *map(str, RULES))


def test_each_alert_fires_and_stays_quiet_as_it_should(promtool: str) -> None:
    tests = sorted((PROMETHEUS / "tests").glob("*.yml"))
    run(promtool, "test", "rules", *map(str, tests))
    cases = [case for path in tests for test in yaml.safe_load(path.read_text())["tests"] for case in cases_of(test)]
    fired = {name for name, fires in cases if fires}
    assert fired == {rule["alert"] for rule in rules() if "alert" in rule}


def cases_of(test: dict[str, list[dict[str, object]]]) -> list[tuple[object, bool]]:
    return [(case["alertname"], "exp_alerts" in case) for case in test.get("alert_rule_test", [])]


def test_each_alert_says_what_is_the_matter_why_and_what_to_do() -> None:
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert rule["annotations"]["summary"] and len(rule["annotations"]["description"]) > 100, rule["alert"]


def test_panels_and_rules_name_only_metrics_that_exist() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    known = recorded | RAYS_OWN | samples()
    unknown = {query.where: query.metrics - known for query in panel_queries() if query.metrics - known}
    assert unknown == {}
    for rule in rules():
        assert metrics_of(rule["expr"]) - known == set(), rule


def test_what_each_proxy_tells_of_an_archive_counts_once(promtool: str, tmp_path: Path) -> None:
    state = {metric.name: ',status="scored"' if "status" in metric.labels else "" for metric in metrics.ARCHIVE_STATE}
    told = {"a": 7, "b": 5}
    by_run = [{"labels": f'{{run="{run}"}}', "value": value} for run, value in told.items()]
    expected = {
        "archives: Remaining": [{"labels": "{}", "value": 12}],
        "archives: Remaining and ungradable, by run": by_run,
        "archives: Decided so far, by status": [{"labels": '{status="scored"}', "value": 12}],
    }
    queries = [query for query in panel_queries() if query.metrics & state.keys()]
    assert {query.where for query in queries} == expected.keys()
    cases = [{"expr": each.expr, "eval_time": "0m", "exp_samples": expected[each.where]} for each in queries]
    series = [
        {"series": f'{name}{{instance="{proxy}:8000",run="{run}"{status}}}', "values": str(value)}
        for name, status in state.items()
        for proxy in ("10.0.0.1", "10.0.0.2")
        for run, value in told.items()
    ]
    tests = tmp_path / "panels.yml"
    tests.write_text(yaml.safe_dump({"tests": [{"input_series": series, "promql_expr_test": cases}]}))
    run(promtool, "test", "rules", str(tests))


def test_each_metric_is_on_a_panel() -> None:
    shown = {name for query in panel_queries() for name in query.metrics}
    for rule in rules():
        if rule.get("record") in shown:
            shown |= metrics_of(rule["expr"])
    shown = {re.sub(r"(?<=_seconds)_(bucket|sum|count)$", "", name) for name in shown}
    assert {exported(metric) for metric in OURS} - shown == set()


def metrics_of(expr: str) -> set[str]:
    return Query("", expr).metrics


def samples() -> set[str]:
    """Names on the exporters' pages, of all metrics that are declared."""
    plain = {exported(metric) for metric in OURS if metric.kind != "histogram"}
    histograms = [exported(metric) for metric in OURS if metric.kind == "histogram"]
    return plain | {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_laid_out_and_takes_its_data_source_from_a_variable(path: Path) -> None:
    dashboard = json.loads(path.read_text())
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert "datasource" in variables
    assert set(re.findall(r"\$\{?([a-z]\w+)", path.read_text())) <= variables
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in panels(path):
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
    for one, other in combinations([panel["gridPos"] for panel in dashboard["panels"]], 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y, (one, other)


def test_kubernetes_gets_the_same_rules_by_the_command_that_is_written_there() -> None:
    text = (PROMETHEUS / "podmonitor.yml").read_text()
    command = "\n".join(line.removeprefix("#     ") for line in text.splitlines() if line.startswith("#     "))
    assert command.endswith(" | kubectl apply -f -")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command.removesuffix(" | kubectl apply -f -")],
        cwd=DEPLOY.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    resources = [resource for resource in yaml.safe_load_all(done.stdout) if resource]
    assert {resource["kind"] for resource in resources} == {"PrometheusRule"}
    assert [resource["spec"] for resource in resources] == [yaml.safe_load(path.read_text()) for path in RULES]
    assert {monitor["kind"] for monitor in yaml.safe_load_all(text)} == {"PodMonitor", "ServiceMonitor"}


def test_make_monitor_starts_a_prometheus_with_the_rules(promtool: str) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    command = ["make", "monitor", f"MONITOR={address}"]
    options = {"cwd": DEPLOY.parent, "start_new_session": True, "stdout": subprocess.DEVNULL}
    make = subprocess.Popen(command, stderr=subprocess.DEVNULL, **options)
    try:
        groups = answer(f"http://{address}/api/v1/rules", timeout_s=20)["data"]["groups"]
        jobs = answer(f"http://{address}/api/v1/status/config", timeout_s=20)["data"]["yaml"]
    finally:
        os.killpg(make.pid, signal.SIGTERM)
        make.wait()
    assert {rule["name"] for group in groups for rule in group["rules"]} >= {"MaRefusalsHigh", "MaArchiveLate"}
    assert "job_name: ray" in jobs


def test_make_monitor_says_what_to_do_where_there_is_no_prometheus(tmp_path: Path) -> None:
    for tool in ("make", "bash"):
        found = shutil.which(tool)
        assert found is not None
        (tmp_path / tool).symlink_to(found)
    done = subprocess.run(
        ["make", "monitor"], cwd=DEPLOY.parent, env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "apt-get install prometheus" in done.stderr


def answer(url: str, timeout_s: float) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as page:
                return json.load(page)
        except OSError:
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.2)
