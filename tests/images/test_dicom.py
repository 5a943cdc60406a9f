"""DICOM files as photographs: every transfer syntax, what the header tells, and what a damaged one costs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from dicom_files import LOSSLESS, LOSSY, dicom_file, photograph_dataset, written
from hypothesis import given, settings
from hypothesis import strategies as st
from photographs import encode, fundus_photograph, noise_photograph
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, HTJ2KLossless, JPEGBaseline8Bit

from ma_cluster.config import ImageConfig, KnownField
from ma_cluster.errors import Flag, ImageRefusedError, Reason
from ma_cluster.images.acquisition import Acquisition, acquisition_from
from ma_cluster.images.decode import decode
from ma_cluster.images.fundus import Fov
from ma_cluster.images.reading import read_bytes
from ma_cluster.images.sandbox import DecodePool, SandboxConfig

IMAGE = ImageConfig()
RGB = noise_photograph((300, 402))
SMALL = {kind: dicom_file(RGB[:260, :260], kind) for kind in ("explicit", "rle", "jpeg")}
OPTICAL_COHERENCE = "1.2.840.10008.5.1.4.1.1.77.1.5.4"


def refusal(data: bytes) -> ImageRefusedError:
    with pytest.raises(ImageRefusedError) as refused:
        decode(data, IMAGE)
    return refused.value


def acquisition(**values: Any) -> Acquisition:
    found = decode(dicom_file(RGB, **values), IMAGE).acquisition
    assert found is not None
    return found


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_syntaxes_give_the_photograph_to_the_pixel(kind: str) -> None:
    decoded = decode(dicom_file(RGB, kind), IMAGE)
    np.testing.assert_array_equal(decoded.pixels, RGB)
    assert decoded.flags == ((Flag.MORE_PAGES,) if kind == "frames" else ())


@pytest.mark.parametrize("kind", LOSSY)
def test_lossy_syntaxes_give_its_colours(kind: str) -> None:
    pixels = decode(dicom_file(RGB, kind), IMAGE).pixels
    assert np.abs(pixels.astype(int) - RGB).mean() < 6  # where chroma has half the resolution


def test_a_jpeg_in_dicom_is_the_jpeg() -> None:
    jpeg = decode(encode(RGB, "JPEG", quality=95), IMAGE).pixels
    np.testing.assert_array_equal(decode(dicom_file(RGB, "jpeg"), IMAGE).pixels, jpeg)


@pytest.mark.parametrize(("quality", "flags"), [(30, (Flag.COARSE,)), (50, ())])
def test_a_jpeg_in_dicom_is_told_as_coarse_as_any(quality: int, flags: tuple[Flag, ...]) -> None:
    dataset = photograph_dataset(RGB, PhotometricInterpretation="YBR_FULL_422")
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.PixelData = encapsulate([encode(RGB, "JPEG", quality=quality)])
    assert decode(written(dataset), IMAGE).flags == flags


@pytest.mark.parametrize("names", [b"RGB", b"\x00\x01\x02"])
def test_an_rgb_jpeg_without_markers_gives_its_colours_whatever_its_components_are_called(names: bytes) -> None:
    jpeg = encode(RGB, "JPEG", quality=95, keep_rgb=True)
    adobe, frame, scan = (jpeg.index(marker) for marker in (b"\xff\xee", b"\xff\xc0", b"\xff\xda"))
    renamed = bytearray(jpeg)
    for number, name in enumerate(names):
        renamed[frame + 10 + 3 * number] = renamed[scan + 5 + 2 * number] = name
    bare = renamed[:adobe] + renamed[adobe + 2 + int.from_bytes(jpeg[adobe + 2 : adobe + 4]) :]
    dataset = photograph_dataset(RGB)
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.PixelData = encapsulate([bytes(bare)])
    expected = decode(dicom_file(RGB, "jpeg rgb"), IMAGE).pixels
    np.testing.assert_array_equal(decode(written(dataset), IMAGE).pixels, expected)


@pytest.mark.parametrize("kind", ["explicit", "rle", "jpeg-ls", "jpeg 2000"])
def test_grey_photographs_are_read(kind: str) -> None:
    grey = RGB[:, :, 1]
    dataset = photograph_dataset(
        RGB, SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", PlanarConfiguration=None
    )
    dataset.PixelData = grey.tobytes()
    pixels = decode(written(dataset), IMAGE).pixels
    np.testing.assert_array_equal(pixels, np.repeat(grey[:, :, None], 3, axis=2))


def test_the_header_tells_patient_eye_day_field_and_camera() -> None:
    known = acquisition(number=7, PixelSpacing=[0.004, 0.0041], FrameOfReferenceUID="1.2.3")
    assert (known.patient_id, known.laterality, known.laterality_source) == ("patient-7", "R", "dicom_image")
    assert (known.visit, known.field_degrees, known.device) == ("2026-01-02", 45.0, "Maker Camera")
    assert (known.pixel_spacing_mm, known.frame_of_reference_uid) == ((0.004, 0.0041), "1.2.3")
    assert known.header["PatientName"] == "Doé^Jane"
    assert "patient-7" not in repr(known) and "Jane" not in repr(known)


def region(code: str) -> list[Dataset]:
    modifier, retina = Dataset(), Dataset()
    modifier.CodeValue, modifier.CodingSchemeDesignator = code, "SCT"
    retina.AnatomicRegionModifierSequence = [modifier]
    return [retina]


@pytest.mark.parametrize(
    ("values", "side"),
    [
        ({"ImageLaterality": "L"}, ("L", "dicom_image")),
        ({"ImageLaterality": None, "Laterality": "R"}, ("R", "dicom_series")),
        ({"ImageLaterality": None, "AnatomicRegionSequence": region("7771000")}, ("L", "dicom_region")),
        ({"ImageLaterality": "B"}, (None, None)),
        ({"ImageLaterality": None}, (None, None)),
    ],
)
def test_the_side_is_told_with_its_source(values: dict[str, Any], side: tuple[str | None, str | None]) -> None:
    known = acquisition(**values)
    assert (known.laterality, known.laterality_source) == side


def test_what_a_header_lacks_is_not_known() -> None:
    names = ("PatientID", "PatientName", "ImageLaterality", "HorizontalFieldOfView", "Manufacturer", "StudyDate")
    known = acquisition(**dict.fromkeys(names), AcquisitionDateTime="20251231235959", ManufacturerModelName=None)
    assert (known.patient_id, known.laterality, known.field_degrees, known.device) == (None, None, 0.0, None)
    assert known.visit == "2025-12-31"


def test_what_a_header_tells_at_its_longest_passes_the_check_of_the_parent() -> None:
    known = acquisition(Manufacturer="m" * 200, ManufacturerModelName="n" * 200)
    assert acquisition_from(json.loads(json.dumps(known.to_values()))) == known
    assert known.device is not None and known.device.startswith("m" * 200 + " n")


def test_burnt_in_text_is_flagged() -> None:
    assert decode(dicom_file(RGB, BurnedInAnnotation="YES"), IMAGE).flags == (Flag.BURNT_IN_TEXT,)


def test_the_field_of_the_header_sets_the_scale_and_one_that_is_given_wins() -> None:
    photograph = fundus_photograph((600, 640), Fov(300.0, 320.0, 560.0))
    told, asked = (
        read_bytes(dicom_file(photograph), KnownField(degrees).told(IMAGE))[1].fov.degrees for degrees in (0.0, 30.0)
    )
    assert (told, asked) == (45.0, 30.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"SOPClassUID": OPTICAL_COHERENCE}, "Ophthalmic Tomography Image Storage"),
        ({"PhotometricInterpretation": "PALETTE COLOR", "SamplesPerPixel": 1}, "PALETTE COLOR"),
        ({"BitsAllocated": 16, "BitsStored": 12}, "12 bits in 16"),
        ({"Manufacturer": "ma_cluster"}, "overlay of an earlier run"),
    ],
)
def test_what_is_not_read_is_refused_by_its_name(values: dict[str, Any], words: str) -> None:
    refused = refusal(dicom_file(RGB, **values))
    assert refused.reason is Reason.UNSUPPORTED and words in refused.detail


@pytest.mark.parametrize("syntax", [DeflatedExplicitVRLittleEndian, HTJ2KLossless])
def test_other_syntaxes_are_refused_by_their_name_before_they_are_unpacked(syntax: Any) -> None:
    data = dicom_file(RGB)
    meta = b"\x02\x00\x10\x00UI"
    at = data.index(meta) + len(meta)
    old = int.from_bytes(data[at : at + 2], "little")
    value = str(syntax).encode() + bytes(len(syntax) % 2)
    refused = refusal(data[:at] + len(value).to_bytes(2, "little") + value + data[at + 2 + old :])
    assert refused.reason is Reason.UNSUPPORTED and syntax.name in refused.detail


def test_sizes_are_judged_by_the_header() -> None:
    assert refusal(dicom_file(RGB, Rows=40_000, Columns=40_000)).reason is Reason.TOO_LARGE
    assert refusal(dicom_file(RGB[:200, :200])).reason is Reason.TOO_SMALL


@pytest.mark.parametrize("kind", ["explicit", "rle", "jpeg-ls", "jpeg 2000", "jpeg", "jpeg lossless"])
def test_a_file_that_is_cut_off_is_refused(kind: str) -> None:
    data = dicom_file(RGB, kind)
    for share in range(5, 100, 10):
        assert refusal(data[: len(data) * share // 100]).reason in (Reason.TRUNCATED, Reason.CORRUPT, Reason.TOO_SMALL)


@pytest.mark.parametrize("kind", SMALL)
@settings(max_examples=40, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_bit_that_flips_costs_no_more_than_the_photograph(kind: str, place: float, bit: int) -> None:
    data = bytearray(SMALL[kind])
    header = min(len(data), 2600)  # pixels that differ are none of the decoder's faults
    data[132 + int(place * (header - 132))] ^= 1 << bit
    try:
        assert decode(bytes(data), IMAGE).pixels.shape[2] == 3
    except ImageRefusedError as refused:
        assert refused.detail


def test_the_sandbox_hands_over_what_the_header_tells() -> None:
    pool = DecodePool(IMAGE, SandboxConfig(children=1))
    try:
        decoded = pool.decode(dicom_file(RGB))
        np.testing.assert_array_equal(decoded.pixels, RGB)
        assert decoded.acquisition == acquisition()
        assert pool.decode(encode(RGB, "PNG")).acquisition is None
    finally:
        pool.close()


@pytest.mark.parametrize(
    "lie",
    [
        {"laterality": "X"},
        {"field_degrees": float("nan")},
        {"sop_instance_uid": "../../etc"},
        {"patient_id": ["a"]},
        {"header": {"__class__": "x"}},
        {"header": {"PatientID": "x" * 300}},
        {"pixel_spacing_mm": [1]},
    ],
)
def test_what_a_child_says_is_checked(lie: dict[str, Any]) -> None:
    said = json.loads(json.dumps(acquisition(PixelSpacing=[0.01, 0.01]).to_values()))
    assert acquisition_from(said) == dataclasses.replace(acquisition(), pixel_spacing_mm=(0.01, 0.01))
    with pytest.raises((TypeError, ValueError, KeyError, IndexError, AttributeError)):
        acquisition_from(said | lie)
