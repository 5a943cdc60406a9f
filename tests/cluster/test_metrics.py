"""The declarations of metrics: each is used, nothing else is, and names keep Prometheus's conventions."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ma_cluster import metrics
from ma_cluster.cluster import recording
from ma_cluster.metrics import Metric

PACKAGE = Path(metrics.__file__).parent
DECLARED = {name: value for name, value in vars(metrics).items() if isinstance(value, Metric)}
GROUPS = (metrics.ARCHIVE_METRICS, metrics.LEDGER_METRICS, metrics.TRAIN_METRICS, metrics.ARCHIVE_STATE)


def code() -> Iterator[tuple[Path, ast.AST]]:
    for path in PACKAGE.rglob("*.py"):
        yield from ((path, node) for node in ast.walk(ast.parse(path.read_text())))


def recorded() -> set[str]:
    """Metrics, by the names of their declarations, that some code of the cluster hands to `record`."""
    calls = [node for path, node in code() if isinstance(node, ast.Call) and "cluster" in path.parts]
    named = {}
    for call in calls:
        function = call.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
        if name == "record" and call.args:
            named[ast.unparse(call.args[0]).removeprefix("metrics.")] = call
    return set(named)


def test_each_declared_metric_is_recorded_and_no_other() -> None:
    of_the_store = {name for name, metric in DECLARED.items() if metric in metrics.ARCHIVE_STATE}
    assert recorded() - {"metric"} == DECLARED.keys() - of_the_store


def test_no_name_of_a_metric_stands_in_the_code_that_is_not_declared() -> None:
    texts = {node.value for _, node in code() if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    names = {
        text for text in texts if re.fullmatch(r"ma_[a-z]+_[a-z_]+[a-z]", text) and not text.startswith("ma_cluster")
    }
    assert names == {metric.name for metric in DECLARED.values()}


def test_one_module_alone_makes_metrics_of_ray() -> None:
    users = {
        path.name
        for path, node in code()
        if isinstance(node, ast.ImportFrom) and node.module in ("ray.util", "ray.util.metrics")
        if node.module == "ray.util.metrics" or any(alias.name == "metrics" for alias in node.names)
    }
    assert users == {"recording.py"}


@pytest.mark.parametrize("metric", DECLARED.values(), ids=lambda metric: metric.name)
def test_names_and_labels_keep_the_conventions(metric: Metric) -> None:
    assert any(metric in group for group in GROUPS)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert (metric.unit == "s") == ("_seconds" in metric.name)
    assert bool(metric.boundaries) == (metric.kind == "histogram")
    assert list(metric.boundaries) == sorted(set(metric.boundaries))
    assert metric.help and not metric.help.endswith(".")
    assert not {"key", "name", "patient", "file"} & metric.labels.keys()
    assert all(values or label == "run" for label, values in metric.labels.items())


def test_a_label_that_is_not_declared_is_refused() -> None:
    with pytest.raises(ValueError, match="ma_refused_total takes"):
        recording.record(metrics.REFUSED, 1, reason="eye 0.jpg")
    with pytest.raises(ValueError, match="ma_images_total takes"):
        recording.record(metrics.IMAGES, 1)
