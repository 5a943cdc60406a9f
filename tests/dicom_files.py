"""DICOM files of a photograph, in every transfer syntax that is read, as a camera or an archive would write them."""

from __future__ import annotations

import io
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jaxtyping import UInt8
from numpy import ndarray
from photographs import encode
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

OPHTHALMIC_8_BIT = "1.2.840.10008.5.1.4.1.1.77.1.5.1"
LOSSLESS = ("implicit", "explicit", "big endian", "planes", "rle", "jpeg-ls", "jpeg 2000", "jpeg lossless", "frames")
LOSSY = ("ybr", "ybr 422", "jpeg", "jpeg rgb", "jpeg-ls near", "jpeg 2000 lossy")
_NATIVE = {"implicit": ImplicitVRLittleEndian, "big endian": ExplicitVRBigEndian}


def photograph_dataset(rgb: UInt8[ndarray, "h w 3"], number: int = 1, **values: Any) -> Dataset:
    """A whole Ophthalmic Photography object, uncompressed; `values` replace elements, None leaves one out."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    root = "1.2.826.0.1.3680043.10.1337"
    known: dict[str, Any] = {
        "SpecificCharacterSet": "ISO_IR 192",
        "ImageType": ["ORIGINAL", "PRIMARY", "", "COLOR"],
        "SOPClassUID": OPHTHALMIC_8_BIT,
        "SOPInstanceUID": f"{root}.3.{number}",
        "StudyInstanceUID": f"{root}.1.{number}",
        "SeriesInstanceUID": f"{root}.2.{number}",
        "StudyDate": "20260102",
        "StudyTime": "101112",
        "ContentDate": "20260102",
        "ContentTime": "101112",
        "AcquisitionDateTime": "20260102101112",
        "AccessionNumber": "",
        "Modality": "OP",
        "Manufacturer": "Maker",
        "ManufacturerModelName": "Camera",
        "ReferringPhysicianName": "",
        "PatientName": "Doé^Jane",
        "PatientID": f"patient-{number}",
        "PatientBirthDate": "19600101",
        "PatientSex": "F",
        "StudyID": "1",
        "SeriesNumber": 1,
        "InstanceNumber": number,
        "PatientOrientation": ["L", "F"],
        "ImageLaterality": "R",
        "HorizontalFieldOfView": 45.0,
        "BurnedInAnnotation": "NO",
        "SamplesPerPixel": 3,
        "PhotometricInterpretation": "RGB",
        "PlanarConfiguration": 0,
        "Rows": rgb.shape[0],
        "Columns": rgb.shape[1],
        "BitsAllocated": 8,
        "BitsStored": 8,
        "HighBit": 7,
        "PixelRepresentation": 0,
        "PixelData": _even(rgb.tobytes()),
    }
    for keyword, value in (known | values).items():
        if value is not None:
            setattr(dataset, keyword, value)
    return dataset


def dicom_file(rgb: UInt8[ndarray, "h w 3"], kind: str = "explicit", number: int = 1, **values: Any) -> bytes:
    """The bytes of a file of one of `LOSSLESS` or `LOSSY`."""
    dataset = photograph_dataset(rgb, number, **values)
    if kind in _NATIVE:
        dataset.file_meta.TransferSyntaxUID = _NATIVE[kind]
    elif kind == "planes":
        dataset.PlanarConfiguration = 1
        dataset.PixelData = _even(rgb.transpose(2, 0, 1).tobytes())
    elif kind == "frames":
        dataset.NumberOfFrames = 2
        dataset.PixelData = _even(rgb.tobytes() + rgb[::-1].tobytes())
    elif kind == "rle":
        dataset.compress(RLELossless)
    elif kind in ("jpeg-ls", "jpeg-ls near"):
        near = {"jls_error": 2} if kind.endswith("near") else {}
        dataset.compress(JPEGLSNearLossless if near else JPEGLSLossless, **near)
    elif kind == "jpeg lossless":
        return _by_dcmtk(written(dataset))
    elif kind in ("ybr", "ybr 422"):
        _as_ycc(dataset, rgb, halved=kind == "ybr 422")
    elif kind != "explicit":
        _encapsulate(dataset, rgb, kind)
    return written(dataset)


def written(dataset: Dataset) -> bytes:
    """A dataset as a file."""
    out = io.BytesIO()
    dataset.save_as(out, enforce_file_format=True)
    return out.getvalue()


def key_of(data: bytes) -> str:
    """What a DICOMweb server calls the object of a file."""
    read = dcmread(io.BytesIO(data), stop_before_pixels=True)
    return f"studies/{read.StudyInstanceUID}/series/{read.SeriesInstanceUID}/instances/{read.SOPInstanceUID}"


def _encapsulate(dataset: Dataset, rgb: UInt8[ndarray, "h w 3"], kind: str) -> None:
    syntax, colours, frame = {
        "jpeg": lambda: (JPEGBaseline8Bit, "YBR_FULL_422", encode(rgb, "JPEG", quality=95)),
        "jpeg rgb": lambda: (JPEGBaseline8Bit, "RGB", encode(rgb, "JPEG", quality=95, keep_rgb=True)),
        "jpeg 2000": lambda: (JPEG2000Lossless, "YBR_RCT", encode(rgb, "JPEG2000", no_jp2=True, mct=1)),
        "jpeg 2000 lossy": lambda: (
            JPEG2000,
            "YBR_ICT",
            encode(rgb, "JPEG2000", no_jp2=True, mct=1, irreversible=True, quality_mode="dB", quality_layers=[50]),
        ),
    }[kind]()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PhotometricInterpretation = colours
    dataset.PixelData = encapsulate([frame])


def _as_ycc(dataset: Dataset, rgb: UInt8[ndarray, "h w 3"], *, halved: bool) -> None:
    ycc = np.array(Image.fromarray(rgb).convert("YCbCr"))
    dataset.PhotometricInterpretation = "YBR_FULL_422" if halved else "YBR_FULL"
    pairs = ycc.reshape(len(ycc), -1, 2, 3)
    packed = np.stack([pairs[:, :, 0, 0], pairs[:, :, 1, 0], pairs[:, :, 0, 1], pairs[:, :, 0, 2]], axis=-1)
    dataset.PixelData = _even((packed if halved else ycc).tobytes())


def _by_dcmtk(data: bytes) -> bytes:
    """Its pixels as lossless JPEG, of which no Python package of ours writes any."""
    tool = shutil.which("dcmcjpeg")
    if tool is None:
        pytest.skip("no dcmcjpeg, of Debian's dcmtk, to write a lossless JPEG")
    with tempfile.TemporaryDirectory() as name:
        stored, packed = Path(name, "in.dcm"), Path(name, "out.dcm")
        stored.write_bytes(data)
        subprocess.run([tool, "+e1", stored, packed], check=True)
        assert dcmread(packed).file_meta.TransferSyntaxUID == JPEGLosslessSV1
        return packed.read_bytes()


def _even(data: bytes) -> bytes:
    return data + bytes(len(data) % 2)
