"""Which triplets the patch refinement network trains on: anchors and positives uniform, negatives by their loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, UInt8
from numpy import ndarray
from torch import Tensor

from ma_cluster.config import PrnConfig
from ma_cluster.errors import UsageError
from ma_cluster.images.annotated import Annotated, Cuts, Marks, cut, draw_cuts, lesion_free
from ma_cluster.images.pool import LesionPool, RegionPool
from ma_cluster.networks.tensors import channels_first
from ma_cluster.refinement.selection import draw_by_loss
from ma_cluster.refinement.step import TripletBatch

_BATCH = 256
_VALIDATION_LESIONS, _VALIDATION_HEALTHY = 200, 1000  # patches of a photograph


class TripletCuts:
    """Triplets as a pure function of (seed, step, ids of the negatives). Keeps no pixels."""

    def __init__(self, photographs: Sequence[Annotated | Marks], config: PrnConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._lesions = LesionPool([photograph.lesion for photograph in photographs])
        wanted = {"regions": (True,), "photographs": (False,), "both": (True, False)}[config.negatives]
        self._sources = np.flatnonzero([photograph.lesion.any() in wanted for photograph in photographs])
        if len(self._sources) == 0:
            raise UsageError(f"no training photograph to draw negatives from '{config.negatives}' of; check --healthy")
        regions = [lesion_free(photographs[int(number)], config.negative_margin_px) for number in self._sources]
        self._healthy = RegionPool(regions, config.healthy_per_image, seed)

    @property
    def healthy(self) -> int:
        """Size of the healthy pool; its ids are 0 .. healthy - 1."""
        return len(self._healthy)

    def of_step(
        self, step: int, negatives: Int64[ndarray, "n"] | Float32[ndarray, "p"]
    ) -> tuple[Cuts, Int64[ndarray, "n"]]:
        """Anchors, then positives, then negatives of a step, and the pool ids of the negatives.

        Args:
            step: number of the step.
            negatives: their ids, or the losses of the whole pool, to draw them by.
        """
        config, rng = self._config, np.random.default_rng([self._seed, step])
        anchor, positive = (self._lesions.draw(config.triplets, rng, per_lesion=config.per_lesion) for _ in range(2))
        by_loss = negatives.dtype == np.float32
        ids = draw_by_loss(negatives, config.triplets, rng) if by_loss else negatives
        lesions = (self._lesions.centres(anchor), self._lesions.centres(positive))
        return draw_cuts(np.concatenate([*lesions, self._negatives(ids)]), rng, config.colour_jitter), ids

    def plain(self, ids: Int64[ndarray, "n"]) -> Cuts:
        """Healthy patches of the pool without augmentation, for scoring them again."""
        return Cuts(self._negatives(ids), np.zeros(len(ids), np.int32), np.ones((len(ids), 3)))

    def _negatives(self, ids: Int64[ndarray, "n"]) -> Int32[ndarray, "n 3"]:
        centres = self._healthy.centres(ids)
        centres[:, 0] = self._sources[centres[:, 0]]
        return centres


class TripletDraws:
    """The triplets themselves, for a process that holds the photographs and the losses of the healthy pool."""

    def __init__(self, photographs: Sequence[Annotated], config: PrnConfig, seed: int) -> None:
        self._photographs, self._cut_px = photographs, config.cut_px
        self._cuts = TripletCuts(photographs, config, seed)

    @property
    def healthy(self) -> int:
        """Size of the healthy pool; its ids are 0 .. healthy - 1."""
        return self._cuts.healthy

    def batch(self, step: int, losses: Float32[ndarray, "p"]) -> tuple[TripletBatch, Int64[ndarray, "n"]]:
        """The triplets of a step, augmented, and the pool ids of its negatives."""
        cuts, negatives = self._cuts.of_step(step, losses)
        patches, _ = cut(self._photographs, cuts, self._cut_px)
        return triplet_batch(*np.split(patches, 3)), negatives

    def plain(self, ids: Int64[ndarray, "n"]) -> Iterator[tuple[Int64[ndarray, "b"], UInt8[Tensor, "b 3 s s"]]]:
        """Healthy patches of the pool without augmentation, in batches, for scoring them again."""
        for start in range(0, len(ids), _BATCH):
            part = ids[start : start + _BATCH]
            patches, _ = cut(self._photographs, self._cuts.plain(part), self._cut_px)
            yield part, channels_first(patches)


def validation_patches(
    photograph: Annotated, config: PrnConfig, seed: int
) -> tuple[UInt8[ndarray, "n s s 3"], Bool[ndarray, "n"]]:
    """Patches that say how good a network is, the same each time: of lesions, evenly spread, and of healthy places.

    Returns:
        The patches, and whether the centre of each is a lesion.
    """
    lesions = LesionPool([photograph.lesion])
    healthy = RegionPool([lesion_free(photograph, config.negative_margin_px)], _VALIDATION_HEALTHY, seed)
    ids = np.linspace(0, len(lesions), min(len(lesions), _VALIDATION_LESIONS), endpoint=False).astype(np.int64)
    centres = np.concatenate([lesions.centres(ids), healthy.centres(np.arange(_VALIDATION_HEALTHY))])
    plain = Cuts(centres, np.zeros(len(centres), np.int32), np.ones((len(centres), 3)))
    return cut([photograph], plain, config.cut_px)[0], np.arange(len(centres)) < len(ids)


def triplet_batch(
    anchor: UInt8[ndarray, "n s s 3"], positive: UInt8[ndarray, "n s s 3"], negative: UInt8[ndarray, "n s s 3"]
) -> TripletBatch:
    """Patches as they are cut, in the layout that the network takes."""
    return TripletBatch(channels_first(anchor), channels_first(positive), channels_first(negative))
