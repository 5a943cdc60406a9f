"""The metrics, declared once: name, kind, help, unit and the closed list of each label's values.

Ray exports them with the prefix `ray_`, those of ARCHIVE_STATE the Gateway without one. A key, a file name or a
patient's id is never a label. How values get to Ray: cluster/recording.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ma_cluster.config import NETWORKS
from ma_cluster.errors import Reason, Status, Triage

STAGES = ("fetch", "decode", "prepare", "hgn", "prn", "lesions", "write")
"""Of one photograph, in order."""


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
TRIAGE = Metric(
    name="ma_triage_total",
    kind="counter",
    help="Photographs scored, by what is to be done with them",
    unit="1",
    labels={"triage": tuple(Triage)},
)
REFUSED = Metric(
    name="ma_refused_total",
    kind="counter",
    help="Photographs refused or failed",
    unit="1",
    labels={"reason": tuple(Reason)},
)
UNGRADABLE = Metric(
    name="ma_ungradable_total",
    kind="counter",
    help="Photographs scored on which the lack of lesions means nothing",
    unit="1",
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
ARCHIVE_COUNTERS = (IMAGES, MEGAPIXELS, LESIONS, REFUSED, TRIAGE, UNGRADABLE)
ARCHIVE_METRICS = (*ARCHIVE_COUNTERS, IN_FLIGHT, STAGE_SECONDS)

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
ARCHIVE_UNGRADABLE = Metric(
    name="ma_archive_ungradable",
    kind="gauge",
    help="Photographs of an archive run on which the lack of lesions means nothing",
    unit="1",
    labels={"run": ()},
)
ARCHIVE_STATE = (ARCHIVE_IMAGES, ARCHIVE_REMAINING, ARCHIVE_UNGRADABLE)
"""Of the Gateway: computed from the store at each scrape."""
