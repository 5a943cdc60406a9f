"""A run's results as DICOM: written beside each mask by `score --dicom`, or here after the run, where they are not.

    outcomes -> photographs of DICOM files -> header, read again -> dicom/<name>.*.dcm -> a DICOMweb server, if wanted

Whatever is there already is left as it is, in the destination and on the server: doing it twice changes nothing.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from PIL import Image
from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from ma_cluster.archive.dicom_results import SUFFIXES, Told, dicom_results
from ma_cluster.archive.retry import latest_outcomes
from ma_cluster.archive.run import Run
from ma_cluster.errors import Flag, ImageError, ObjectRefusedError, StoreError
from ma_cluster.images.acquisition import Acquisition
from ma_cluster.images.datasets import decode_mask
from ma_cluster.images.decode import Decoded
from ma_cluster.storage.dicomweb import DicomWeb
from ma_cluster.storage.manifest import Source
from ma_cluster.storage.store import KeySet, Store

log = logging.getLogger(__name__)
_COLUMNS = ["key", "etag", "status", "triage", "image_score", "gradable", "lesion_count", "lesion_area_px", "flags"]
_AT_A_TIME = 4  # photographs: they wait for stores, mostly


def write_dicom(dest: Store, name: str, acquisition: Acquisition, told: Told, run: Run) -> bool:
    """Write a photograph's results as dicom/<name>.*, unless they are there.

    Returns:
        False where its header is not fit to be repeated: nothing is written.
    """
    try:
        files = dicom_results(acquisition, told, run)
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # of highdicom, where a header has odd values
        log.warning("a photograph's results are not told as DICOM: its header does not fit (%s)", type(error).__name__)
        return False
    for suffix, data in files.items():
        dest.create(f"dicom/{name}{suffix}", data)
    return True


@dataclass(frozen=True, slots=True)
class Exported:
    """How many photographs ended how."""

    written: int = 0
    """Their results are there as DICOM, now or since before."""
    sent: int = 0
    """Of those, the ones of which the server did not have all."""
    no_dicom: int = 0
    """They are of other files, which have no patient or study to be filed under."""
    failed: int = 0
    """Their file, mask, overlay or result is gone, damaged or changed, the header is not fit to be repeated, or the
    server refuses a result.
    """

    def __add__(self, other: Exported) -> Exported:
        return Exported(
            self.written + other.written,
            self.sent + other.sent,
            self.no_dicom + other.no_dicom,
            self.failed + other.failed,
        )


@dataclass(frozen=True, slots=True)
class DicomExport:
    """Writes results of a run as DICOM."""

    source: Source
    dest: Store
    run: Run
    decode: Callable[[bytes], Decoded]
    """Reads a header from bytes that nobody vouches for."""
    max_bytes: int
    server: DicomWeb | None = None
    """Where they are sent, too."""

    def all(self) -> Exported:
        """Export every scored photograph.

        Raises:
            StoreError: the destination cannot be written, or the server does not answer or lets nobody in.
        """
        total, rows = Exported(), self._scored()
        with ThreadPoolExecutor(_AT_A_TIME) as threads, closing(KeySet()) as there:
            for entry in self.dest.list("dicom/"):
                there.add(entry.key)
            while chunk := list(islice(rows, 16 * _AT_A_TIME)):
                total = sum(threads.map(partial(self._one, there), chunk), total)
        return total

    def _scored(self) -> Iterator[dict[str, Any]]:
        for table in latest_outcomes(self.dest, self.run, [*_COLUMNS, "mask_key", "overlay_key"]):
            yield from (row for row in table.to_pylist() if row["status"] == "scored")

    def _one(self, there: Container[str], row: dict[str, Any]) -> Exported:
        name = PurePosixPath(row["mask_key"]).stem
        keys = [f"dicom/{name}{suffix}" for suffix in SUFFIXES]
        if not all(key in there for key in keys):
            try:
                acquisition = self._acquisition(row)
                if acquisition is None:
                    return Exported(no_dicom=1)
                told = self._told(row)
            except (ImageError, StoreError):
                return Exported(failed=1)
            if not write_dicom(self.dest, name, acquisition, told, self.run):
                return Exported(failed=1)
        try:
            results = {} if self.server is None else {_place(data): data for data in map(self.dest.get, keys)}
        except (InvalidDicomError, AttributeError):  # what lies there is no DICOM object, or one without its UIDs
            return Exported(failed=1)
        try:
            return Exported(written=1, sent=int(self._send(results)))
        except ObjectRefusedError as error:
            log.warning("a photograph's results are not sent: %s", error)
            return Exported(failed=1)

    def _acquisition(self, row: dict[str, Any]) -> Acquisition | None:
        data = self.source.get(row["key"], max_bytes=self.max_bytes, etag=row["etag"])
        return self.decode(data).acquisition

    def _told(self, row: dict[str, Any]) -> Told:
        mask, overlay = self.dest.get(row["mask_key"]), self.dest.get(row["overlay_key"])
        decode_mask(mask)
        _check_jpeg(overlay)
        return Told(
            mask_png=mask,
            overlay_jpeg=overlay,
            lesions=row["lesion_count"],
            area_px=row["lesion_area_px"],
            image_score=row["image_score"],
            triage=row["triage"],
            gradable=row["gradable"],
            shows_text=Flag.BURNT_IN_TEXT in (row["flags"] or ()),
        )

    def _send(self, results: Mapping[str, bytes]) -> bool:
        return self.server is not None and any([self.server.create(place, data) for place, data in results.items()])


def _place(result: bytes) -> str:
    """What a server calls a result."""
    ours = dcmread(io.BytesIO(result), stop_before_pixels=True)
    return f"studies/{ours.StudyInstanceUID}/series/{ours.SeriesInstanceUID}/instances/{ours.SOPInstanceUID}"


def _check_jpeg(data: bytes) -> None:
    """Raises StoreError: it is no whole JPEG."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            image.draft("L", (1, 1))  # at an eighth of its size: all of it is read the same
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise StoreError("an overlay is damaged") from error
