"""Which triplets the patch refinement network trains on: anchors and positives uniform, negatives from the ledger."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8
from numpy import ndarray

from ma_cluster.config import PrnConfig
from ma_cluster.errors import UsageError
from ma_cluster.images.annotated import Annotated, Cuts, Marks, cut, draw_cuts, lesion_free
from ma_cluster.images.pool import LesionPool, RegionPool

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

    def of_step(self, step: int, negatives: Int64[ndarray, "n"]) -> Cuts:
        """Anchors, then positives, then the negatives whose ids are given."""
        config, rng = self._config, np.random.default_rng([self._seed, step])
        anchor, positive = (self._lesions.draw(config.triplets, rng, per_lesion=config.per_lesion) for _ in range(2))
        lesions = (self._lesions.centres(anchor), self._lesions.centres(positive))
        return draw_cuts(np.concatenate([*lesions, self._negatives(negatives)]), rng, config.colour_jitter)

    def plain(self, ids: Int64[ndarray, "n"]) -> Cuts:
        """Healthy patches of the pool without augmentation, for scoring them again."""
        return Cuts(self._negatives(ids), np.zeros(len(ids), np.int32), np.ones((len(ids), 3)))

    def _negatives(self, ids: Int64[ndarray, "n"]) -> Int32[ndarray, "n 3"]:
        centres = self._healthy.centres(ids)
        centres[:, 0] = self._sources[centres[:, 0]]
        return centres


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
