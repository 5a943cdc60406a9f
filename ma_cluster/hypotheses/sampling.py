"""Which patches a hypothesis network trains on: mini-batches as a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from numpy import ndarray

from ma_cluster.config import HgnConfig
from ma_cluster.hypotheses.step import HgnBatch
from ma_cluster.images.annotated import Annotated, Cuts, Marks, draw_cuts, lesion_free
from ma_cluster.images.pool import LesionPool, RegionPool

_PLACES_PER_IMAGE = 10**6


class HgnCuts:
    """A share of each mini-batch near lesion pixels, a share of the rest near places falsely proposed as lesions, where
    such are known (rims of lesions among them), and all others anywhere in the field of view. Keeps no pixels."""

    def __init__(self, photographs: Sequence[Annotated | Marks], config: HgnConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._lesions = LesionPool([photograph.lesion for photograph in photographs])
        self._anywhere = RegionPool([photograph.fov for photograph in photographs], _PLACES_PER_IMAGE, seed)
        self._suspects: RegionPool | None = None
        if any(photograph.proposed is not None for photograph in photographs):
            falsely = [lesion_free(photograph, margin_px=0) for photograph in photographs]
            self._suspects = RegionPool(falsely, _PLACES_PER_IMAGE, seed)

    def of_step(self, step: int) -> Cuts:
        """The patches of a mini-batch: those near lesions, those near false proposals, the others."""
        config, rng = self._config, np.random.default_rng([self._seed, step])
        near = round(config.batch_patches * config.lesion_share)
        ids = self._lesions.draw(near, rng, per_lesion=config.per_lesion)
        drawn = [self._lesions.centres(ids)]
        if self._suspects is not None:
            count = round((config.batch_patches - near) * config.suspect_share)
            drawn.append(self._suspects.centres(rng.integers(len(self._suspects), size=count)))
        others = rng.integers(len(self._anywhere), size=config.batch_patches - sum(map(len, drawn)))
        centres = np.concatenate([*drawn, self._anywhere.centres(others)])
        # the network must not learn that lesions lie in the middle: shift by up to a quarter of the patch
        reach = config.patch_px // 4
        centres[:, 1:] += rng.integers(-reach, reach + 1, size=(len(centres), 2), dtype=np.int32)
        return draw_cuts(centres, rng, config.colour_jitter)


def hgn_batch(patches: UInt8[ndarray, "n s s 3"], lesion: Bool[ndarray, "n s s"]) -> HgnBatch:
    """Patches as they are cut, in the layout that the network takes."""
    return HgnBatch(torch.from_numpy(patches).permute(0, 3, 1, 2), torch.from_numpy(lesion))
