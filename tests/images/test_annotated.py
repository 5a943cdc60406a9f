"""Augmentation: all eight symmetries, each once, the same for a patch and its mask; gains about mid-grey."""

from __future__ import annotations

import numpy as np
import pytest

from ma_cluster.config import HgnConfig
from ma_cluster.images.annotated import (
    SYMMETRIES,
    Annotated,
    Changes,
    Cuts,
    changed,
    cut,
    draw_cuts,
    draw_gains,
    scale_contrast,
    turn,
)
from ma_cluster.images.reading import MID_GREY

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


def photograph() -> Annotated:
    """Grain, with a dark disc that is a microaneurysm and a bright one that is a haemorrhage."""
    rows, cols = np.indices((200, 200))
    dark, bright = np.hypot(rows - 90, cols - 110) < 9, np.hypot(rows - 120, cols - 80) < 9
    pixels = np.random.default_rng(0).integers(110, 140, (200, 200, 3), dtype=np.uint8)
    pixels[dark], pixels[bright] = 20, 230
    return Annotated(pixels, np.ones_like(dark), dark, kinds=(dark | bright * 2).astype(np.uint8))


def cuts_at(row: int, col: int, count: int, changes: Changes | None) -> Cuts:
    return Cuts(np.tile(np.int32([0, row, col]), (count, 1)), np.zeros(count, np.int32), np.ones((count, 3)), changes)


def changes_of(count: int, **given: np.ndarray) -> Changes:
    none = {name: np.zeros(count) for name in ("degrees", "blurs", "noises")}
    none |= {"zooms": np.ones(count), "offsets": np.zeros((count, 3)), "seeds": np.arange(count)}
    return Changes(**(none | given))


def test_a_change_by_nothing_changes_nothing() -> None:
    plain, still = (cut([photograph()], cuts_at(97, 103, 1, changes), 64) for changes in (None, changes_of(1)))
    assert np.array_equal(plain[0], still[0]) and np.array_equal(plain[1], still[1])
    beyond, _ = cut([photograph()], cuts_at(5, 199, 1, changes_of(1)), 64)
    assert (beyond[0, :20, 40:] == 128).all()


def test_lesions_of_each_kind_turn_and_grow_with_their_pixels() -> None:
    degrees, zooms = np.linspace(0, 350, 8), np.linspace(0.8, 1.25, 8)
    patches, lesions = cut([photograph()], cuts_at(105, 95, 8, changes_of(8, degrees=degrees, zooms=zooms)), 96)
    for patch, lesion, zoom in zip(patches, lesions, zooms, strict=True):
        for kind, seen in ((1, patch[..., 0] < 70), (2, patch[..., 0] > 180)):
            marked = lesion == kind
            assert (seen & marked).sum() > 0.95 * (seen | marked).sum() - 12  # a rim of half a pixel
            assert abs(marked.sum() / (np.pi * (9 * zoom) ** 2) - 1) < 0.1


def test_light_changes_within_what_the_config_allows() -> None:
    config = HgnConfig(contrast_low=0.7, contrast_high=1.35, offset=8.0)
    ramp = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    whole = Annotated(ramp, np.ones((16, 16), bool), np.zeros((16, 16), bool))
    centres = np.tile(np.int32([0, 8, 8]), (50, 1))
    rng = np.random.default_rng(0)
    drawn = changed(draw_cuts(centres, rng, 0.0), rng, config)
    patches, _ = cut([whole], drawn, 16)
    darkest, brightest = patches[..., 0].min(axis=(1, 2)), patches[..., 0].max(axis=(1, 2))
    assert darkest.min() == 0 and 128 - 0.7 * 128 - 8 - 1 <= darkest.max() <= 128 - 0.7 * 128 + 8 + 1
    assert brightest.max() == 255 and brightest.min() >= 128 + 0.7 * 127 - 8 - 1
    assert changed(drawn, rng, HgnConfig()) is drawn


def test_blurred_and_noisy_patches_are_a_function_of_their_numbers() -> None:
    spoilt = changes_of(2, blurs=np.array([1.0, 0.0]), noises=np.array([0.0, 6.0]))
    plain, _ = cut([photograph()], cuts_at(40, 40, 2, None), 64)
    first, second = (cut([photograph()], cuts_at(40, 40, 2, spoilt), 64)[0] for _ in range(2))
    assert np.array_equal(first, second)
    blurred, noisy = first.std(axis=(1, 2, 3)) - plain.std(axis=(1, 2, 3))
    assert blurred < -2 and noisy > 1
    assert np.array_equal(cut([photograph()], cuts_at(40, 40, 2, spoilt)[1:], 64)[0][0], first[1])
