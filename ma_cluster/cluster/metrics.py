"""The metrics, declared once: name, kind, help, unit and the closed list of each label's values.

Ray exports them with the prefix `ray_`, those of ARCHIVE_STATE the Gateway without one. A key, a file name or a
patient's id is never a label.

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
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from ma_cluster.bundle import NETWORKS
from ma_cluster.cluster.archive.outcomes import STAGES, Outcome
from ma_cluster.errors import Reason, Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A declaration; nothing is registered with Ray before the first value."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    unit: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Each label's name and all the values it may have; `()` for a run's id, of which there is no list."""
    boundaries: tuple[float, ...] = ()
    """Upper ends of a histogram's buckets, in the metric's unit."""


IMAGES = Metric(
    name="ma_images_total",
    kind="counter",
    help="Photographs decided",
    unit="1",
    labels={"status": tuple(Status)},
)
MEGAPIXELS = Metric(
    name="ma_megapixels_total", kind="counter", help="Size of the photographs scored", unit="10^6 pixels"
)
LESIONS = Metric(name="ma_lesions_total", kind="counter", help="Lesions found", unit="1")
REFUSED = Metric(
    name="ma_refused_total",
    kind="counter",
    help="Photographs refused or failed",
    unit="1",
    labels={"reason": tuple(Reason)},
)
IN_FLIGHT = Metric(name="ma_images_in_flight", kind="gauge", help="Photographs between plan and outcome", unit="1")
STAGE_SECONDS = Metric(
    name="ma_stage_seconds",
    kind="histogram",
    help="Wall time of a stage on one photograph",
    unit="s",
    labels={"stage": STAGES},
    boundaries=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
)
ARCHIVE_COUNTERS = (IMAGES, MEGAPIXELS, LESIONS, REFUSED)
ARCHIVE_METRICS = (IMAGES, MEGAPIXELS, LESIONS, REFUSED, IN_FLIGHT, STAGE_SECONDS)

LEDGER_PATCHES = Metric(
    name="ma_ledger_patches", kind="gauge", help="Patches whose loss a shard of the ledger holds", unit="1"
)
LEDGER_DRAWS = Metric(name="ma_ledger_draws_total", kind="counter", help="Patches drawn by their loss", unit="1")
LEDGER_UPDATES = Metric(name="ma_ledger_updates_total", kind="counter", help="Losses set", unit="1")
LEDGER_LOSS_MEAN = Metric(
    name="ma_ledger_loss_mean", kind="gauge", help="Mean loss of the patches of a shard of the ledger", unit="1"
)
LEDGER_LOSSES = Metric(
    name="ma_ledger_losses",
    kind="gauge",
    help="Patches of a shard of the ledger whose loss is at most `le`, as of its last snapshot",
    unit="1",
    labels={"le": ("0.001", "0.003", "0.01", "0.03", "0.1", "0.3", "0.6", "+Inf")},
)
LEDGER_COUNTERS = (LEDGER_DRAWS, LEDGER_UPDATES)
LEDGER_METRICS = (LEDGER_PATCHES, LEDGER_DRAWS, LEDGER_UPDATES, LEDGER_LOSS_MEAN, LEDGER_LOSSES)

TRAIN_PATCHES = Metric(
    name="ma_train_patches_total",
    kind="counter",
    help="Patches trained on, each as often as it was drawn",
    unit="1",
    labels={"stage": NETWORKS},
)
TRAIN_LOSS = Metric(
    name="ma_train_loss",
    kind="gauge",
    help="Mean of a term of the loss since the epoch began",
    unit="1",
    labels={"stage": NETWORKS, "term": ("cross_entropy", "dice", "triplet", "total")},
)
VALIDATION_AUPR = Metric(
    name="ma_validation_aupr",
    kind="gauge",
    help="Average precision on the validation photographs",
    unit="1",
    labels={"stage": NETWORKS},
)
TRAIN_WAIT = Metric(
    name="ma_train_wait_seconds_total",
    kind="counter",
    help="Time that a Train worker waited for its patches",
    unit="s",
    labels={"stage": NETWORKS},
)
TRAIN_NOT_FINITE = Metric(
    name="ma_train_not_finite_total",
    kind="counter",
    help="Reports of a loss that is no finite number, which has no value in ma_train_loss",
    unit="1",
    labels=TRAIN_LOSS.labels,
)
TRAIN_COUNTERS = (TRAIN_PATCHES, TRAIN_WAIT, TRAIN_NOT_FINITE)
TRAIN_METRICS = (TRAIN_PATCHES, TRAIN_LOSS, VALIDATION_AUPR, TRAIN_WAIT, TRAIN_NOT_FINITE)

ARCHIVE_IMAGES = Metric(
    name="ma_archive_images",
    kind="gauge",
    help="Photographs of an archive run by status",
    unit="1",
    labels={"run": (), "status": tuple(Status)},
)
ARCHIVE_REMAINING = Metric(
    name="ma_archive_remaining",
    kind="gauge",
    help="Photographs of an archive run without an outcome",
    unit="1",
    labels={"run": ()},
)
ARCHIVE_STATE = (ARCHIVE_IMAGES, ARCHIVE_REMAINING)
"""Of the Gateway: computed from the store at each scrape."""
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
        if outcome.facts is not None and outcome.lesions is not None:
            record(MEGAPIXELS, outcome.facts.height * outcome.facts.width / 1e6)
            record(LESIONS, len(outcome.lesions))
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
