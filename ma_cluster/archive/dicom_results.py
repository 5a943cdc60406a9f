"""The result of a DICOM photograph as DICOM objects, filed beside it: SEG, SR and Secondary Capture.

    Acquisition, Findings, mask, overlay -> dicom/<name>.seg.dcm   the mask, one binary segment
                                            dicom/<name>.sr.dcm    count, area, image score, triage (TID 1500)
                                            dicom/<name>.sc.dcm    the overlay, which every viewer shows

Nothing in them is drawn by lot or by the clock: their UIDs follow from the photograph's and the digests of model and
configuration, their times from the run's. So whoever makes them again makes the same bytes, and a server that is sent
them twice stores them once. The series are of the photograph's study and patient. Imported
where it is asked for: highdicom takes a second.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from highdicom import AlgorithmIdentificationSequence, sr
from highdicom.color import CIELabColor
from highdicom.seg import Segmentation, SegmentDescription
from highdicom.sr import CodedConcept
from PIL import Image
from pydicom import Dataset
from pydicom.config import RAISE
from pydicom.datadict import dictionary_VM, dictionary_VR
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sr.coding import Code
from pydicom.uid import JPEGBaseline8Bit
from pydicom.valuerep import DA, TM, validate_value

from ma_cluster import __version__
from ma_cluster.archive.run import Run
from ma_cluster.images.acquisition import Acquisition
from ma_cluster.storage.dicomweb import OWN_SERIES

MANUFACTURER = "ma_cluster"
SUFFIXES = (".seg.dcm", ".sr.dcm", ".sc.dcm")
_SERIES = dict(zip(SUFFIXES, ((9301, "SEG"), (9302, "SR"), (9303, "OT")), strict=True))
_SCHEME = "99MACLUSTER"
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_PLAIN = "1.2.840.10008.5.1.4.1.1.77.1.4"  # VL Photographic, of one frame
_MICROANEURYSM = ("microaneurysm", "Microaneurysm")
_ALTERED = ("49755003", "SCT", "Morphologically Altered Structure")
_PHOTOGRAPHY = ("OP", "DCM", "Ophthalmic Photography")
_FILTERS = threading.Lock()  # of warnings are the process's own: two who change them at a time undo each other
_COLOUR = (74.0, -63.0, 58.0)  # of the segment, CIELab: the green of the overlay


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What is said of a photograph, as results repeat it."""

    mask_png: bytes
    overlay_jpeg: bytes
    lesions: int
    area_px: int
    image_score: float | None
    triage: str
    gradable: bool
    shows_text: bool
    """Its flags hold burnt_in_text."""


def dicom_results(acquisition: Acquisition, told: Told, run: Run) -> dict[str, bytes]:
    """The files of a photograph's results, by their suffixes."""
    makers: dict[str, Callable[[_Result], Dataset]] = dict(
        zip(SUFFIXES, (_segmentation, _report, _capture), strict=True)
    )
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a header's oddities, whose words hold a patient's name
        return {suffix: _written(make(_Result(acquisition, told, run, suffix))) for suffix, make in makers.items()}


@dataclass(frozen=True, slots=True)
class _Result:
    acquisition: Acquisition
    told: Told
    run: Run
    suffix: str

    def uid(self, name: str, of: str | None = None) -> str:
        """The UID of something in this result; it follows from that of the photograph, or of what is given."""
        by = self.run.model_digest, self.run.config_digest
        said = [of or self.acquisition.sop_instance_uid, *by, self.suffix, name]
        return f"2.25.{int.from_bytes(hashlib.sha256(json.dumps(said).encode()).digest()[:16])}"

    @property
    def place(self) -> dict[str, Any]:
        """Its series and number, in highdicom's words."""
        number, _ = _SERIES[self.suffix]
        instance = self.acquisition.header.get("InstanceNumber", "1")
        return {
            "series_instance_uid": self.uid("series", self.acquisition.series_instance_uid),
            "series_number": number,
            "sop_instance_uid": self.uid("instance"),
            "instance_number": max(1, int(instance)) if instance.isdecimal() else 1,
            "manufacturer": MANUFACTURER,
            "manufacturer_model_name": MANUFACTURER,
            "software_versions": __version__,
            "device_serial_number": self.run.model_digest[:16],
            "series_description": OWN_SERIES,
        }

    @property
    def moment(self) -> datetime:
        return datetime.fromisoformat(self.run.started).astimezone(UTC)

    @property
    def source(self) -> Dataset:
        """The photograph without its pixels: of several frames, the one that was read."""
        acquisition, dataset = self.acquisition, Dataset()
        empty = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID")
        for keyword in (*empty, "StudyDate", "StudyTime", "ReferringPhysicianName"):
            setattr(dataset, keyword, None)
        for keyword, value in acquisition.header.items():
            if _fits(keyword, value):
                setattr(dataset, keyword, value)
        dataset.SpecificCharacterSet = "ISO_IR 192"
        dataset.Modality = "OP"
        dataset.SOPClassUID = acquisition.sop_class_uid
        dataset.SOPInstanceUID = acquisition.sop_instance_uid
        dataset.SeriesInstanceUID = acquisition.series_instance_uid
        dataset.StudyInstanceUID = acquisition.study_instance_uid
        if acquisition.frame_of_reference_uid is not None:
            dataset.FrameOfReferenceUID = acquisition.frame_of_reference_uid
        dataset.Columns, dataset.Rows = Image.open(io.BytesIO(self.told.mask_png)).size
        return dataset


_ONE: dict[str, Callable[[str], object]] = {"DA": DA, "TM": TM}  # which may be ranges, where a query asks by them


def _fits(keyword: str, value: str) -> bool:
    """Whether an element may hold a value: a header that breaks DICOM's rules is not repeated there."""
    kind, parts = dictionary_VR(keyword), value.split("\\")
    if len(parts) > 1 and dictionary_VM(keyword) == "1":
        return False
    try:
        for part in parts:
            validate_value(kind, part, RAISE)
            _ONE.get(kind, str)(part)
    except ValueError:
        return False
    return True


def _segmentation(result: _Result) -> Dataset:
    mask = np.asarray(Image.open(io.BytesIO(result.told.mask_png)).convert("1"))
    algorithm = AlgorithmIdentificationSequence(
        name=MANUFACTURER,
        family=Code("123110", "DCM", "Artificial Intelligence"),
        version=__version__,
        source=MANUFACTURER,
        parameters={"model": result.run.model_digest, "configuration": result.run.config_digest},
    )
    segment = SegmentDescription(
        segment_number=1,
        segment_label=_MICROANEURYSM[1],
        segmented_property_category=Code(*_ALTERED),
        segmented_property_type=_own(*_MICROANEURYSM),
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm,
        display_color=CIELabColor(*_COLOUR),
    )
    source = result.source
    source.SOPClassUID = _PLAIN  # highdicom would look for functional groups, which ophthalmic photographs have not
    made = Segmentation(
        source_images=[source],
        pixel_array=mask[None].astype(np.uint8),
        segmentation_type="BINARY",
        segment_descriptions=[segment],
        omit_empty_frames=False,
        content_label="MICROANEURYSMS",
        **result.place,
    )
    made.PatientOrientation = None
    organization = result.uid("dimensions")
    for item in (*made.DimensionOrganizationSequence, *made.get("DimensionIndexSequence", ())):
        item.DimensionOrganizationUID = organization
    if result.acquisition.frame_of_reference_uid is None and "FrameOfReferenceUID" in made:
        made.FrameOfReferenceUID = result.uid("frame of reference")
    for element in made.iterall():
        if element.keyword == "ReferencedSOPClassUID" and element.value == _PLAIN:
            element.value = result.acquisition.sop_class_uid
    return _at(made, result.moment)


def _report(result: _Result) -> Dataset:
    made = sr.ComprehensiveSR(
        evidence=[result.source],
        content=_content(result)[0],
        is_complete=True,
        is_final=False,
        **{name: value for name, value in result.place.items() if name != "device_serial_number"},
    )
    return _at(made, result.moment)


def _content(result: _Result) -> sr.MeasurementReport:
    told, source = result.told, result.source
    one = Code("1", "UCUM", "no units")
    unit, area = Code("{pixels}", "UCUM", "pixels"), float(told.area_px)
    if (spacing := result.acquisition.pixel_spacing_mm) is not None:
        unit, area = Code("mm2", "UCUM", "square millimeter"), told.area_px * spacing[0] * spacing[1]
    measured = [
        (_own("count", "Number of microaneurysms"), float(told.lesions), one),
        (Code("42798000", "SCT", "Area"), area, unit),
    ]
    if told.image_score is not None:
        measured.append((_own("image-score", "Probability of retinopathy"), told.image_score, one))
    said = [
        (_own("triage", "Triage"), _own(f"triage-{told.triage}", told.triage)),
        (_own("gradable", "Gradable"), Code(*_YES) if told.gradable else Code(*_NO)),
    ]
    group = sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=result.uid("tracking"), identifier=_MICROANEURYSM[1]),
        finding_type=_own(*_MICROANEURYSM),
        algorithm_id=sr.AlgorithmIdentification(
            name=MANUFACTURER, version=__version__, parameters=[f"model {result.run.model_digest}"]
        ),
        measurements=[sr.Measurement(name=name, value=value, unit=unit) for name, value, unit in measured],
        qualitative_evaluations=[sr.QualitativeEvaluation(name=name, value=value) for name, value in said],
        source_images=[sr.SourceImageForMeasurementGroup.from_source_image(source)],
    )
    observer = sr.ObserverContext(
        observer_type=CodedConcept("121007", "DCM", "Device"),
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=result.uid("observer", MANUFACTURER), name=MANUFACTURER, model_name=result.run.model_digest[:16]
        ),
    )
    return sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=Code(*_PHOTOGRAPHY),
        imaging_measurements=[group],
        title=Code("126000", "DCM", "Imaging Measurement Report"),
    )


_YES, _NO = ("373066001", "SCT", "Yes"), ("373067005", "SCT", "No")


def _own(value: str, meaning: str) -> Code:
    return Code(value, _SCHEME, meaning)


def _capture(result: _Result) -> Dataset:
    """The overlay's JPEG as it is."""
    made, place, jpeg = result.source, result.place, result.told.overlay_jpeg
    made.pop("FrameOfReferenceUID", None)
    source = _reference(result.acquisition)
    made.update(_pixel_module(Image.open(io.BytesIO(jpeg)), jpeg))
    made.SOPClassUID, made.SOPInstanceUID = _SECONDARY_CAPTURE, place["sop_instance_uid"]
    made.SeriesInstanceUID, made.SeriesNumber = place["series_instance_uid"], place["series_number"]
    made.InstanceNumber, made.Modality = place["instance_number"], _SERIES[result.suffix][1]
    made.Manufacturer = made.ManufacturerModelName = MANUFACTURER
    made.SoftwareVersions, made.DeviceSerialNumber = __version__, place["device_serial_number"]
    made.SeriesDescription, made.ConversionType = OWN_SERIES, "WSD"
    made.ImageType = ["DERIVED", "SECONDARY"]
    made.DerivationDescription = "microaneurysms outlined; research software, not a medical device"
    made.SourceImageSequence = [source]
    made.PatientOrientation, made.Laterality = None, result.acquisition.laterality
    if (burnt_in := result.told.shows_text or result.acquisition.burnt_in_annotation) is not None:
        made.BurnedInAnnotation = "YES" if burnt_in else "NO"
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    made.PixelData = encapsulate([jpeg])
    made["PixelData"].VR = "OB"
    return _at(made, result.moment)


def _reference(acquisition: Acquisition) -> Dataset:
    reference = Dataset()
    reference.ReferencedSOPClassUID = acquisition.sop_class_uid
    reference.ReferencedSOPInstanceUID = acquisition.sop_instance_uid
    if acquisition.frames > 1:
        reference.ReferencedFrameNumber = 1
    return reference


def _pixel_module(image: Image.Image, jpeg: bytes) -> Dataset:
    made = Dataset()
    made.Columns, made.Rows = image.size
    made.SamplesPerPixel, made.PhotometricInterpretation, made.PlanarConfiguration = 3, "YBR_FULL_422", 0
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 8, 8, 7, 0
    made.LossyImageCompression, made.LossyImageCompressionMethod = "01", "ISO_10918_1"
    made.LossyImageCompressionRatio = round(3 * made.Columns * made.Rows / len(jpeg), 2)
    return made


def _at(made: Dataset, moment: datetime) -> Dataset:
    """With the run's time for that of making it."""
    day, time = moment.strftime("%Y%m%d"), moment.strftime("%H%M%S")
    for date_keyword, time_keyword in (
        ("ContentDate", "ContentTime"),
        ("InstanceCreationDate", "InstanceCreationTime"),
    ):
        setattr(made, date_keyword, day)
        setattr(made, time_keyword, time)
    for keyword, value in (("SeriesDate", day), ("SeriesTime", time)):
        setattr(made, keyword, value)
    made.TimezoneOffsetFromUTC = "+0000"
    for item in made.get("ContributingEquipmentSequence", ()):
        item.ContributionDateTime = f"{day}{time}"
    return made


def _written(made: Dataset) -> bytes:
    out = io.BytesIO()
    made.save_as(out, enforce_file_format=True)
    return out.getvalue()
