"""What a person looks at."""

import io

import numpy as np
from PIL import Image

from ma_cluster.lesions.overlay import OUTLINE_RGB, draw_overlay, encode_mask, encode_overlay


def test_a_lesion_is_outlined_but_none_of_its_pixels_is_hidden():
    pixels = np.full((300, 300, 3), 90, np.uint8)
    mask = np.zeros((300, 300), bool)
    mask[100:112, 150:165] = True
    overlay = draw_overlay(pixels, mask)
    assert (overlay[mask] == 90).all()
    coloured = np.abs(overlay.astype(int) - OUTLINE_RGB).max(axis=2) < 60  # a smoothed line
    assert coloured.sum() > 40
    assert (pixels == 90).all()


def test_without_lesions_the_overlay_is_the_photograph():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    assert (draw_overlay(pixels, np.zeros((60, 70), bool)) == pixels).all()


def test_a_mask_survives_its_png_and_takes_one_bit_a_pixel():
    mask = np.random.default_rng(0).random((123, 77)) < 0.2
    with Image.open(io.BytesIO(encode_mask(mask))) as image:
        assert image.mode == "1"
        assert (np.asarray(image) == mask).all()


def test_an_overlay_is_a_jpeg_of_the_photographs_size():
    pixels = np.full((60, 70, 3), 90, np.uint8)
    with Image.open(io.BytesIO(encode_overlay(pixels, np.zeros((60, 70), bool)))) as image:
        assert (image.format, image.size) == ("JPEG", (70, 60))
