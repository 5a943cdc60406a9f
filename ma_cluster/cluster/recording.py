"""Values of the metrics on their way to Ray, whose exporters Prometheus reads.

What Ray 2.60 does with a value, and what is done about it here: a gauge that is not set again within two of its
intervals ends (`_Gauges`), a gauge that is no finite number is dropped (`TRAIN_NOT_FINITE`), and a counter that has
not counted does not exist (`begin`).
"""

from __future__ import annotations

import itertools
import math
import sys
import threading
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

from ma_cluster.archive.outcomes import Outcome
from ma_cluster.metrics import (
    ARCHIVE_COUNTERS,
    ARCHIVE_METRICS,
    IMAGES,
    IN_FLIGHT,
    LEDGER_METRICS,
    LESIONS,
    MEGAPIXELS,
    REFUSED,
    STAGE_SECONDS,
    TRAIN_METRICS,
    TRIAGE,
    UNGRADABLE,
    Metric,
)

_RAY_METRICS = {metric.name: metric for metric in (*ARCHIVE_METRICS, *LEDGER_METRICS, *TRAIN_METRICS)}
_NOTHING = sys.float_info.min  # Ray's counters refuse 0; added to a count, this changes none
_AGAIN_S = 1.0  # the shortest interval of Ray's exporters


def begin(metric: Metric, **known: str) -> None:
    """Let a counter's series exist from now on: an increase is seen only from a value that was there before.

    Args:
        metric: a counter.
        known: labels that have one value in this process; the others' series are begun for all their values.
    """
    choices = [(known[name],) if name in known else values for name, values in metric.labels.items()]
    for values in itertools.product(*choices):
        record(metric, _NOTHING, **dict(zip(metric.labels, values, strict=True)))


def record(metric: Metric, value: int | float, **labels: str) -> None:
    """Add to a counter, set a gauge, or observe in a histogram.

    Raises:
        ValueError: a label is not declared, or its value is not in the closed list.
    """
    if labels.keys() != metric.labels.keys() or any(labels[name] not in metric.labels[name] for name in labels):
        raise ValueError(f"{metric.name} takes {dict(metric.labels)}, not {labels}")
    if metric.kind == "gauge":
        _GAUGES.set(metric.name, value, labels)
    elif metric.kind == "histogram":
        _registered(metric.name).observe(value, tags=labels)
    elif value:
        _registered(metric.name).inc(value, tags=labels)


def record_seconds(seconds: Mapping[str, float]) -> None:
    """Observe the wall time of each stage."""
    for stage, value in seconds.items():
        record(STAGE_SECONDS, value, stage=stage)


class Recorder:
    """Counts the photographs of one worker process, whose threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        for counter in ARCHIVE_COUNTERS:
            begin(counter)

    def begun(self) -> None:
        """A photograph is under way."""
        self._add(1)

    def decided(self, outcome: Outcome) -> None:
        """It has its outcome."""
        self._add(-1)
        record(IMAGES, 1, status=outcome.status.value)
        if outcome.reason is not None:
            record(REFUSED, 1, reason=outcome.reason.value)
        if outcome.facts is not None and outcome.findings is not None:
            record(MEGAPIXELS, outcome.facts.height * outcome.facts.width / 1e6)
            record(LESIONS, len(outcome.findings.lesions))
            record(TRIAGE, 1, triage=outcome.findings.triage.value)
            record(UNGRADABLE, 0 if outcome.facts.quality.gradable else 1)
            if "write" in outcome.seconds:  # an upload has nothing to write; replicas told of the other stages
                record(STAGE_SECONDS, outcome.seconds["write"], stage="write")

    def _add(self, photographs: int) -> None:
        with self._lock:
            self._under_way += photographs
            record(IN_FLIGHT, self._under_way)


class _Gauges:
    """The gauges of this process, set again every second: a photograph may take minutes and an epoch hours."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._thread: threading.Thread | None = None

    def set(self, name: str, value: int | float, labels: Mapping[str, str]) -> None:
        """Of a value that is no finite number only the end of the last one can be told."""
        series = name, tuple(sorted(labels.items()))
        with self._lock:
            if not math.isfinite(value):
                self._values.pop(series, None)
                return
            self._values[series] = value
            _registered(name).set(value, tags=dict(labels))
            if self._thread is None:
                self._thread = threading.Thread(target=self._set_again, name="gauges", daemon=True)
                self._thread.start()

    def _set_again(self) -> None:
        while True:
            time.sleep(_AGAIN_S)
            with self._lock:
                for (name, labels), value in self._values.items():
                    _registered(name).set(value, tags=dict(labels))


_GAUGES = _Gauges()


@cache
def _registered(name: str) -> Any:
    """Ray's handle; nothing is registered with Ray before the first value."""
    from ray.util import metrics as ray_metrics

    metric = _RAY_METRICS[name]
    description, labels = f"{metric.help} [{metric.unit}]", tuple(metric.labels)
    if metric.kind == "counter":
        return ray_metrics.Counter(name, description, labels)
    if metric.kind == "gauge":
        return ray_metrics.Gauge(name, description, labels)
    return ray_metrics.Histogram(name, description, list(metric.boundaries), labels)
