"""A DICOM file -> the pixels of its first frame, and what its header says. pydicom is loaded with the first such file.

    JPEG, lossy and lossless   libjpeg, strictly
    JPEG 2000                  Pillow
    uncompressed, RLE, JPEG-LS pydicom, with pyjpegls

Whatever else it may be is refused by its name. Only decode.py calls this, in the child that may die of it.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image

from ma_cluster.config import ImageConfig
from ma_cluster.errors import ImageRefusedError, Reason
from ma_cluster.image_config import DICOM_PHOTOGRAPHS
from ma_cluster.images.acquisition import Acquisition, acquisition_of
from ma_cluster.images.containers import EXPORT_CURE, check_jpeg, jpeg_refusal, refuse_damage, truncated
from ma_cluster.images.decode import check_size, is_coarse

_HEADER_AT = 132  # behind the preamble and what marks it
_NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
_JPEG = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")
_LOSSLESS_JPEG = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
_JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
_OTHERS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.5")  # JPEG-LS, RLE
_SYNTAXES = frozenset((*_NATIVE, *_JPEG, *_LOSSLESS_JPEG, *_JPEG_2000, *_OTHERS))
_GREY, _RGB = "MONOCHROME2", "RGB"
_YCC = ("YBR_FULL", "YBR_FULL_422")
_TRANSFORMED = ("YBR_RCT", "YBR_ICT")  # JPEG 2000's own, which its decoder undoes
_COLOURS = (_GREY, _RGB, *_YCC, *_TRANSFORMED)
_OWN = "ma_cluster"
_CURE = "photographs are of Ophthalmic Photography 8 Bit"
_BEFORE_KIND = 4096  # bytes of a header in which its kind stands, among the first elements


@dataclass(frozen=True, slots=True)
class DicomPhotograph:
    """What is read of a DICOM file."""

    pixels: UInt8[ndarray, "h w 3"]
    acquisition: Acquisition
    coarse: bool
    """See `is_coarse`."""


def read_dicom(data: bytes, config: ImageConfig) -> DicomPhotograph:
    """Read a photograph.

    Raises:
        ImageRefusedError: unsupported, naming the transfer syntax, the kind of object or of pixels that is not read;
            truncated, corrupt, too_large or too_small.
    """
    import pydicom
    from pydicom.config import IGNORE, settings

    settings.reading_validation_mode = IGNORE  # what is said of a header's faults would hold a patient's data
    syntax = _syntax(data)
    dataset = pydicom.dcmread(io.BytesIO(data))
    if not dataset.get("SOPClassUID"):
        header = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)  # as packed pixels that break off hide it
        cut = len(data) < _BEFORE_KIND or "SOPClassUID" in header
        raise truncated() if cut else _unsupported("a file that names no kind", _CURE)
    _check_kind(dataset)
    width, height = int(dataset.get("Columns") or 0), int(dataset.get("Rows") or 0)
    check_size(width, height, config)
    if "PixelData" not in dataset:
        raise truncated()
    pixels, coarse = _pixels(dataset, syntax)
    if pixels.shape[:2] != (height, width):
        raise ImageRefusedError(Reason.CORRUPT, "the DICOM header tells another size than its pixels have")
    return DicomPhotograph(pixels, acquisition_of(dataset), coarse)


def dicom_size(data: bytes) -> tuple[int, int]:
    """Width and height, by the header alone; raises ImageRefusedError where it does not tell."""
    import pydicom

    _syntax(data)
    header = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True, specific_tags=["Columns", "Rows"])
    width, height = int(header.get("Columns") or 0), int(header.get("Rows") or 0)
    if not width * height:
        raise truncated()
    return width, height


def _syntax(data: bytes) -> str:
    """The transfer syntax, before anything else is read: one of them is of packed data, which may be a bomb."""
    from pydicom.filereader import read_dataset
    from pydicom.uid import UID

    file = io.BytesIO(data)
    file.seek(_HEADER_AT)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    syntax = str(meta.get("TransferSyntaxUID") or "")
    if not syntax:
        raise ImageRefusedError(Reason.CORRUPT, "the DICOM file names no transfer syntax; fetch it again")
    if syntax not in _SYNTAXES:
        raise _unsupported(f"the transfer syntax {UID(syntax).name}", "send it as JPEG, JPEG 2000 or uncompressed")
    return syntax


def _check_kind(dataset: Any) -> None:
    """Raises ImageRefusedError: unsupported, where it is no photograph, or one of other pixels than are read."""
    from pydicom.uid import UID

    kind = UID(str(dataset.SOPClassUID))
    if kind not in DICOM_PHOTOGRAPHS:
        raise _unsupported(f"the kind {kind.name}", _CURE)
    if str(dataset.get("Manufacturer", "")) == _OWN:
        raise _unsupported("the overlay of an earlier run", "leave it out")
    colours = str(dataset.get("PhotometricInterpretation") or "")
    if colours not in _COLOURS or int(dataset.get("SamplesPerPixel") or 0) != (1 if colours == _GREY else 3):
        raise _unsupported(f"the photometric interpretation {colours or 'unknown'}", EXPORT_CURE)
    bits = int(dataset.get("BitsStored") or 0), int(dataset.get("BitsAllocated") or 0)
    if bits != (8, 8) or dataset.get("PixelRepresentation", 0):
        raise _unsupported(f"{bits[0]} bits in {bits[1]}, or with a sign,", EXPORT_CURE)


def _unsupported(what: str, cure: str) -> ImageRefusedError:
    return ImageRefusedError(Reason.UNSUPPORTED, f"DICOM: {what} is not read; {cure}")


def _pixels(dataset: Any, syntax: str) -> tuple[UInt8[ndarray, "h w 3"], bool]:
    """The first frame as RGB, and whether it is coarse."""
    colours = str(dataset.PhotometricInterpretation)
    if syntax in (*_NATIVE, *_OTHERS):
        from pydicom.pixels.utils import pixel_array

        return _to_rgb(np.asarray(pixel_array(dataset, index=0, raw=True)), colours), False
    from pydicom.encaps import get_frame

    frame = get_frame(dataset.PixelData, 0, number_of_frames=int(dataset.get("NumberOfFrames") or 1))
    if syntax in _LOSSLESS_JPEG:
        return _to_rgb(_lossless_jpeg(frame, grey=colours == _GREY), colours), False
    image = Image.open(io.BytesIO(frame), formats=("JPEG", "JPEG2000"))
    if image.size != (dataset.Columns, dataset.Rows):
        raise ImageRefusedError(Reason.CORRUPT, "the DICOM header tells another size than its pixels have")
    if image.format == "JPEG":
        check_jpeg(frame)
        if colours == _RGB and not {"jfif", "adobe_transform"} & image.info.keys() and not _named_rgb(image):
            image.draft("YCbCr", image.size)  # libjpeg's guess would be YCbCr: its samples are taken as they are
        image.load()
        refuse_damage(frame)
        rgb = image if image.mode == "YCbCr" else image.convert("RGB")
        return np.array(rgb, dtype=np.uint8), is_coarse(image)
    image.load()
    return _to_rgb(np.array(image, dtype=np.uint8), colours), False


def _named_rgb(image: Any) -> bool:
    """Whether a JPEG calls its components R, G and B, by which libjpeg knows them."""
    return bytes(component[0] for component in image.layer) == b"RGB"


def _lossless_jpeg(frame: bytes, *, grey: bool) -> UInt8[ndarray, "..."]:
    """Samples as they are stored: libjpeg knows no colours of a lossless JPEG."""
    try:
        return np.asarray(simplejpeg.decode_jpeg(frame, "GRAY" if grey else "RGB"))
    except ValueError as error:
        raise jpeg_refusal(error) or ImageRefusedError(Reason.CORRUPT, "its JPEG cannot be decoded") from error


def _to_rgb(samples: UInt8[ndarray, "..."], colours: str) -> UInt8[ndarray, "h w 3"]:
    if samples.ndim == 2 or samples.shape[2] == 1:
        return np.repeat(samples.reshape(*samples.shape[:2], 1), 3, axis=2)
    if colours in _YCC:
        return np.array(Image.fromarray(samples, "YCbCr").convert("RGB"))
    return samples
