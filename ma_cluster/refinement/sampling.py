"""Which triplets the patch refinement network trains on: anchors and positives uniform, negatives by their loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64, UInt8
from numpy import ndarray
from torch import Tensor

from ma_cluster.config import PrnConfig
from ma_cluster.images.annotated import Annotated, cut, lesion_free
from ma_cluster.images.contrast import MID_GREY
from ma_cluster.images.patches import crop
from ma_cluster.images.pool import LesionPool, RegionPool
from ma_cluster.refinement.fitting import TripletBatch
from ma_cluster.refinement.selection import draw_by_loss

_BATCH = 256


class TripletDraws:
    """Triplets as a pure function of (seed, step, losses of the healthy pool)."""

    def __init__(self, photographs: Sequence[Annotated], config: PrnConfig, seed: int) -> None:
        self._photographs, self._config, self._seed = photographs, config, seed
        regions = [lesion_free(photograph, config.negative_margin_px) for photograph in photographs]
        self._lesions = LesionPool([photograph.lesion for photograph in photographs])
        self._healthy = RegionPool(regions, config.healthy_per_image, seed)

    @property
    def healthy(self) -> int:
        """Size of the healthy pool; its ids are 0 .. healthy - 1."""
        return len(self._healthy)

    def batch(self, step: int, losses: Float32[ndarray, "p"]) -> tuple[TripletBatch, Int64[ndarray, "n"]]:
        """The triplets of a step, augmented, and the pool ids of its negatives."""
        rng = np.random.default_rng([self._seed, step])
        count = self._config.triplets
        anchor, positive = (self._lesions.draw(count, rng, per_lesion=self._config.per_lesion) for _ in range(2))
        negative = draw_by_loss(losses, count, rng)
        batch = TripletBatch(
            self._patches(self._lesions.centres(anchor), rng),
            self._patches(self._lesions.centres(positive), rng),
            self._patches(self._healthy.centres(negative), rng),
        )
        return batch, negative

    def plain(self, ids: Int64[ndarray, "n"]) -> Iterator[tuple[Int64[ndarray, "b"], UInt8[Tensor, "b 3 s s"]]]:
        """Healthy patches of the pool without augmentation, in batches, for scoring them again."""
        size = self._config.patch_px
        for start in range(0, len(ids), _BATCH):
            part = ids[start : start + _BATCH]
            centres = self._healthy.centres(part)
            patches = [crop(self._photographs[i].enhanced, int(r), int(c), size, MID_GREY) for i, r, c in centres]
            yield part, torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2)

    def _patches(self, centres: Int32[ndarray, "n 3"], rng: np.random.Generator) -> UInt8[Tensor, "n 3 s s"]:
        config = self._config
        patches = [
            cut(self._photographs[image], (int(row), int(col)), config.patch_px, rng, config.colour_jitter)[0]
            for image, row, col in centres
        ]
        return torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2)
