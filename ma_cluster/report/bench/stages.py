"""Whole detections: how long each stage takes, and how time and memory grow with the photograph."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ma_cluster.bundle import Bundle
from ma_cluster.lesions.detector import Detection, Detector
from ma_cluster.report.bench.subject import Subject

FLIPS = (1, 2, 4)
"""Flips at 0.5x that are tried: each costs a quarter of the 1x network."""
GROWTH = (0.3, 0.5, 1.0, 1.44, 2.0)
"""Diameters of the canonical field of view over the model's: about 1 to 50 megapixels for one made at 12."""
_SMALLEST_PX = 256  # a configuration allows no smaller diameter


def detect(subject: Subject) -> Iterator[dict[str, Any]]:
    """Photographs/s and megapixels/s of `detect`, with the seconds of each stage, for several flips at 0.5x.

    The flips of the model itself come first, so that the process's largest memory is theirs.
    """
    data, own = subject.photograph().data, subject.bundle().recipe.detector.flips_half
    for flips in (own, *(count for count in FLIPS if count != own)):
        best = _fastest(subject, subject.bundle(flips_half=flips), data)
        total = sum(best.seconds.values())
        yield {
            "flips_half": flips,
            "of_the_model": flips == own,
            "seconds": {stage: round(value, 2) for stage, value in best.seconds.items()},
            "total_seconds": round(total, 2),
            "photographs_per_s": round(1 / total, 4),
            "megapixels_per_s": round(best.mask.size / total / 1e6, 3),
            "peak_mb": peak_mb(),
        }


def growth(subject: Subject) -> Iterator[dict[str, Any]]:
    """Seconds and this process's largest memory so far as the canonical photograph grows, the smallest first."""
    bundle, data = subject.bundle(), subject.photograph().data
    diameters = (bundle.recipe.image.fov_diameter_px * factor for factor in GROWTH)
    for diameter in (each for each in diameters if each >= _SMALLEST_PX):
        image = replace(bundle.recipe.image, fov_diameter_px=diameter)
        sized = replace(bundle, recipe=replace(bundle.recipe, image=image))
        best = _fastest(subject, sized, data)
        total, megapixels = sum(best.seconds.values()), np.pi / 4 * diameter**2 / 1e6
        yield {
            "fov_diameter_px": round(diameter),
            "fov_megapixels": round(megapixels, 2),
            "seconds": {stage: round(value, 2) for stage, value in best.seconds.items()},
            "total_seconds": round(total, 2),
            "hgn_seconds_per_fov_megapixel": round(best.seconds["hgn"] / megapixels, 3),
            "peak_mb": peak_mb(),
        }


def peak_mb() -> int:
    """This process's largest resident memory so far, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def _fastest(subject: Subject, bundle: Bundle, data: bytes) -> Detection:
    detector = Detector(bundle, device=subject.device, threads=subject.threads)
    detections = [detector.detect(data) for _ in range(subject.repeats)]
    return min(detections, key=lambda detection: sum(detection.seconds.values()))
