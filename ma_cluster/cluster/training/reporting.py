"""How far a training run is: told by its first worker, through a queue, to whoever started it, and to the metrics."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import ray
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ma_cluster import metrics
from ma_cluster.cluster import recording
from ma_cluster.training.progress import Listener, Meter, Progress

T = TypeVar("T")


class Reporter(Listener):
    """Tells of a run: each worker of its patches, the first one of all else, through a queue and the metrics."""

    def __init__(self, stage: str, queue: Queue | None) -> None:
        """`stage` labels the metrics; without a `queue` nobody is told but them."""
        super().__init__(None if queue is None else queue.put)
        self._stage = stage
        for counter in metrics.TRAIN_COUNTERS:
            recording.begin(counter, stage=stage)

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches as they come; the time until each is here counts as waited."""
        began = time.monotonic()
        for batch in batches:
            recording.record(metrics.TRAIN_WAIT, time.monotonic() - began, stage=self._stage)
            yield batch
            began = time.monotonic()

    def step(self, meter: Meter, patches: int) -> None:
        recording.record(metrics.TRAIN_PATCHES, patches, stage=self._stage)
        super().step(meter, patches)

    def epoch(self, progress: Progress) -> None:
        assert progress.epoch is not None
        recording.record(metrics.VALIDATION_AUPR, progress.epoch.average_precision, stage=self._stage)
        super().epoch(progress)

    def tell(self, progress: Progress) -> None:
        for term, value in progress.losses.items():
            recording.record(metrics.TRAIN_LOSS, value, stage=self._stage, term=term)
            if not math.isfinite(value):
                recording.record(metrics.TRAIN_NOT_FINITE, 1, stage=self._stage, term=term)
        super().tell(progress)


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
