"""Which patches a hypothesis network trains on: mini-batches as a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ma_cluster.config import HgnConfig
from ma_cluster.hypotheses.fitting import HgnBatch
from ma_cluster.images.annotated import Annotated, cut
from ma_cluster.images.pool import LesionPool, RegionPool

_PLACES_PER_IMAGE = 10**6


class HgnDraws:
    """A share of each mini-batch near lesion pixels, the rest anywhere in the field of view."""

    def __init__(self, photographs: Sequence[Annotated], config: HgnConfig, seed: int) -> None:
        self._photographs, self._config, self._seed = photographs, config, seed
        self._lesions = LesionPool([photograph.lesion for photograph in photographs])
        self._anywhere = RegionPool([photograph.fov for photograph in photographs], _PLACES_PER_IMAGE, seed)

    def batch(self, step: int) -> HgnBatch:
        """The mini-batch of a step, augmented."""
        config, rng = self._config, np.random.default_rng([self._seed, step])
        near = round(config.batch_patches * config.lesion_share)
        ids = self._lesions.draw(near, rng, per_lesion=config.per_lesion)
        others = rng.integers(len(self._anywhere), size=config.batch_patches - near)
        centres = np.concatenate([self._lesions.centres(ids), self._anywhere.centres(others)])
        # the network must not learn that lesions lie in the middle: shift by up to a quarter of the patch
        reach = config.patch_px // 4
        centres[:, 1:] += rng.integers(-reach, reach + 1, size=(len(centres), 2), dtype=np.int32)
        pairs = [
            cut(self._photographs[image], (int(row), int(col)), config.patch_px, rng, config.colour_jitter)
            for image, row, col in centres
        ]
        patches = torch.from_numpy(np.stack([patch for patch, _ in pairs])).permute(0, 3, 1, 2)
        return HgnBatch(patches, torch.from_numpy(np.stack([lesion for _, lesion in pairs])))
