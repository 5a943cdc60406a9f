"""Photographs for the tests: synthetic ones whose field of view is known, and the real ones where they are at hand."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image

from ma_cluster.images.fundus import Fov

RETINA_RGB = (170.0, 85.0, 40.0)


def fundus_photograph(
    shape: tuple[int, int], fov: Fov, *, brightness: float = 1.0, noise: float = 1.0, seed: int = 0
) -> UInt8[ndarray, "h w 3"]:
    """A bright disc, darker towards its rim, with a disc of the optic nerve, on the lens's dark surround.

    Args:
        shape: height and width, pixels; what of the disc lies beyond is cut off.
        fov: where the disc is.
        brightness: factor on the disc's colour.
        noise: standard deviation of the sensor's noise, grey levels.
        seed: of the noise.
    """
    rows, cols = np.indices(shape, dtype=np.float32)
    radius = fov.diameter_px / 2
    distance = np.hypot(rows - fov.row, cols - fov.col)
    light = brightness * (1 - 0.35 * (distance / radius) ** 2)
    nerve = np.hypot(rows - fov.row, cols - fov.col - 0.5 * radius) < 0.12 * radius
    rgb = (light * (1 + 0.4 * nerve))[:, :, None] * np.array(RETINA_RGB, np.float32)
    inside = np.clip(radius + 0.5 - distance, 0, 1)[:, :, None]
    grain = np.random.default_rng(seed).normal(0, noise, (*shape, 3)) if noise else 0.0
    return np.clip(np.rint(rgb * inside + 4 + grain), 0, 255).astype(np.uint8)


def noise_photograph(shape: tuple[int, int], seed: int = 0) -> UInt8[ndarray, "h w 3"]:
    """Colours at random, smooth enough for a JPEG to keep: for codecs, where the motif does not matter."""
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-shape[0] // 8), -(-shape[1] // 8), 3), dtype=np.uint8)
    size = coarse.shape[1] * 8, coarse.shape[0] * 8
    smooth = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(smooth)[: shape[0], : shape[1]].copy()


def encode(image: UInt8[ndarray, "h w 3"] | Image.Image, kind: str, **options: Any) -> bytes:
    """Encoded bytes, by Pillow."""
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, format=kind, **options)
    return out.getvalue()


def idrid_folder() -> Path:
    """IDRiD's folder; the calling test is skipped where there is none."""
    return _folder("MA_CLUSTER_IDRID", "idrid")


def healthy_folder() -> Path:
    """The folder of healthy photographs beside IDRiD's; the calling test is skipped where there is none."""
    folder = idrid_folder().with_name("idrid_healthy")
    if not folder.is_dir():
        pytest.skip("no idrid_healthy folder beside IDRiD's")
    return folder


def _folder(variable: str, name: str) -> Path:
    folder = Path(os.environ.get(variable, Path(__file__).parents[2] / "shared" / name))
    if not folder.is_dir():
        pytest.skip(f"no {name} data: set {variable} to its folder")
    return folder
