"""Single photographs -> files beside each other: STEM.json, STEM_mask.png and STEM_overlay.jpg. No Ray anywhere."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import normalize

from ma_cluster.archive.outcomes import identify
from ma_cluster.config import OperatingPoint
from ma_cluster.errors import ImageError, Triage, UsageError
from ma_cluster.images.reading import read_bytes
from ma_cluster.lesions.detector import Detector
from ma_cluster.lesions.findings import Detection, encode_mask, encode_overlay, to_values
from ma_cluster.storage.identity import site_pseudonyms
from ma_cluster.storage.store import Entry, Store


@dataclass(frozen=True, slots=True)
class FileOutcome:
    """What became of one photograph, for a line on the terminal."""

    name: str
    seconds: float
    """Wall time from reading the file to its last result written."""
    result: Detection | ImageError
    """What was found, or why nothing was."""

    def __str__(self) -> str:
        if isinstance(self.result, ImageError):
            return f"{self.name}: {self.result.reason.status}: {self.result}"
        return f"{self.name}: {', '.join(_words(self.result))}, {self.seconds:.1f} s"


def check_stems(images: Sequence[Path]) -> None:
    """Results are named by the photograph's stem, so two of the same stem would overwrite each other.

    Raises:
        UsageError: naming both.
    """
    seen: dict[str, Path] = {}
    for image in images:
        # some file systems do not tell a.jpg from A.jpg, nor an accented letter from a letter and its accent
        other = seen.setdefault(normalize("NFC", image.stem).casefold(), image)
        if other is not image:
            raise UsageError(
                f"{other} and {image} would both write {image.stem}.json; rename one or give each its own --out"
            )


def detect_file(
    detector: Detector, image: Path, out: Store, operating_point: OperatingPoint = "default"
) -> FileOutcome:
    """Score one photograph and write its results; one without a result has a JSON that says why, and no mask.

    Raises:
        StoreError: the results cannot be written.
        OSError: the photograph cannot be read.
    """
    started = time.perf_counter()
    data = image.read_bytes()
    try:
        prepared, facts = read_bytes(data, detector.recipe.image)
        detection = detector.segment(prepared, operating_point)
    except ImageError as error:
        _put_json(out, image, _without_result(detector, image, error))
        return FileOutcome(image.name, time.perf_counter() - started, error)
    out.put(f"{image.stem}_mask.png", encode_mask(detection.mask))
    out.put(f"{image.stem}_overlay.jpg", encode_overlay(prepared.pixels, detection.mask))
    pseudonyms = None if facts.acquisition is None else site_pseudonyms()
    known = identify(Entry("", 0, ""), facts, pseudonyms).to_values()
    _put_json(out, image, _scored(detector, image, detection) | known)
    return FileOutcome(image.name, time.perf_counter() - started, detection)


def detect_files(
    detector: Detector, images: Sequence[Path], out: Store, operating_point: OperatingPoint, in_flight: int = 1
) -> Iterator[FileOutcome]:
    """`detect_file` of each in turn, so many at a time: decoding and encoding go on beside the networks."""
    if in_flight == 1:
        yield from (detect_file(detector, image, out, operating_point) for image in images)
        return
    with ThreadPoolExecutor(in_flight, thread_name_prefix="photograph") as pool:
        yield from pool.map(lambda image: detect_file(detector, image, out, operating_point), images)


def _words(found: Detection) -> Iterator[str]:
    score = "" if found.image_score is None else f" (image score {found.image_score:.2f})"
    yield f"{len(found.lesions)} {'lesion' if len(found.lesions) == 1 else 'lesions'}"
    yield f"{'refer' if found.triage is Triage.REFER else 'no referral'}{score}"
    if not found.quality.gradable:
        yield f"UNGRADABLE ({found.quality.detail or 'no measure'})"


def _scored(detector: Detector, image: Path, detection: Detection) -> dict[str, Any]:
    """Positions and lengths are pixels of the upright photograph, (row, col), pixel centres at integers."""
    values = to_values(detection.findings, detection.fov, detection.shape, detection.quality)
    model = {"model_digest": detector.digest, "threshold": detector.recipe.detector.threshold}
    return {"image": image.name} | model | values


def _without_result(detector: Detector, image: Path, error: ImageError) -> dict[str, Any]:
    return {
        "image": image.name,
        "status": error.reason.status,
        "reason": error.reason,
        "detail": error.detail,
        "model_digest": detector.digest,
    }


def _put_json(out: Store, image: Path, values: dict[str, Any]) -> None:
    out.put(f"{image.stem}.json", (json.dumps(values, indent=2) + "\n").encode())
