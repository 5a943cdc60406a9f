"""Patches cut on a device are those that are cut with OpenCV."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ma_cluster.config import HgnConfig
from ma_cluster.images.annotated import Annotated, Cuts, changed, cut, draw_cuts
from ma_cluster.images.device_patches import DevicePatches

SIZE = 48
CPU = torch.device("cpu")


def photograph(height: int, width: int, seed: int) -> Annotated:
    """Smooth, as photographs are at the scale of a pixel."""
    rng = np.random.default_rng(seed)
    rows, cols = np.indices((height, width))
    waves = [np.sin(rows / rng.uniform(5, 9) + cols / rng.uniform(5, 9) + rng.uniform(0, 6)) for _ in range(3)]
    marks = (np.hypot(rows % 24 - 12, cols % 24 - 12) < 6).astype(np.uint8) << np.uint8(seed)
    return Annotated((128 + 60 * np.dstack(waves)).astype(np.uint8), np.ones_like(marks, bool), marks == 1, kinds=marks)


PHOTOGRAPHS = [photograph(90, 70, 1), photograph(64, 100, 2)]


def drawn(config: HgnConfig) -> Cuts:
    """Patches all over both photographs and across their edges."""
    rng = np.random.default_rng(0)
    centres = np.column_stack([rng.integers(2, size=40), rng.integers(-10, 90, 40), rng.integers(-10, 100, 40)])
    return changed(draw_cuts(centres.astype(np.int32), rng, config.colour_jitter), rng, config)


def test_patches_that_are_only_turned_are_the_same_to_the_bit() -> None:
    cuts = drawn(HgnConfig(colour_jitter=0.2))
    patches, lesions = cut(PHOTOGRAPHS, cuts, SIZE)
    found, marks = DevicePatches(PHOTOGRAPHS, CPU).cut(cuts, SIZE)
    assert np.array_equal(found.numpy(), patches)
    assert np.array_equal(marks.numpy(), lesions)


def test_patches_that_are_rotated_zoomed_lit_and_blurred_are_those_of_opencv_but_for_its_rounding() -> None:
    config = HgnConfig(any_rotation=True, zoom=1.3, contrast_low=0.7, offset=8.0, blur_share=0.5, colour_jitter=0.1)
    cuts = drawn(config)
    patches, lesions = cut(PHOTOGRAPHS, cuts, SIZE)
    found, marks = DevicePatches(PHOTOGRAPHS, CPU).cut(cuts, SIZE)
    off = np.abs(found.numpy().astype(int) - patches)
    assert off.mean() < 0.6
    assert np.quantile(off, 0.999) <= 4  # OpenCV places pixels on a grid of 1/32
    assert (marks.numpy() != lesions).mean() < 0.01


def test_noise_is_of_the_size_asked_for_and_the_same_each_time() -> None:
    cuts = drawn(HgnConfig(noise_share=1.0))
    assert cuts.changes is not None
    cuts = replace(cuts, changes=replace(cuts.changes, noises=np.full(40, 5.0)))
    pixels = DevicePatches(PHOTOGRAPHS, CPU)
    noisy = pixels.cut(cuts, SIZE)[0]
    plain = pixels.cut(replace(cuts, changes=replace(cuts.changes, noises=np.zeros(40))), SIZE)[0]
    assert (noisy.float() - plain.float()).std().item() == pytest.approx(5.0, rel=0.03)
    assert torch.equal(noisy, pixels.cut(cuts, SIZE)[0])
