"""The training loop, of both kinds of network, wherever it runs.

    epoch:   ledger -> mini-batches (Work) -> patches -> step -> the negatives' losses -> ledger
             then the pool's share, scored with the newest weights -> ledger; validation; checkpoint

Within an epoch the ledger does not change: losses go back at its end, in the order of steps, so that its state is a
function of the weights alone, whatever the number of workers.
"""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import cv2
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ma_cluster.bundle import load_weights
from ma_cluster.errors import UsageError
from ma_cluster.evaluation.scoring import average_precision
from ma_cluster.networks import WeightAverage, build_optimizer, descend, learning_rate
from ma_cluster.refinement.selection import probability_of_error
from ma_cluster.training.context import TrainContext, place, share
from ma_cluster.training.ledger import Ledger
from ma_cluster.training.run import Epoch, Example, TrainFolder, TrainRequest
from ma_cluster.training.stages import NOTHING, Scored, Stage, in_order

_INTERVAL_S = 5.0
_EPOCH_S = 60.0  # of a run by the clock
_FIRST_EPOCH_S = 25.0  # until its first checkpoint, which also shows how long a validation takes
_REST_S = 30.0  # for a validation, before one has been seen, or
_REST_SHARE = 0.05  # of the run's time, where that is more
COSTLIEST = 24
"""Examples that are shown of a training."""
T = TypeVar("T")
Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class TrainRun:
    """What every worker of a run stands on."""

    request: TrainRequest
    stage: Stage
    folder: TrainFolder
    first_weights: Weights | None
    names: Sequence[str]
    """Of the photographs that train, by their numbers."""

    def begin(self, networks: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> int:
        """Weights and optimiser as of the run's last checkpoint, or the first weights; returns the steps done.

        Raises:
            BundleError: they are damaged, or of another network.
        """
        done = self.folder.restore(networks, optimizer)
        for network in networks.values():
            if done is None and self.first_weights is not None:
                load_weights(network, self.first_weights, "the network that training is to begin with")
        return done or 0

    def ledger(self, context: TrainContext, epochs: int) -> Ledger | None:
        """After as many epochs; the first worker's alone, which it ends with: whoever starts again makes another."""
        if context.rank or not self.stage.pool:
            return None
        ledger = context.ledger(self.stage.pool, self.request.ledger_shards, self.stage.first_loss)
        if epochs:
            ledger.restore(self.folder.ledger(epochs))
        return ledger

    def keep(self, ledger: Ledger, epochs: int) -> None:
        """Write the ledger as it is after as many epochs, and the patches that cost most."""
        ledger.snapshot(self.folder.ledger(epochs))
        ids, losses = ledger.highest(COSTLIEST, self.stage.first_loss)
        if len(ids) == 0:
            return
        cuts, patches = self.stage.shown(ids)
        examples = []
        for (number, row, col), patch, loss in zip(cuts.centres.tolist(), patches, losses.tolist(), strict=True):
            jpeg = base64.b64encode(cv2.imencode(".jpg", patch[:, :, ::-1])[1].tobytes()).decode()
            examples.append(Example(photograph=self.names[number], row=row, col=col, loss=loss, jpeg=jpeg))
        self.folder.keep_costliest(examples)


def train(run: TrainRun, context: TrainContext, listener: Listener, clock: Clock | None = None) -> None:
    """What each worker runs: build, restore, loop over epochs, report. A clock, which no two workers read alike, is for
    a run of one.
    """
    clock = Clock() if clock is None else clock
    request, stage, config = run.request, run.stage, run.request.config
    torch.manual_seed(request.seed)
    model = place(stage.network(), context, request.batch_norm)
    optimizer = build_optimizer(model, config)
    average = WeightAverage(model, config.weight_average)
    networks = {"model": average.network} | ({"trained": model} if config.weight_average else {})
    done = run.begin(networks, optimizer)
    epochs = -(-done // request.epoch)
    ledger = run.ledger(context, epochs)
    parallel = context.parallel(model)
    mine = len(share(stage.rows, context.rank, context.workers)) * stage.patches_per_row
    while done < config.steps and not clock.over:
        steps = range(done, min(done + request.epoch, config.steps))
        meter = Meter(steps, config.steps, stage.rows * stage.patches_per_row)
        batches = context.batches(stage.cutter(), partial(stage.work, steps, ledger), stage.rows)
        seen: list[Scored] = []
        with clock.epoch(), tuned_to_one_shape():
            for step, columns in zip(steps, listener.waiting(batches), strict=True):
                losses = stage.losses(parallel, columns, context.reduce)
                descend(model, optimizer, losses.total, learning_rate(step, config, clock.spent))
                average.update(step)
                if losses.negatives is not None:
                    seen.append((columns["id"], probability_of_error(losses.negatives.cpu().numpy())))
                meter.add(losses.values())
                listener.step(meter, mine)
                if clock.epoch_over:
                    break
        progress, done, epochs = meter.progress(), step + 1, epochs + 1
        for network in networks.values():
            context.agree(network)
        if stage.pool:
            last = done == config.steps or clock.over
            fresh = in_order(context.gather(seen)), NOTHING if last else stage.score(average.network, context, epochs)
            if ledger is not None:
                for ids, values in fresh:
                    ledger.update(ids, values)
                run.keep(ledger, epochs)
        counts = [part for theirs in context.gather(stage.validate(average.network, context)) for part in theirs]
        if context.rank == 0:
            epoch = Epoch(
                step=done,
                losses=progress.losses,
                average_precision=average_precision(sum(counts[1:], counts[0])),
                workers=context.workers,
                patches_per_second=progress.patches_per_second,
                seconds=meter.seconds,
                pool_loss=None if ledger is None else ledger.loss_mean(),
            )
            run.folder.save(networks, optimizer, epoch)
            listener.epoch(replace(progress, epoch=epoch))
        clock.rested()


@contextmanager
def tuned_to_one_shape() -> Iterator[None]:
    """cuDNN tries its convolutions on the first mini-batch and keeps the fastest; elsewhere shapes are too many."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Clock:
    """The time that a run has, and how much of it is spent. Without a limit no time is."""

    def __init__(self, minutes: float | None = None, now: Callable[[], float] = time.monotonic) -> None:
        """From `now` on, in seconds. What follows on the last step, validation and checkpoint, is reckoned with: it
        takes as long as it took before.
        """
        self._now = now
        self._began = self._epoch_began = now()
        self._limit_s = math.inf if minutes is None else 60 * minutes
        self._epoch_s = _FIRST_EPOCH_S
        self._trained_s = 0.0
        self._rest_s = 0.0 if minutes is None else min(max(_REST_S, _REST_SHARE * self._limit_s), self._limit_s / 2)

    @contextmanager
    def epoch(self) -> Iterator[None]:
        """Around the steps of an epoch."""
        self._epoch_began = self._now()
        yield
        self._steps_ended = self._now()
        self._trained_s += self._steps_ended - self._epoch_began

    def rested(self) -> None:
        """What follows on the steps of an epoch is done."""
        self._epoch_s, self._rest_s = _EPOCH_S, self._now() - self._steps_ended

    @property
    def _left_s(self) -> float:
        """For steps, until the last validation is to begin."""
        return self._limit_s - self._rest_s - (self._now() - self._began)

    @property
    def spent(self) -> float:
        """Of the time for steps, 0..1, within an epoch. Reading and validations are no such time, or the learning rate
        would leap.
        """
        trained = self._trained_s + self._now() - self._epoch_began
        return trained / (trained + max(0.0, self._left_s))

    @property
    def over(self) -> bool:
        """Whether no more steps are to be begun."""
        return self._left_s <= 0

    @property
    def epoch_over(self) -> bool:
        """Of a run with a limit each epoch takes a minute, the first less, the last what is left."""
        if self._limit_s == math.inf:
            return False
        room = self._left_s >= self._epoch_s + self._rest_s  # for a validation and another epoch
        return self.over or (room and self._now() - self._epoch_began >= self._epoch_s)


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
        self._sums: dict[str, Float[Tensor, ""]] = {}

    def add(self, losses: Mapping[str, Float[Tensor, ""]]) -> None:
        """The losses of the next step."""
        self._done += 1
        for term, value in losses.items():
            self._sums[term] = self._sums.get(term, 0.0) + value.double()

    @property
    def seconds(self) -> float:
        """Since the epoch began."""
        return time.monotonic() - self._begun

    def progress(self) -> Progress:
        """As of now, once the device has done what it was told.

        Raises:
            UsageError: the network has diverged.
        """
        means = {term: value.item() / self._done for term, value in self._sums.items()}
        if not all(map(math.isfinite, means.values())):
            raise UsageError(
                f"the network diverged after step {self._steps.start}: its loss is no number any more. The checkpoints "
                "are as they were: go on from the last, or begin again, with a lower --learning-rate"
            )
        step, pace = self._steps.start + self._done, self._done / self.seconds
        return Progress(step, self._total, means, self._patches * pace, (self._total - step) / pace)


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
