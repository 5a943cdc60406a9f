"""The metrics, declared once: name, kind, help, unit and the closed list of each label's values.

Ray exports them with the prefix `ray_`. A key, a file name or a patient's id is never a label.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from ray.util import metrics as ray_metrics

from ma_cluster.bundle import NETWORKS
from ma_cluster.cluster.outcomes import STAGES, Outcome
from ma_cluster.errors import Reason, Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A declaration; nothing is registered with Ray before the first value."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    unit: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Each label's name and all the values it may have."""
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
ARCHIVE_METRICS = (IMAGES, MEGAPIXELS, LESIONS, REFUSED, IN_FLIGHT, STAGE_SECONDS)

LEDGER_PATCHES = Metric(
    name="ma_ledger_patches", kind="gauge", help="Patches whose loss a shard of the ledger holds", unit="1"
)
LEDGER_DRAWS = Metric(name="ma_ledger_draws_total", kind="counter", help="Patches drawn by their loss", unit="1")
LEDGER_UPDATES = Metric(name="ma_ledger_updates_total", kind="counter", help="Losses set", unit="1")
LEDGER_LOSS_MEAN = Metric(
    name="ma_ledger_loss_mean", kind="gauge", help="Mean loss of the patches of a shard of the ledger", unit="1"
)
LEDGER_METRICS = (LEDGER_PATCHES, LEDGER_DRAWS, LEDGER_UPDATES, LEDGER_LOSS_MEAN)

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
TRAIN_METRICS = (TRAIN_PATCHES, TRAIN_LOSS, VALIDATION_AUPR)


def record(metric: Metric, value: float, **labels: str) -> None:
    """Add to a counter, set a gauge, or observe in a histogram.

    Raises:
        ValueError: a label is not declared, or its value is not in the closed list.
    """
    if labels.keys() != metric.labels.keys() or any(labels[name] not in metric.labels[name] for name in labels):
        raise ValueError(f"{metric.name} takes {dict(metric.labels)}, not {labels}")
    handle = _registered(metric.name)
    if isinstance(handle, ray_metrics.Counter):
        if value:
            handle.inc(value, tags=labels)
    elif isinstance(handle, ray_metrics.Gauge):
        handle.set(value, tags=labels)
    else:
        handle.observe(value, tags=labels)


def record_seconds(seconds: Mapping[str, float]) -> None:
    """Observe the wall time of each stage."""
    for stage, value in seconds.items():
        record(STAGE_SECONDS, value, stage=stage)


class Recorder:
    """Counts the photographs of one worker process, whose threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0

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

    def _add(self, photographs: int) -> None:
        with self._lock:
            self._under_way += photographs
            record(IN_FLIGHT, self._under_way)


@cache
def _registered(name: str) -> ray_metrics.Counter | ray_metrics.Gauge | ray_metrics.Histogram:
    metric = next(metric for metric in (*ARCHIVE_METRICS, *LEDGER_METRICS, *TRAIN_METRICS) if metric.name == name)
    description, labels = f"{metric.help} [{metric.unit}]", tuple(metric.labels)
    if metric.kind == "counter":
        return ray_metrics.Counter(metric.name, description, labels)
    if metric.kind == "gauge":
        return ray_metrics.Gauge(metric.name, description, labels)
    return ray_metrics.Histogram(metric.name, description, list(metric.boundaries), labels)
