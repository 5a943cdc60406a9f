"""Whose eye a photograph shows, when and by what it was taken: what a DICOM file says of it beside its pixels.

    header, as pydicom reads it -> `acquisition_of` -> Acquisition -> JSON, out of the decoding child -> Acquisition

It names a patient. So it stays in memory: no column, metric, log line or file name is made of it as it is, but the
DICOM objects that tell the same patient's results.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Laterality = Literal["R", "L"]
_SIDES = {"R": "R", "L": "L", "24028007": "R", "G-A100": "R", "7771000": "L", "G-A101": "L"}
_ANSWERS = {"YES": True, "NO": False}
_UID = re.compile(r"[0-9.]{1,64}")
_DATE = re.compile(r"(19|20)\d{2}(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])")
_LONGEST = 256  # characters of a value; DICOM's own limit is 64 for most
_MOST = 3000  # characters of all of them
HEADER = (
    *("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyID", "StudyDescription"),
    *("InstanceNumber", "Manufacturer", "ManufacturerModelName"),
    *("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"),
)
"""Keywords of what results of a photograph repeat of it, so that they are filed beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Acquisition:
    """What is known of the taking of a photograph; None, 0 or empty where its file does not say."""

    patient_id: str | None = field(default=None, repr=False)
    """As it is: to be hashed before it is written anywhere."""
    laterality: Laterality | None = None
    laterality_source: str | None = None
    """Where the side was found: dicom_image, dicom_frame, dicom_series or dicom_region."""
    visit: str | None = None
    """The day of the study, else of the photograph: YYYY-MM-DD."""
    field_degrees: float = 0.0
    """Horizontal field of view, degrees."""
    pixel_spacing_mm: tuple[float, float] | None = None
    """On the retina, between rows and between columns, millimetres."""
    device: str | None = None
    """Manufacturer and model of the camera."""
    sop_class_uid: str = ""
    sop_instance_uid: str = ""
    series_instance_uid: str = ""
    study_instance_uid: str = ""
    frame_of_reference_uid: str | None = None
    frames: int = 1
    """Pictures in the file, of which the first is read."""
    burnt_in_annotation: bool | None = None
    """Whether text that tells the patient is written into its pixels, as it says."""
    header: dict[str, str] = field(default_factory=dict, repr=False)
    """The values of `HEADER` that it has; several of one are separated by a backslash."""

    def to_values(self) -> dict[str, Any]:
        """As JSON has it."""
        return dataclasses.asdict(self)


def acquisition_from(values: dict[str, Any]) -> Acquisition:
    """What `to_values` gave, from a process that bytes nobody vouches for may have taken over.

    Raises:
        TypeError, ValueError, KeyError: it is nothing of the kind.
    """
    header = {str(name): _text(value) for name, value in values["header"].items()}
    if not set(header) <= set(HEADER) or sum(map(len, header.values())) > _MOST:
        raise ValueError("a header that no file has")
    spacing = values["pixel_spacing_mm"]
    reference = values["frame_of_reference_uid"]
    texts: dict[str, Any] = {name: None if values[name] is None else _text(values[name]) for name in _TEXTS}
    return Acquisition(
        **texts,
        **{name: uid(values[name]) for name in _UIDS},
        frame_of_reference_uid=None if reference is None else uid(reference),
        laterality=None if values["laterality"] is None else _one_of(values["laterality"], get_args(Laterality)),
        field_degrees=_within(values["field_degrees"], 360.0),
        pixel_spacing_mm=None if spacing is None else (_within(spacing[0], 1.0), _within(spacing[1], 1.0)),
        frames=int(values["frames"]),
        burnt_in_annotation=_one_of(values["burnt_in_annotation"], (True, False, None)),
        header=header,
    )


_TEXTS = ("patient_id", "laterality_source", "visit", "device")
_UIDS = ("sop_class_uid", "sop_instance_uid", "series_instance_uid", "study_instance_uid")


def acquisition_of(dataset: Any) -> Acquisition:
    """What a `pydicom.Dataset` says; values that are not what they should be are passed by.

    Raises:
        ValueError: it lacks a UID, without which it is no DICOM object.
    """
    header = dict[str, str]()
    for keyword in HEADER:
        value = _joined(dataset.get(keyword))
        if value and len(value) <= _LONGEST and sum(map(len, header.values())) + len(value) <= _MOST:
            header[keyword] = value
    side, where = _laterality(dataset)
    reference = str(dataset.get("FrameOfReferenceUID") or "")
    camera = " ".join(filter(None, (header.get("Manufacturer"), header.get("ManufacturerModelName"))))
    return Acquisition(
        patient_id=header.get("PatientID"),
        laterality=side,
        laterality_source=where,
        visit=_visit(dataset),
        field_degrees=_number(dataset.get("HorizontalFieldOfView"), 10.0, 360.0),
        pixel_spacing_mm=_spacing(dataset),
        device=camera[:_LONGEST] or None,
        sop_class_uid=uid(str(dataset.get("SOPClassUID"))),
        sop_instance_uid=uid(str(dataset.get("SOPInstanceUID"))),
        series_instance_uid=uid(str(dataset.get("SeriesInstanceUID"))),
        study_instance_uid=uid(str(dataset.get("StudyInstanceUID"))),
        frame_of_reference_uid=reference if _UID.fullmatch(reference) else None,
        frames=max(1, int(_number(dataset.get("NumberOfFrames"), 1.0, 2.0**31))),
        burnt_in_annotation=_ANSWERS.get(str(dataset.get("BurnedInAnnotation", "")).upper()),
        header=header,
    )


def uid(text: Any) -> str:
    """A DICOM UID as it is. Raises ValueError: it is none."""
    if not isinstance(text, str) or not _UID.fullmatch(text):
        raise ValueError("an identifier of a DICOM object is missing, or is none")
    return text


def _laterality(dataset: Any) -> tuple[Laterality | None, str | None]:
    """R or L where the photograph says it of itself, of its frame, of its series or of the region that it shows."""
    frames = _items(dataset, "SharedFunctionalGroupsSequence")
    frames += _items(dataset, "PerFrameFunctionalGroupsSequence")[:1]
    regions = _items(dataset, "AnatomicRegionSequence")
    said = {
        "dicom_image": [dataset.get("ImageLaterality")],
        "dicom_frame": [f.get("FrameLaterality") for group in frames for f in _items(group, "FrameAnatomySequence")],
        "dicom_series": [dataset.get("Laterality")],
        "dicom_region": [
            code.get("CodeValue") for region in regions for code in _items(region, "AnatomicRegionModifierSequence")
        ],
    }
    for where, values in said.items():
        sides = {_SIDES[str(value)] for value in values if str(value) in _SIDES}
        if len(sides) == 1:
            return _one_of(sides.pop(), get_args(Laterality)), where
    return None, None


def _items(dataset: Any, keyword: str) -> list[Any]:
    found = dataset.get(keyword)
    return list(found) if isinstance(found, Iterable) and not isinstance(found, str | bytes) else []


def _visit(dataset: Any) -> str | None:
    keywords = ("StudyDate", "AcquisitionDateTime", "AcquisitionDate", "ContentDate", "SeriesDate")
    for keyword in keywords:
        if match := _DATE.match(str(dataset.get(keyword) or "")):
            day = match.group()
            return f"{day[:4]}-{day[4:6]}-{day[6:]}"
    return None


def _spacing(dataset: Any) -> tuple[float, float] | None:
    found = [_number(value, 1e-5, 1.0) for value in _items(dataset, "PixelSpacing")]
    return (found[0], found[1]) if len(found) == 2 and min(found) > 0 else None


def _number(value: Any, low: float, high: float) -> float:
    """Within its limits, else 0."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return 0.0
    return number if low <= number <= high else 0.0


def _within(value: Any, high: float) -> float:
    number = float(value)
    if not (math.isfinite(number) and 0 <= number <= high):
        raise ValueError("a number out of its range")
    return number


def _joined(value: Any) -> str:
    values = value if isinstance(value, list | tuple) or type(value).__name__ == "MultiValue" else [value]
    return "\\".join(str(each) for each in values if each is not None).strip("\0 ")


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST:
        raise ValueError("no text, or too long a one")
    return value


def _one_of(value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise ValueError("not of the closed list")
    return value
