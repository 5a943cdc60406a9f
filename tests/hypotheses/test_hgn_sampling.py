"""Where the patches of a hypothesis network's mini-batches lie."""

from __future__ import annotations

import numpy as np

from ma_cluster.config import HgnConfig
from ma_cluster.hypotheses.sampling import HgnCuts
from ma_cluster.images.annotated import Marks

CONFIG = HgnConfig(patch_px=16, batch_patches=16, lesion_share=0.5, suspect_share=0.5)
REACH = CONFIG.patch_px // 4


def _square(row: int, col: int, side: int = 8) -> np.ndarray:
    mask = np.zeros((96, 96), dtype=bool)
    mask[row : row + side, col : col + side] = True
    return mask


def _share_near(cuts: HgnCuts, mask: np.ndarray) -> float:
    """Of the patches of 50 steps, how many are centred within the shift of a mask."""
    centres = np.concatenate([cuts.of_step(step).centres[:, 1:] for step in range(50)])
    places = np.argwhere(mask)
    distances = np.abs(centres[:, None] - places[None]).max(axis=2).min(axis=1)
    return float((distances <= REACH).mean())


def test_a_share_of_the_patches_lies_where_a_lesion_is_falsely_proposed() -> None:
    """The proposal covers the lesion too, which is none of the false places."""
    lesion, false = _square(8, 8), _square(64, 64)
    fov = np.ones_like(lesion)
    plain = HgnCuts([Marks(fov, lesion)], CONFIG, seed=1)
    told = HgnCuts([Marks(fov, lesion, lesion | false)], CONFIG, seed=1)
    chance = 16 * 16 / 96**2
    assert abs(_share_near(plain, false) - 0.5 * chance) < 0.02
    assert abs(_share_near(told, false) - (0.25 + 0.25 * chance)) < 0.02
    assert abs(_share_near(told, lesion) - (0.5 + 0.25 * chance)) < 0.02


def test_mini_batches_without_proposals_do_not_depend_on_the_share_for_them() -> None:
    lesion = _square(8, 8)
    marks = Marks(np.ones_like(lesion), lesion)
    none = HgnConfig(patch_px=16, batch_patches=16, lesion_share=0.5, suspect_share=0.0)
    ours, others = (HgnCuts([marks], config, seed=1).of_step(3).centres for config in (CONFIG, none))
    assert np.array_equal(ours, others)
