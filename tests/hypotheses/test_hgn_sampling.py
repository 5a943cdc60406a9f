"""Where the patches of a hypothesis network's mini-batches lie."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from ma_cluster.config import HgnConfig
from ma_cluster.hypotheses.frrn import build_hgn
from ma_cluster.hypotheses.hgn_training import HgnCuts, apportioned, hgn_batch, hgn_losses
from ma_cluster.images.annotated import UNKNOWN, Marks

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


@given(st.floats(0, 1), st.integers(1, 32), st.integers(1, 200))
def test_a_share_is_never_a_row_off_after_any_number_of_steps(share: float, rows: int, steps: int) -> None:
    counts = [apportioned(share, rows, step) for step in range(steps)]
    assert abs(sum(counts) - share * rows * steps) <= 1
    assert max(counts) - min(counts) <= 1


def test_the_shares_of_the_docstring() -> None:
    assert [apportioned(0.2, 8, step) for step in range(10)] == [1, 2, 1, 2, 2] * 2


SHARES = HgnConfig(
    patch_px=16,
    batch_patches=16,
    kinds=("MA", "HE", "EX", "SE"),
    lesion_share=0.5,
    haemorrhage_share=0.2,
    healthy_share=0.08,
    hard_share=0.1,
)


def _mixed() -> list[Marks]:
    """A photograph with a microaneurysm and a haemorrhage, between two without any lesion."""
    lesion, haemorrhage = _square(8, 8), _square(64, 64)
    fov = np.ones_like(lesion)
    kinds = (lesion | haemorrhage * 2).astype(np.uint8)
    none = Marks(fov, np.zeros_like(fov), kinds=np.zeros_like(kinds))
    return [none, Marks(fov, lesion, kinds=kinds), none]


def test_haemorrhages_and_photographs_without_lesions_have_their_shares() -> None:
    cuts = HgnCuts(_mixed(), SHARES, seed=1)
    hard = cuts.hard(3)
    centres = np.concatenate([cuts.of_step(step, np.zeros(cuts.hard(step), np.int64)).centres for step in range(100)])
    assert len(centres) == 1600 and hard in (1, 2)
    images = centres[:, 0]
    near = np.abs(centres[:, 1:] - 68).max(axis=1) <= REACH + 4
    assert abs((near & (images == 1)).mean() - (0.2 + 0.12 * 16**2 / 96**2)) < 0.02
    assert abs((images == 2).mean() - 0.04) < 0.02  # half of those anywhere on such photographs; hard id 0 lies on 0
    assert abs((images == 0).mean() - 0.14) < 0.02


def test_without_photographs_without_lesions_their_shares_go_anywhere() -> None:
    cuts = HgnCuts(_mixed()[1:2], SHARES, seed=1)
    assert cuts.hard_pool == 0 and cuts.hard(0) == 0
    assert len(cuts.of_step(0).centres) == 16


def test_false_components_give_their_probability_to_the_place_nearest_to_them() -> None:
    cuts, probability = HgnCuts(_mixed(), SHARES, seed=1), np.full((96, 96), 0.1, np.float32)
    probability[40:43, 50:53] = 0.5
    probability[41, 51] = 0.9
    probability[80, 10:12] = 0.8  # too small
    ids, losses = cuts.hard_losses(1, probability)
    assert ids.tolist() == list(range(cuts.hard_pool // 2, cuts.hard_pool))
    (found,) = np.flatnonzero(losses)
    assert losses[found] == np.float32(0.9)
    drawn = cuts.of_step(0, np.repeat(ids[[found]], 2)).centres
    assert (np.abs(drawn[:, 1:] - (41, 51)).max(axis=1) <= REACH + 4).sum() >= 2


def test_each_bit_of_a_cut_becomes_the_mask_of_its_kind() -> None:
    bits = np.array([[[0, 1], [2, 9]]], np.uint8)
    batch = hgn_batch(np.zeros((1, 2, 2, 3), np.uint8), bits, 4)
    assert batch.truth.int().sum(dim=(0, 2, 3)).tolist() == [2, 1, 0, 1]
    assert batch.truth[0, :, 1, 1].tolist() == [True, False, False, True]
    assert batch.unknown is not None and not batch.unknown.any()


def test_a_kind_that_nobody_looked_for_costs_nothing_whatever_is_said() -> None:
    lesions = np.full((2, 32, 32), 1 << UNKNOWN + 1 | 1 << UNKNOWN + 3, np.uint8)
    lesions[0, :9, :9] |= 1 << 0 | 1 << 2
    patches = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    batch, config = hgn_batch(patches, lesions, 4), HgnConfig(width=0.05, kinds=("MA", "HE", "EX", "SE"))
    assert batch.unknown is not None
    assert batch.unknown.float().mean(dim=(0, 2, 3)).tolist() == [0, 1, 0, 1]
    torch.manual_seed(0)
    model = build_hgn(config, 4)
    hgn_losses(model, batch, config, dtype=torch.float32).total.backward()
    assert model.head.weight.grad is not None
    taught = model.head.weight.grad.abs().sum(dim=(1, 2, 3)) > 0
    assert taught.tolist() == [True, True, False, True, False]  # the background first
