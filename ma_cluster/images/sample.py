"""A small screening archive with known truth, for everyone: one CC0 photograph, varied, with drawn microaneurysms.

It has IDRiD's folder layout, so that `read_dataset` and with it `evaluate` read it as they read the real one.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from importlib.resources import files

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from numpy import ndarray
from PIL import Image

from ma_cluster.config import ImageConfig
from ma_cluster.errors import UsageError
from ma_cluster.images.datasets import IMAGES_FOLDER, MASKS_FOLDER, TEST_PART
from ma_cluster.images.fundus import find_fov
from ma_cluster.images.phantom import PhantomConfig, draw_phantom
from ma_cluster.storage.store import open_store

JPEG_QUALITY = 92
HEALTHY_EVERY = 6  # photographs 6, 12, ... show no lesion
README_KEY = "README.txt"
README = """Sample archive of ma_cluster: colour fundus photographs with microaneurysms whose truth is known.

Photographs: variations (flip, rotation, exposure, colour, noise) of one photograph of a healthy left eye,
https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg
(Mikael Haggstrom, 2014, WikiJournal of Medicine 1 (2), doi:10.15347/wjm/2014.008).
Lesions: drawn by a computer. The masks hold the drawn microaneurysms; haemorrhages, vessel fragments and bright dots
are drawn too and stand in no mask. No mask: a photograph without lesions. No patient's disease is shown.

Licence: CC0 1.0 (public domain), photographs, masks and this text; https://creativecommons.org/publicdomain/zero/1.0/
"""


@dataclass(frozen=True, slots=True)
class SamplePhotograph:
    """One photograph of the archive: its keys, and how many microaneurysms were drawn. `mask` is None without any."""

    name: str
    image: str
    mask: str | None
    microaneurysms: int


@dataclass(frozen=True, slots=True)
class SampleArchive:
    """What was written, and where."""

    url: str
    photographs: tuple[SamplePhotograph, ...]


def write_sample(destination_url: str, images: int = 6, seed: int = 0) -> SampleArchive:
    """Write the archive; photograph i is the same for a seed however many are asked for.

    Raises:
        UsageError: fewer than one image, a negative seed, or a URL no store knows.
        StoreError: the destination cannot be written.
    """
    if images < 1 or seed < 0:
        raise UsageError("a sample archive needs at least one image and a seed of 0 or more")
    store, original = open_store(destination_url), retina()
    store.put(README_KEY, README.encode())
    written = []
    for number in range(1, images + 1):
        name = f"sample_{number:03d}"
        healthy = number % HEALTHY_EVERY == 0
        pixels, truth, count = _photograph(original, np.random.default_rng([seed, number]), healthy)
        image = f"{IMAGES_FOLDER}{TEST_PART}/{name}.jpg"
        mask = None if count == 0 else f"{MASKS_FOLDER}{TEST_PART}/1. Microaneurysms/{name}_MA.tif"
        store.put(image, _encode(Image.fromarray(pixels), format="JPEG", quality=JPEG_QUALITY))
        if mask is not None:
            store.put(mask, _encode(Image.fromarray(truth), format="TIFF", compression="group4"))
        written.append(SamplePhotograph(name, image, mask, count))
    return SampleArchive(store.url, tuple(written))


def enlarged_sample(side_px: int) -> tuple[bytes, Bool[ndarray, "h w"]]:
    """The archive's first photograph at another size, as a JPEG, and where its microaneurysms are."""
    pixels, truth, _ = _photograph(retina(), np.random.default_rng([0, 1]), healthy=False)
    size = (side_px, side_px)
    large = cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC)
    known = cv2.resize(truth.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    return _encode(Image.fromarray(large), format="JPEG", quality=JPEG_QUALITY), known


def retina() -> UInt8[ndarray, "h w 3"]:
    """The photograph that all samples are variations of: a healthy left eye, CC0 as retina.txt beside it says."""
    with files(__package__).joinpath("retina.jpg").open("rb") as file:
        return np.array(Image.open(file))


def _photograph(
    original: UInt8[ndarray, "h w 3"], rng: np.random.Generator, healthy: bool
) -> tuple[UInt8[ndarray, "h w 3"], Bool[ndarray, "h w"], int]:
    """A variation of the original with its truth and the number of microaneurysms; none where `healthy`."""
    pixels = _reposition(original, rng)
    fov, _ = find_fov(pixels, ImageConfig())
    haemorrhages, fragments, exudates = (int(count) for count in rng.integers(0, 6, size=3))
    config = PhantomConfig(
        dots=int(rng.integers(4, 26)), haemorrhages=haemorrhages, fragments=fragments, exudates=exudates
    )
    if healthy:
        config = PhantomConfig(dots=0, haemorrhages=0, fragments=0, exudates=0)
    phantom = draw_phantom(pixels, fov, rng, config)
    return _expose(phantom.pixels, rng), phantom.truth, len(phantom.dots)


def _reposition(pixels: UInt8[ndarray, "h w 3"], rng: np.random.Generator) -> UInt8[ndarray, "h w 3"]:
    """Left or right eye, upright or inverted optics, the head tilted by up to 12 degrees about the FOV's centre."""
    flips = tuple(axis for axis in (0, 1) if rng.random() < 0.5)
    flipped = np.flip(pixels, flips)
    fov, _ = find_fov(flipped, ImageConfig())
    turn = cv2.getRotationMatrix2D((fov.col, fov.row), float(rng.uniform(-12, 12)), 1.0)
    return cv2.warpAffine(flipped, turn, (pixels.shape[1], pixels.shape[0]), flags=cv2.INTER_CUBIC)


def _expose(pixels: UInt8[ndarray, "h w 3"], rng: np.random.Generator) -> UInt8[ndarray, "h w 3"]:
    """Another flash, another white balance, and the sensor's noise, which grows with the root of the light."""
    gains = rng.uniform(0.75, 1.02) * rng.uniform((0.95, 0.9, 0.75), (1.03, 1.12, 1.15))
    light = pixels * gains.astype(np.float32)
    grain = rng.standard_normal(size=light.shape, dtype=np.float32)
    noise = np.float32(rng.uniform(1.5, 3.5)) * np.sqrt(light / 128) * grain
    return np.clip(np.rint(light + noise), 0, 255).astype(np.uint8)


def _encode(image: Image.Image, **options: str | int) -> bytes:
    out = io.BytesIO()
    image.save(out, **options)  # type: ignore[arg-type]
    return out.getvalue()
