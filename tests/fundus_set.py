"""A training set in IDRiD's layout, small enough for a test: a public-domain photograph with drawn lesions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ma_cluster.config import ImageConfig
from ma_cluster.images.datasets import IMAGES_FOLDER, MASKS_FOLDER
from ma_cluster.images.fundus import find_fov
from ma_cluster.images.phantom import PhantomConfig, draw_phantom
from ma_cluster.images.sample import retina

PART = "a. Training Set"
NAMES = ("IDRiD_01", "IDRiD_02", "IDRiD_45")
"""The last one validates."""


def write_training_set(root: Path, side_px: int = 600, names: Sequence[str] = NAMES) -> None:
    """Square photographs and their masks, a quarter turn apart; each lesion is about ten pixels across."""
    original = cv2.resize(retina(), (side_px, side_px), interpolation=cv2.INTER_AREA)
    images = root / IMAGES_FOLDER / PART
    masks = root / MASKS_FOLDER / PART / "1. Microaneurysms"
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    config = PhantomConfig(dots=12, haemorrhages=0, fragments=0, exudates=0, fov_diameter_px=1000.0)
    for number, name in enumerate(names):
        pixels = np.ascontiguousarray(np.rot90(original, number))
        phantom = draw_phantom(pixels, find_fov(pixels, ImageConfig())[0], np.random.default_rng(number), config)
        Image.fromarray(phantom.pixels).save(images / f"{name}.jpg", quality=92)
        Image.fromarray(phantom.truth).save(masks / f"{name}_MA.tif", compression="group4")
