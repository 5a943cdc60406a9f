"""The two kinds of network as the training loop sees them: what a mini-batch is, its loss, and what validation counts.

HgnStage    patches near lesions and anywhere                      validates on whole photographs
PrnStage    triplets whose negatives are drawn from the ledger     validates on patches
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from numpy import ndarray
from torch import nn

from ma_cluster.config import HgnConfig, PrnConfig
from ma_cluster.evaluation.scoring import PixelCounts
from ma_cluster.hypotheses.frrn import build_hgn
from ma_cluster.hypotheses.hgn_training import HgnCuts, hgn_batch, hgn_losses
from ma_cluster.hypotheses.maps import probability_maps
from ma_cluster.images.annotated import Annotated, Cuts
from ma_cluster.images.patches import Tiling
from ma_cluster.networks import Losses, Reduce, channels_first
from ma_cluster.refinement.patchwise import prn_probability
from ma_cluster.refinement.prn_training import TripletCuts, prn_losses, triplet_batch, validation_patches
from ma_cluster.refinement.resnet import build_prn
from ma_cluster.refinement.selection import FLOOR
from ma_cluster.training.context import (
    Columns,
    Cutter,
    HealthyCutter,
    HgnCutter,
    Photographs,
    Rows,
    TrainContext,
    TripletCutter,
    Work,
)
from ma_cluster.training.ledger import Ledger
from ma_cluster.training.run import TrainRequest

SCORE_ROWS = 512
"""Patches that all workers score at a time."""
AFFORDABLE = 200_000
"""Pools up to this size are scored whole at the end of the first epoch; of larger ones never-scored patches keep the
loss they began with, 1, and are drawn until their turn comes."""
_ABOVE_ALL = float(np.nextafter(np.float32(1), np.float32(2)))  # a probability of error may well be 1
Scored = tuple[Int64[ndarray, "_"], Float32[ndarray, "_"]]
"""Ids of patches and what the ledger is to keep of them, as many."""
NOTHING: Scored = (np.empty(0, np.int64), np.empty(0, np.float32))


@runtime_checkable
class Stage(Protocol):
    """A kind of network. Travels to the workers."""

    @property
    def rows(self) -> int:
        """Of a mini-batch; these are shared out."""

    @property
    def patches_per_row(self) -> int:
        """What a row holds."""

    @property
    def pool(self) -> int:
        """Patches that the ledger knows; 0: it needs none."""

    @property
    def first_loss(self) -> float:
        """What the ledger begins with."""

    def network(self) -> nn.Module:
        """Freshly initialised."""

    def cutter(self) -> Cutter:
        """Cuts the rows of a mini-batch."""

    def work(self, steps: range, ledger: Ledger | None) -> list[Work]:
        """The mini-batches of an epoch."""

    def shown(self, ids: Rows) -> tuple[Cuts, UInt8[ndarray, "n s s 3"]]:
        """Places of the pool, and the patches around them as they are."""

    def losses(self, model: nn.Module, columns: Columns, reduce: Reduce) -> Losses:
        """Of a mini-batch, or of this worker's part of it."""

    def score(self, model: nn.Module, context: TrainContext, epochs: int) -> Scored:
        """What the ledger is to learn from the newest weights after as many epochs, but the last; the same on every
        worker.
        """

    def validate(self, model: nn.Module, context: TrainContext) -> list[PixelCounts]:
        """Counts of this worker's share of the validation photographs."""


@dataclass(frozen=True)
class HgnStage:
    """A hypothesis network. The ledger keeps where it is wrong on photographs without lesions."""

    request: TrainRequest
    config: HgnConfig
    cuts: Callable[[], HgnCuts]
    training: Photographs
    validation: Photographs
    pool: int
    patches_per_row: int = 1
    first_loss: float = FLOOR

    @property
    def rows(self) -> int:
        return self.config.batch_patches

    def network(self) -> nn.Module:
        return build_hgn(self.config, len(self.config.kinds))

    def cutter(self) -> Cutter:
        return HgnCutter(self.training, self.cuts, self.config.patch_px)

    def work(self, steps: range, ledger: Ledger | None) -> list[Work]:
        """Hard places are drawn by their losses."""
        if ledger is None:
            return [Work(step) for step in steps]
        cuts = self.cuts()
        counts = [cuts.hard(step) for step in steps]
        drawn = ledger.draw(sum(counts), steps.start, self.request.seed)
        return [Work(step, ids) for step, ids in zip(steps, np.split(drawn, np.cumsum(counts)[:-1]), strict=True)]

    def shown(self, ids: Rows) -> tuple[Cuts, UInt8[ndarray, "n s s 3"]]:
        return _shown(self.training, self.cuts().plain(ids), self.config.patch_px)

    def losses(self, model: nn.Module, columns: Columns, reduce: Reduce) -> Losses:
        return hgn_losses(
            model, hgn_batch(columns["patch"], columns["lesion"], len(self.config.kinds)), self.config, reduce
        )

    def score(self, model: nn.Module, context: TrainContext, epochs: int) -> Scored:
        """Some photographs without lesions, in turn."""
        cuts, number = self.cuts(), len(self.cuts().without_lesions)
        count = min(self.config.hard_photographs, number)
        turn = (np.arange(count) + epochs * count) % number
        model.eval()
        scored = []
        for index in turn[context.rank :: context.workers].tolist():
            photograph = int(cuts.without_lesions[index])
            probability = self._probability(model, self.training.fetch([photograph])[photograph])
            scored.append(cuts.hard_losses(index, probability))
        parts = [part for theirs in context.gather(scored) for part in theirs]
        return np.concatenate([ids for ids, _ in parts]), np.concatenate([losses for _, losses in parts])

    def validate(self, model: nn.Module, context: TrainContext) -> list[PixelCounts]:
        """Of every pixel."""
        model.eval()
        return [
            PixelCounts.of(self._probability(model, photograph), photograph.lesion)
            for photograph in _share_of(self.validation, context)
        ]

    def _probability(self, model: nn.Module, photograph: Annotated) -> Float32[ndarray, "h w"]:
        height, width = photograph.fov.shape
        detector = self.request.recipe.detector
        tiling = Tiling(height, width, detector.tile_px, detector.halo_px)
        return probability_maps(model, photograph.enhanced, photograph.fov, tiling)[0]


@dataclass(frozen=True)
class PrnStage:
    """The refinement network.

    Its validation figure is the average precision of patches, as many of each photograph: the network has no regions of
    interest before the hypothesis networks are there.
    """

    request: TrainRequest
    config: PrnConfig
    cuts: Callable[[], TripletCuts]
    training: Photographs
    validation: Photographs
    pool: int
    patches_per_row: int = 3
    first_loss: float = _ABOVE_ALL

    @property
    def rows(self) -> int:
        return self.config.triplets

    def network(self) -> nn.Module:
        return build_prn(self.config)

    def cutter(self) -> Cutter:
        return TripletCutter(self.training, self.cuts, self.config.cut_px)

    def work(self, steps: range, ledger: Ledger | None) -> list[Work]:
        """Negatives are drawn by their losses, or uniformly."""
        assert ledger is not None
        count, epoch = len(steps) * self.config.triplets, steps.start
        if self.request.selective:
            negatives = ledger.draw(count, epoch, self.request.seed)
        else:
            negatives = np.random.default_rng([self.request.seed, epoch, 2]).integers(self.pool, size=count)
        return [Work(step, ids) for step, ids in zip(steps, negatives.reshape(len(steps), -1), strict=True)]

    def shown(self, ids: Rows) -> tuple[Cuts, UInt8[ndarray, "n s s 3"]]:
        return _shown(self.training, self.cuts().plain(ids), self.config.cut_px)

    def losses(self, model: nn.Module, columns: Columns, reduce: Reduce) -> Losses:
        batch = triplet_batch(columns["anchor"], columns["positive"], columns["negative"])
        return prn_losses(model, batch, self.config, reduce)

    def score(self, model: nn.Module, context: TrainContext, epochs: int) -> Scored:
        """A share of the pool."""
        whole = epochs == 1 and self.pool <= AFFORDABLE
        ids = refreshed(self.pool, 1.0 if whole else self.config.refresh_share, epochs)
        # the last batch is filled up with patches of the first
        batches = np.resize(ids, (-(-len(ids) // SCORE_ROWS), SCORE_ROWS))
        cutter = HealthyCutter(self.training, self.cuts, self.config.cut_px)
        model.eval()
        work = [Work(number, batch) for number, batch in enumerate(batches)]
        scored = [
            (columns["id"], prn_probability(model, channels_first(columns["patch"])).numpy())
            for columns in context.batches(cutter, lambda: work, SCORE_ROWS)
        ]
        return in_order(context.gather(scored))

    def validate(self, model: nn.Module, context: TrainContext) -> list[PixelCounts]:
        """Of patches of lesions and of healthy places."""
        model.eval()
        return [self._count(model, photograph) for photograph in _share_of(self.validation, context)]

    def _count(self, model: nn.Module, photograph: Annotated) -> PixelCounts:
        patches, truth = validation_patches(photograph, self.config, self.request.seed)
        edges = [*range(0, len(patches), SCORE_ROWS), len(patches)]
        parts = [prn_probability(model, channels_first(patches[a:b])).numpy() for a, b in pairwise(edges)]
        return PixelCounts.of(np.concatenate(parts), truth)


def refreshed(size: int, share_of_pool: float, epoch: int) -> Int64[ndarray, "n"]:
    """The patches to score again: every k-th id, from another one each epoch, so that each has its turn in k epochs.

    An id's place is hashed from it, so these are as good as drawn at random.
    """
    stride = max(1, round(1 / share_of_pool)) if share_of_pool > 0 else size
    return np.arange(epoch % stride, size, stride)


def in_order(gathered: Sequence[Sequence[Scored]]) -> Scored:
    """What each worker has seen, step by step -> all of it, in the order of the mini-batches' rows."""
    parts = [part for step in zip(*gathered, strict=True) for part in step]
    ids, values = [ids for ids, _ in parts], [values for _, values in parts]
    return np.concatenate([*ids, NOTHING[0]]), np.concatenate([*values, NOTHING[1]])


def _shown(photographs: Photographs, cuts: Cuts, patch_px: int) -> tuple[Cuts, UInt8[ndarray, "n s s 3"]]:
    return cuts, torch.as_tensor(photographs.cut(cuts, patch_px)[0]).cpu().numpy()


def _share_of(photographs: Photographs, context: TrainContext) -> Iterator[Annotated]:
    """This worker's, one at a time: together they may not fit into memory."""
    for number in range(context.rank, len(photographs), context.workers):
        yield photographs.fetch([number])[number]
