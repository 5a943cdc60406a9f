"""How far a training run is: told by its first worker, through a queue, to whoever started it, and to the metrics."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import ray
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ma_cluster.cluster import metrics
from ma_cluster.cluster.training.folder import Epoch

T = TypeVar("T")
_INTERVAL_S = 5.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. Losses are means since the epoch began; the last epoch's record comes at its end."""

    step: int
    steps: int
    losses: dict[str, float]
    patches_per_second: float
    eta_seconds: float
    """To the last step at this pace; validations and refreshes not counted."""
    epoch: Epoch | None = None

    def __str__(self) -> str:
        losses = ", ".join(f"{term} {value:.4f}" for term, value in self.losses.items())
        line = f"step {self.step} of {self.steps}, {self.patches_per_second:.1f} patches/s, {losses}"
        if self.epoch is not None:
            line += f", validation average precision {self.epoch.average_precision:.4f}"
        return f"{line}, {self.eta_seconds:.0f} s to go"


class Meter:
    """Means of an epoch's losses, and its pace."""

    def __init__(self, steps: range, total: int, patches: int) -> None:
        """`steps` of the epoch, `total` of the run, `patches` in each."""
        self._steps, self._total, self._patches = steps, total, patches
        self._begun, self._done = time.monotonic(), 0
        self._sums: dict[str, float] = {}

    def add(self, losses: dict[str, float]) -> None:
        """The losses of the next step."""
        self._done += 1
        for term, value in losses.items():
            self._sums[term] = self._sums.get(term, 0.0) + value

    @property
    def means(self) -> dict[str, float]:
        """Mean of each term."""
        return {term: value / self._done for term, value in self._sums.items()}

    @property
    def seconds(self) -> float:
        """Since the epoch began."""
        return time.monotonic() - self._begun

    def progress(self) -> Progress:
        """As of now."""
        step, pace = self._steps.start + self._done, self._done / self.seconds
        left = (self._total - step) / pace
        return Progress(step, self._total, self.means, self._patches * pace, left)

    def epoch(self, trained: Progress, average_precision: float, workers: int, pool_loss: float | None = None) -> Epoch:
        """The record of the epoch, which ends now; `trained` was taken before its validation."""
        return Epoch(
            step=trained.step,
            losses=trained.losses,
            average_precision=average_precision,
            workers=workers,
            patches_per_second=trained.patches_per_second,
            seconds=self.seconds,
            pool_loss=pool_loss,
        )


class Reporter:
    """Tells of a run: each worker of its patches, the first one of all else."""

    def __init__(self, stage: str, queue: Queue | None) -> None:
        """`stage` labels the metrics; without a `queue` nobody is told but them."""
        self._stage, self._queue = stage, queue
        self._last = time.monotonic()
        for counter in metrics.TRAIN_COUNTERS:
            metrics.begin(counter, stage=stage)

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches as they come; the time until each is here counts as waited."""
        began = time.monotonic()
        for batch in batches:
            metrics.record(metrics.TRAIN_WAIT, time.monotonic() - began, stage=self._stage)
            yield batch
            began = time.monotonic()

    def step(self, meter: Meter, patches: int) -> None:
        """After each step; speaks every few seconds."""
        metrics.record(metrics.TRAIN_PATCHES, patches, stage=self._stage)
        if time.monotonic() - self._last >= _INTERVAL_S:
            self._tell(meter.progress())

    def epoch(self, progress: Progress) -> None:
        """At the end of each epoch."""
        assert progress.epoch is not None
        metrics.record(metrics.VALIDATION_AUPR, progress.epoch.average_precision, stage=self._stage)
        self._tell(progress)

    def _tell(self, progress: Progress) -> None:
        self._last = time.monotonic()
        for term, value in progress.losses.items():
            metrics.record(metrics.TRAIN_LOSS, value, stage=self._stage, term=term)
            if not math.isfinite(value):
                metrics.record(metrics.TRAIN_NOT_FINITE, 1, stage=self._stage, term=term)
        if self._queue is not None:
            self._queue.put(progress)


@contextmanager
def listening(on_progress: Callable[[Progress], None] | None) -> Iterator[Queue | None]:
    """A queue whose messages are handed on, in a thread of this process, until the block ends."""
    if on_progress is None:
        yield None
        return
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # others may be lost
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    thread = threading.Thread(target=_hand_on, args=(queue, on_progress), name="training-progress", daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        queue.put(None)
        thread.join()
        queue.shutdown()


def _hand_on(queue: Queue, on_progress: Callable[[Progress], None]) -> None:
    while (progress := queue.get()) is not None:
        on_progress(progress)
