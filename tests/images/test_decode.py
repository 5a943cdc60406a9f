"""Decoding: every format and mode a camera or an export gives, and every way its bytes can be wrong."""

from __future__ import annotations

import io
import pickle
import resource
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from photographs import encode, noise_photograph
from PIL import Image, ImageOps

from ma_cluster.config import ImageConfig
from ma_cluster.errors import ImageRefusedError, Reason, Status
from ma_cluster.images.decode import decode

CONFIG = ImageConfig(min_side_px=16)
PIXELS = noise_photograph((48, 64))
IMAGE = Image.fromarray(PIXELS)
GREY = PIXELS[:, :, 0]
EXIF = Image.Exif()
EXIF[0x010E] = "a comment that is long enough to be found by a flipped bit"

ENCODED = {
    "jpeg": encode(PIXELS, "JPEG", quality=90),
    "jpeg with EXIF": encode(PIXELS, "JPEG", exif=EXIF),
    "progressive jpeg": encode(PIXELS, "JPEG", quality=90, progressive=True),
    "cmyk jpeg": encode(IMAGE.convert("CMYK"), "JPEG", quality=95),
    "png": encode(PIXELS, "PNG"),
    "palette png": encode(IMAGE.convert("P"), "PNG"),
    "16-bit png": encode(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"),
    "tiff": encode(PIXELS, "TIFF"),
    "lzw tiff": encode(PIXELS, "TIFF", compression="tiff_lzw"),
    "deflate tiff": encode(PIXELS, "TIFF", compression="tiff_adobe_deflate"),
    "jpeg tiff": encode(PIXELS, "TIFF", compression="jpeg"),
    "1-bit tiff": encode(IMAGE.convert("1"), "TIFF", compression="group4"),
    "float tiff": encode(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
    "bmp": encode(PIXELS, "BMP"),
    "webp": encode(PIXELS, "WEBP", quality=90),
    "jpeg 2000": encode(PIXELS, "JPEG2000"),
    "ppm": encode(PIXELS, "PPM"),
}


def refusal(data: bytes, config: ImageConfig = CONFIG) -> Reason:
    with pytest.raises(ImageRefusedError) as caught:
        decode(data, config)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["png", "tiff", "lzw tiff", "deflate tiff", "bmp", "ppm"])
def test_lossless_formats_give_the_pixels(kind: str) -> None:
    assert (decode(ENCODED[kind], CONFIG) == PIXELS).all()


@pytest.mark.parametrize("kind", ["jpeg", "progressive jpeg", "cmyk jpeg", "webp", "jpeg 2000"])
def test_lossy_formats_give_nearly_the_pixels(kind: str) -> None:
    assert np.abs(decode(ENCODED[kind], CONFIG).astype(int) - PIXELS).mean() < 8


def test_progressive_and_baseline_jpeg_agree() -> None:
    assert (decode(ENCODED["progressive jpeg"], CONFIG) == decode(ENCODED["jpeg"], CONFIG)).all()


def test_16_bit_grey_keeps_its_8_upper_bits() -> None:
    assert (decode(ENCODED["16-bit png"], CONFIG) == GREY[:, :, None]).all()


def test_1_bit_becomes_black_and_white() -> None:
    bits = IMAGE.convert("1")
    assert (decode(encode(bits, "PNG"), CONFIG) == np.asarray(bits)[:, :, None] * 255).all()


def test_grey_becomes_three_equal_channels() -> None:
    assert (decode(encode(GREY, "PNG"), CONFIG) == GREY[:, :, None]).all()


def test_a_palette_becomes_its_colours() -> None:
    palette = IMAGE.convert("P")
    assert (decode(ENCODED["palette png"], CONFIG) == np.asarray(palette.convert("RGB"))).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_over_black(mode: str) -> None:
    image = IMAGE.convert(mode)
    alpha = np.zeros(PIXELS.shape[:2], np.uint8)
    alpha[:, 32:] = 255
    image.putalpha(Image.fromarray(alpha))
    decoded = decode(encode(image, "PNG"), CONFIG)
    assert not decoded[:, :32].any()
    assert (decoded[:, 32:] == np.asarray(IMAGE.convert(mode[:-1]).convert("RGB"))[:, 32:]).all()


def test_float_and_integer_ranges_are_scaled() -> None:
    assert (decode(ENCODED["float tiff"], CONFIG) == GREY[:, :, None]).all()
    wide = Image.fromarray(GREY.astype(np.int32) * 257)
    assert (decode(encode(wide, "TIFF"), CONFIG) == GREY[:, :, None]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_every_exif_orientation_is_turned_upright(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    # the inverse of the eight turns: 6 and 8 undo each other, every other one undoes itself
    stored = _orient(IMAGE, {6: 8, 8: 6}.get(orientation, orientation))
    assert (decode(encode(stored, kind, exif=exif), CONFIG) == PIXELS).all()


def _orient(image: Image.Image, orientation: int) -> Image.Image:
    turned = image.copy()
    turned.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(turned)
    assert upright is not None
    return Image.fromarray(np.asarray(upright))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (decode(encode(IMAGE, "PNG", exif=exif), CONFIG) == PIXELS).all()


def test_damaged_exif_is_no_reason_to_refuse_pixels() -> None:
    data = encode(PIXELS, "JPEG", quality=90, exif=b"Exif\0\0MM\0*" + b"\xff" * 40)
    assert (decode(data, CONFIG) == decode(ENCODED["jpeg"], CONFIG)).all()


@pytest.mark.parametrize("kind", ["jpeg", "progressive jpeg", "png", "tiff", "lzw tiff", "deflate tiff", "jpeg tiff"])
def test_a_truncated_file_is_refused(kind: str) -> None:
    whole = ENCODED[kind]
    for percent in range(5, 100, 5):
        assert refusal(whole[: len(whole) * percent // 100]) in {Reason.TRUNCATED, Reason.CORRUPT}, percent


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_cut_in_the_pixels_of_a_jpeg_is_called_truncated(options: dict[str, bool]) -> None:
    whole = encode(noise_photograph((400, 400)), "JPEG", **options)
    for percent in range(10, 100, 5):
        assert refusal(whole[: len(whole) * percent // 100]) is Reason.TRUNCATED


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(sorted(ENCODED)), st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=8), st.data())
def test_flipped_bits_give_pixels_or_a_refusal(kind: str, places: list[float], data: st.DataObject) -> None:
    damaged = bytearray(ENCODED[kind])
    reach = data.draw(st.sampled_from([64, 400, len(damaged)]), "reach")
    for place in places:
        damaged[int(place * min(reach, len(damaged)))] ^= 1 << data.draw(st.integers(0, 7), "bit")
    try:
        decoded = decode(bytes(damaged), ImageConfig(min_side_px=16, max_pixels=10**6))
    except ImageRefusedError as error:
        assert error.reason.status is Status.REFUSED
    else:
        assert decoded.dtype == np.uint8 and decoded.ndim == 3 and decoded.shape[2] == 3


@settings(deadline=None, max_examples=200)
@given(st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"BM", b"P6\n"]), st.binary())
def test_arbitrary_bytes_are_refused(start: bytes, rest: bytes) -> None:
    assert refusal(start + rest).status is Status.REFUSED


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", b"%PDF-1.7\n", b"PK\3\4", b"DICM" * 40],
)
def test_what_is_no_image_is_refused_whatever_its_name(data: bytes) -> None:
    assert refusal(data) is Reason.NOT_AN_IMAGE


@pytest.mark.parametrize("kind", ["GIF", "ICO", "EPS"])
def test_formats_no_camera_writes_are_refused_undecoded(kind: str) -> None:
    assert refusal(encode(IMAGE, kind)) is Reason.UNSUPPORTED


def _png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (chunk, pixels)
    )


def _jpeg_header(width: int, height: int) -> bytes:
    at = ENCODED["jpeg"].index(b"\xff\xc0") + 5
    return ENCODED["jpeg"][:at] + struct.pack(">HH", height, width) + ENCODED["jpeg"][at + 4 :]


def _bmp_header(width: int, height: int) -> bytes:
    return ENCODED["bmp"][:18] + struct.pack("<ii", width, height) + ENCODED["bmp"][26:]


def _png_header_alone(width: int, height: int) -> bytes:
    return _png_header(width, height)[:33]


def _jpeg_header_alone(width: int, height: int) -> bytes:
    return _jpeg_header(width, height)[: ENCODED["jpeg"].index(b"\xff\xc0") + 19]


@pytest.mark.parametrize("header", [_png_header, _png_header_alone, _jpeg_header, _jpeg_header_alone, _bmp_header])
@pytest.mark.parametrize("side", [8_945, 20_000, 60_000])
def test_a_huge_header_is_refused_without_allocating_its_pixels(header: Callable[[int, int], bytes], side: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refusal(header(side, side)) is Reason.TOO_LARGE
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 50 * 1024


def test_the_limits_are_met_exactly() -> None:
    config = ImageConfig(min_side_px=48, max_pixels=48 * 64, max_bytes=len(ENCODED["png"]))
    assert (decode(ENCODED["png"], config) == PIXELS).all()
    assert refusal(ENCODED["png"] + b"\0", config) is Reason.TOO_LARGE
    assert refusal(encode(np.zeros((48, 65, 3), np.uint8), "PNG"), config) is Reason.TOO_LARGE
    assert refusal(encode(np.zeros((47, 64, 3), np.uint8), "PNG"), config) is Reason.TOO_SMALL


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (15, 16)])
def test_too_small_photographs_are_refused(shape: tuple[int, int]) -> None:
    assert refusal(encode(np.zeros((*shape, 3), np.uint8), "PNG")) is Reason.TOO_SMALL


def test_decoding_leaves_the_warning_filters_alone() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode(ENCODED["jpeg"], CONFIG)
        warnings.warn("still heard", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["still heard"]


def test_a_refusal_survives_pickling_and_names_its_reason() -> None:
    with pytest.raises(ImageRefusedError) as caught:
        decode(io.BytesIO().getvalue(), CONFIG)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.reason, copy.detail, str(copy)) == (Reason.NOT_AN_IMAGE, caught.value.detail, str(caught.value))
