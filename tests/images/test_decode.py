"""Decoding: every format and mode a camera or an export gives, and every way its bytes can be wrong."""

from __future__ import annotations

import io
import pickle
import re
import resource
import struct
import warnings
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_inputs import AVIF, HEIC, jpeg_frame, jpeg_with_end, jpeg_with_hole, png_with, tiff
from photographs import encode, noise_photograph
from PIL import Image, ImageCms, ImageOps

from ma_cluster.config import ImageConfig
from ma_cluster.errors import Flag, ImageRefusedError, Reason, Status
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
    "padded ppm": b"P6%s%d %d # of a camera\r255\n" % (b" " * 60, *IMAGE.size) + PIXELS.tobytes(),
}


def refusal(data: bytes, config: ImageConfig = CONFIG) -> Reason:
    with pytest.raises(ImageRefusedError) as caught:
        decode(data, config)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["png", "tiff", "lzw tiff", "deflate tiff", "bmp", "ppm", "padded ppm"])
def test_lossless_formats_give_the_pixels(kind: str) -> None:
    assert (decode(ENCODED[kind], CONFIG).pixels == PIXELS).all()


@pytest.mark.parametrize("kind", ["jpeg", "progressive jpeg", "cmyk jpeg", "webp", "jpeg 2000"])
def test_lossy_formats_give_nearly_the_pixels(kind: str) -> None:
    assert np.abs(decode(ENCODED[kind], CONFIG).pixels.astype(int) - PIXELS).mean() < 8


def test_progressive_and_baseline_jpeg_agree() -> None:
    assert (decode(ENCODED["progressive jpeg"], CONFIG).pixels == decode(ENCODED["jpeg"], CONFIG).pixels).all()


def test_16_bit_grey_keeps_its_8_upper_bits() -> None:
    assert (decode(ENCODED["16-bit png"], CONFIG).pixels == GREY[:, :, None]).all()


def test_1_bit_becomes_black_and_white() -> None:
    bits = IMAGE.convert("1")
    assert (decode(encode(bits, "PNG"), CONFIG).pixels == np.asarray(bits)[:, :, None] * 255).all()


def test_grey_becomes_three_equal_channels() -> None:
    assert (decode(encode(GREY, "PNG"), CONFIG).pixels == GREY[:, :, None]).all()


def test_a_palette_becomes_its_colours() -> None:
    palette = IMAGE.convert("P")
    assert (decode(ENCODED["palette png"], CONFIG).pixels == np.asarray(palette.convert("RGB"))).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_over_black(mode: str) -> None:
    image = IMAGE.convert(mode)
    alpha = np.zeros(PIXELS.shape[:2], np.uint8)
    alpha[:, 32:] = 255
    image.putalpha(Image.fromarray(alpha))
    decoded = decode(encode(image, "PNG"), CONFIG).pixels
    assert not decoded[:, :32].any()
    assert (decoded[:, 32:] == np.asarray(IMAGE.convert(mode[:-1]).convert("RGB"))[:, 32:]).all()


def test_float_and_integer_ranges_are_scaled() -> None:
    assert (decode(ENCODED["float tiff"], CONFIG).pixels == GREY[:, :, None]).all()
    wide = Image.fromarray(GREY.astype(np.int32) * 257)
    assert (decode(encode(wide, "TIFF"), CONFIG).pixels == GREY[:, :, None]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_every_exif_orientation_is_turned_upright(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    # the inverse of the eight turns: 6 and 8 undo each other, every other one undoes itself
    stored = _orient(IMAGE, {6: 8, 8: 6}.get(orientation, orientation))
    assert (decode(encode(stored, kind, exif=exif), CONFIG).pixels == PIXELS).all()


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
    assert (decode(encode(IMAGE, "PNG", exif=exif), CONFIG).pixels == PIXELS).all()


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize(("quality", "flags"), [(8, (Flag.COARSE,)), (30, (Flag.COARSE,)), (50, ()), (95, ())])
def test_a_jpeg_whose_steps_are_large_is_told_as_coarse(
    quality: int, flags: tuple[Flag, ...], options: dict[str, bool]
) -> None:
    assert decode(encode(PIXELS, "JPEG", quality=quality, **options), CONFIG).flags == flags


def test_damaged_exif_is_no_reason_to_refuse_pixels() -> None:
    data = encode(PIXELS, "JPEG", quality=90, exif=b"Exif\0\0MM\0*" + b"\xff" * 40)
    assert (decode(data, CONFIG).pixels == decode(ENCODED["jpeg"], CONFIG).pixels).all()


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
        decoded = decode(bytes(damaged), ImageConfig(min_side_px=16, max_pixels=10**6)).pixels
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
    [b"", b"\0", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", b"PK\3\4", b"DICM" * 20],
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
    assert (decode(ENCODED["png"], config).pixels == PIXELS).all()
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


LARGE = noise_photograph((320, 400))
JPEG_LARGE = encode(LARGE, "JPEG", quality=90)
PROGRESSIVE_LARGE = encode(LARGE, "JPEG", quality=90, progressive=True)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_samples_are_scaled_by_the_range_that_holds_them(bits: int, channels: int) -> None:
    stored = np.rint(PIXELS[:, :, :channels].astype(float) * (2**bits - 1) / 255).astype(np.uint16).squeeze()
    stored[0, 0] = 2**bits - 1  # white
    expected = np.broadcast_to(PIXELS[:, :, :channels], PIXELS.shape)
    for data in (tiff(stored), encode_16_bit_png(stored)):
        decoded = decode(data, CONFIG).pixels.astype(int)
        assert np.abs(decoded - expected)[1:].max() <= 1, bits


def encode_16_bit_png(samples: np.ndarray) -> bytes:
    swapped = samples[:, :, ::-1] if samples.ndim == 3 else samples
    return bytes(cv2.imencode(".png", swapped)[1].tobytes())


@pytest.mark.parametrize("kind", ["uint16", "int16", "uint32", "int32", "float32", "float64"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_type_of_sample_is_read(kind: str, channels: int) -> None:
    samples = PIXELS[:, :, :channels].squeeze()
    whole = samples / 255 if kind.startswith("f") else samples.astype(float) * 257 // (2 if kind == "int16" else 1)
    decoded = decode(tiff(whole.astype(kind), tags={281: 32767} if kind == "int16" else None), CONFIG).pixels
    assert np.abs(decoded.astype(int) - np.broadcast_to(PIXELS[:, :, :channels], PIXELS.shape)).max() <= 1


@pytest.mark.parametrize(
    ("samples", "word"),
    [
        (PIXELS.astype(np.int16) - 128, "range"),
        (np.where(PIXELS > 250, np.nan, PIXELS / 255).astype(np.float32), "no numbers"),
    ],
)
def test_samples_of_no_plausible_range_are_unsupported(samples: np.ndarray, word: str) -> None:
    assert_unsupported(tiff(samples), word)


def test_planes_apart_are_read_at_8_bits_and_refused_beyond() -> None:
    assert (decode(tiff(PIXELS, planes_apart=True), CONFIG).pixels == PIXELS).all()
    assert_unsupported(tiff(PIXELS.astype(np.uint16) * 257, planes_apart=True), "planes")


def assert_unsupported(data: bytes, word: str) -> None:
    with pytest.raises(ImageRefusedError, match=word) as caught:
        decode(data, CONFIG)
    assert caught.value.reason is Reason.UNSUPPORTED
    assert "fetch it again" not in caught.value.detail


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (HEIC, "HEIC"),
        (AVIF, "AVIF"),
        (b"%PDF-1.7\n" + bytes(100), "PDF"),
        (b"II*\0\x10\0\0\0CR\x02\0" + bytes(100), "raw file"),
        (tiff(GREY, tags={262: 32803}), "raw file"),
        (jpeg_frame(ENCODED["jpeg"], 0xC1, 12), "12 bits"),
        (jpeg_frame(ENCODED["jpeg"], 0xC3), "lossless"),
        (jpeg_frame(ENCODED["jpeg"], 0xF7), "JPEG-LS"),
    ],
)
def test_a_known_kind_that_is_not_read_is_refused_by_its_name(data: bytes, name: str) -> None:
    assert_unsupported(data, name)


@pytest.mark.parametrize("whole", [JPEG_LARGE, PROGRESSIVE_LARGE])
@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8, 0.95])
def test_a_jpeg_cut_short_is_truncated_though_an_end_marker_is_glued_on(whole: bytes, share: float) -> None:
    assert refusal(jpeg_with_end(whole, share)) is Reason.TRUNCATED


def test_a_progressive_jpeg_without_its_last_scans_is_truncated() -> None:
    scans = [match.start() for match in re.finditer(b"\xff\xda", PROGRESSIVE_LARGE)]
    for cut in scans[1:]:
        assert refusal(PROGRESSIVE_LARGE[:cut] + b"\xff\xd9") is Reason.TRUNCATED


def test_a_jpeg_with_a_hole_is_refused() -> None:
    for length in (64, 1024, 8192):
        assert refusal(jpeg_with_hole(JPEG_LARGE, length)) in {Reason.TRUNCATED, Reason.CORRUPT}


def test_zeros_before_the_end_marker_and_anything_behind_it_cost_no_jpeg() -> None:
    padded = JPEG_LARGE[:-2] + bytes(100) + JPEG_LARGE[-2:] + b"what a phone appends"
    assert (decode(padded, CONFIG).pixels == decode(JPEG_LARGE, CONFIG).pixels).all()


@pytest.mark.parametrize(
    ("kind", "body", "crc"),
    [
        (b"eXIf", b"\0\x08no TIFF at all", None),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(3_000_000)), None),
        (b"iCCP", b"big\0\0" + zlib.compress(bytes(3_000_000)), None),
        (b"iCCP", b"no profile\0\0" + zlib.compress(bytes(300)), None),
        (b"tEXt", b"a\0b", 0),
        (b"zTXt", b"a\0\0no zlib", None),
        (b"pHYs", b"short", None),
    ],
)
def test_metadata_never_costs_a_png(kind: bytes, body: bytes, crc: int | None) -> None:
    assert (decode(png_with(ENCODED["png"], kind, body, crc), CONFIG).pixels == PIXELS).all()


def test_a_profile_is_applied_where_it_changes_colours() -> None:
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red, green = swapped.index(b"rXYZ"), swapped.index(b"gXYZ")
    swapped = swapped[:red] + b"gXYZ" + swapped[red + 4 : green] + b"rXYZ" + swapped[green + 4 :]
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for data in (encode(PIXELS, "PNG", icc_profile=plain), encode(PIXELS, "TIFF", icc_profile=plain)):
        assert (decode(data, CONFIG).pixels == PIXELS).all()
    for data in (encode(PIXELS, "PNG", icc_profile=swapped), encode(PIXELS, "TIFF", icc_profile=swapped)):
        assert np.abs(decode(data, CONFIG).pixels.astype(int) - PIXELS[:, :, [1, 0, 2]]).mean() < 3


HALF, EIGHTH = PIXELS[::2, ::2], PIXELS[::3, ::3]


@pytest.mark.parametrize("pages", [[HALF, PIXELS], [EIGHTH, PIXELS], [PIXELS, HALF], [HALF, PIXELS, EIGHTH]])
def test_of_a_photograph_and_its_previews_the_photograph_is_read(pages: list[np.ndarray]) -> None:
    for depth in (1, 257):
        kind = np.uint8 if depth == 1 else np.uint16
        decoded = decode(tiff(*(page.astype(kind) * kind(depth) for page in pages)), CONFIG)
        assert (decoded.pixels == PIXELS).all() and decoded.flags == (Flag.MORE_PAGES,)


def test_two_photographs_in_one_file_are_refused_with_the_cure() -> None:
    assert_unsupported(tiff(PIXELS, PIXELS[:, ::-1]), "2 pages.* save each page")


def test_of_an_mpo_the_first_picture_is_read() -> None:
    data = encode(IMAGE, "MPO", quality=90, save_all=True, append_images=[Image.fromarray(HALF)])
    decoded = decode(data, CONFIG)
    assert (decoded.pixels == decode(ENCODED["jpeg"], CONFIG).pixels).all() and decoded.flags == (Flag.MORE_PAGES,)
