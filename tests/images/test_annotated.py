"""Augmentation: all eight symmetries, each once, the same for a patch and its mask; gains about mid-grey."""

from __future__ import annotations

import numpy as np
import pytest

from ma_cluster.images.annotated import SYMMETRIES, draw_gains, scale_contrast, turn
from ma_cluster.images.contrast import MID_GREY

SQUARE = np.arange(9).reshape(3, 3)


def test_the_eight_symmetries_are_eight() -> None:
    assert len({turn(SQUARE, symmetry).tobytes() for symmetry in range(SYMMETRIES)}) == SYMMETRIES


def test_symmetry_zero_changes_nothing() -> None:
    assert (turn(SQUARE, 0) == SQUARE).all()


def test_two_symmetries_in_a_row_are_a_symmetry() -> None:
    all_eight = {turn(SQUARE, symmetry).tobytes() for symmetry in range(SYMMETRIES)}
    assert {turn(turn(SQUARE, a), b).tobytes() for a in range(8) for b in range(8)} == all_eight


@pytest.mark.parametrize("symmetry", range(SYMMETRIES))
def test_a_patch_and_its_mask_turn_together(symmetry: int) -> None:
    mask = np.random.default_rng(0).random((6, 6)) < 0.3
    patch = np.where(mask[:, :, None], np.uint8([200, 10, 10]), np.uint8([5, 6, 7]))
    turned = turn(patch, symmetry)
    assert ((turned == [200, 10, 10]).all(axis=2) == turn(mask, symmetry)).all()


@pytest.mark.parametrize("symmetry", range(SYMMETRIES))
def test_the_centre_of_an_odd_patch_stays(symmetry: int) -> None:
    assert turn(SQUARE, symmetry)[1, 1] == SQUARE[1, 1]


def test_no_jitter_changes_nothing() -> None:
    patch = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert (scale_contrast(patch, draw_gains(np.random.default_rng(1), 0.0)) == patch).all()


def test_jitter_keeps_mid_grey_and_stays_within_its_bound() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)[:, :, None].repeat(3, axis=2)
    for seed in range(50):
        changed = scale_contrast(ramp, draw_gains(np.random.default_rng(seed), 0.2)).astype(float)
        assert (changed[ramp == MID_GREY] == MID_GREY).all()
        bound = 0.2 * np.abs(ramp.astype(float) - MID_GREY) + 1
        assert (np.abs(changed - ramp) <= bound).all()


def test_jitter_scales_each_channel_by_its_own_gain() -> None:
    patch = np.full((4, 4, 3), 228, np.uint8)
    changed = scale_contrast(patch, draw_gains(np.random.default_rng(0), 0.2))
    assert len(set(changed[0, 0].tolist())) == 3
    assert (changed == changed[0, 0]).all()
