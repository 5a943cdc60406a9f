"""How far a training run is: means of its losses and its pace, epoch by epoch, and who is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from ma_cluster.training.run_folder import Epoch

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


class Listener:
    """Is told of a run by its loop, and tells `on_progress` every few seconds and at the end of each epoch."""

    def __init__(self, on_progress: Callable[[Progress], None] | None) -> None:
        self._on_progress, self._last = on_progress, time.monotonic()

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches as they come."""
        return batches

    def step(self, meter: Meter, patches: int) -> None:
        """After each step of so many patches of this worker's."""
        if time.monotonic() - self._last >= _INTERVAL_S:
            self.tell(meter.progress())

    def epoch(self, progress: Progress) -> None:
        """At the end of each epoch."""
        self.tell(progress)

    def tell(self, progress: Progress) -> None:
        """How far the run is."""
        self._last = time.monotonic()
        if self._on_progress is not None:
            self._on_progress(progress)
