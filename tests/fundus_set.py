"""A training set in IDRiD's layout, small enough for a test: a public-domain photograph with drawn lesions."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ma_cluster.config import HgnConfig, ImageConfig, Recipe, lite, tiny
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


def rich_set(root: Path) -> dict[str, str]:
    """A training set with haemorrhages too, and two photographs that are taken to be healthy: both of a request."""
    write_training_set(root / "data")
    masks = root / "data" / MASKS_FOLDER / PART
    (masks / "2. Haemorrhages").mkdir()
    for mask in (masks / "1. Microaneurysms").iterdir():
        with Image.open(mask) as image:
            moved = np.roll(np.asarray(image), 60, axis=0)
        Image.fromarray(moved).save(masks / "2. Haemorrhages" / mask.name.replace("_MA", "_HE"), compression="group4")
    (root / "healthy").mkdir()
    for number, photograph in enumerate(sorted((root / "data" / IMAGES_FOLDER / PART).iterdir())[:2]):
        shutil.copy(photograph, root / "healthy" / f"healthy_{number}.jpg")
    return {"data": str(root / "data"), "healthy": str(root / "healthy")}


def rich_recipe() -> Recipe:
    """`tiny` with all that `lite` asks for in the training of its 0.5x network."""
    names = {field.name for field in fields(HgnConfig)} - {"width", "steps", "warmup_steps"}
    own = {name: getattr(lite().hgn_half, name) for name in names}
    hgn = replace(tiny().hgn_half, **(own | {"patch_px": 64, "hard_probability": 0.02}))
    return replace(tiny(), hgn_half=hgn)
