"""What is chosen on validation photographs once the networks are trained: regions of interest, fusion, threshold.

Photographs of the validation split and their masks go in; a recipe whose `DetectorConfig` holds the choice, and the
figures that justify it, come out. Pixels are counted on each photograph's own grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool
from numpy import ndarray

from ma_cluster.bundle import Bundle
from ma_cluster.config import Fusion
from ma_cluster.images.contrast import Prepared
from ma_cluster.images.datasets import Sample, decode_mask, read_object
from ma_cluster.lesions.detector import Detector, Maps
from ma_cluster.lesions.rows import row_map, rows_given
from ma_cluster.lesions.scoring import PixelCounts, auc_pr_33, average_precision, best_f1, threshold_keeping

_SMALLEST = 1e-3  # networks that tell nothing apart do best to call every pixel; a detector must not


def calibrate(bundle: Bundle, samples: Sequence[Sample]) -> Bundle:
    """The bundle with the choices made on `samples` and their figures.

    The maps of all samples are held at once, about 100 MB for each photograph of 12 megapixels.
    """
    recipe = bundle.recipe
    detector = Detector(bundle)
    cases = [_case(sample, detector) for sample in samples]
    roi = [threshold_keeping(_pool(cases, name), recipe.detector.roi_recall) for name in ("hgn_1x", "hgn_half")]
    config = dataclasses.replace(recipe.detector, roi_threshold_1x=roi[0], roi_threshold_half=roi[1])
    refiner = Detector(dataclasses.replace(bundle, recipe=dataclasses.replace(recipe, detector=config)))
    cases = [_refined(case, refiner) for case in cases]
    figures = {name: _figures(_pool(cases, name)) for name in rows_given(bundle.weights)}
    stage = "prn" if "prn" in bundle.weights else "hgn"
    fusions: tuple[Fusion, Fusion] = ("geometric", "arithmetic")
    fusion = max(fusions, key=lambda how: figures[f"{stage}_{how}"]["average_precision"])
    threshold = min(max(figures[f"{stage}_{fusion}"]["threshold"], _SMALLEST), 1 - _SMALLEST)
    config = dataclasses.replace(config, fusion=fusion, threshold=threshold)
    validation = {"photographs": [sample.name for sample in samples], "rows": figures}
    return dataclasses.replace(bundle, recipe=dataclasses.replace(recipe, detector=config), validation=validation)


@dataclass(frozen=True, slots=True)
class _Case:
    """A validation photograph, its reference and the maps found on it."""

    prepared: Prepared
    truth: Bool[ndarray, "h w"]
    maps: dict[str, Maps]
    """By the network that completes them."""


def _case(sample: Sample, detector: Detector) -> _Case:
    assert sample.mask is not None
    prepared = detector.prepare(read_object(sample.image))
    return _Case(prepared, decode_mask(read_object(sample.mask)), {"hgn": detector.hypotheses(prepared)})


def _refined(case: _Case, detector: Detector) -> _Case:
    maps = {name: detector.refinements(case.prepared, case.maps["hgn"], name) for name in detector.refiners}
    return dataclasses.replace(case, maps=case.maps | maps)


def _pool(cases: Sequence[_Case], row: str) -> PixelCounts:
    """Pixel counts of a row over all photographs."""
    counts = [PixelCounts.of(row_map(row, case.maps, case.prepared), case.truth) for case in cases]
    return sum(counts[1:], counts[0])


def _figures(counts: PixelCounts) -> dict[str, Any]:
    best = best_f1(counts)
    figures = {
        "average_precision": average_precision(counts),
        "auc_pr_33": auc_pr_33(counts),
        "threshold": best.threshold,
        "f1": best.f1,
        "precision": best.precision,
        "recall": best.recall,
    }
    return {name: round(value, 4) for name, value in figures.items()}
