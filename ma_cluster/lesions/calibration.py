"""What is chosen on validation photographs once the networks are trained: regions of interest, fusion, threshold.

Photographs of the validation split and their masks go in; a recipe whose `DetectorConfig` holds the choice, and the
figures that justify it, come out. Pixels are counted on each photograph's own grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from ma_cluster.bundle import Bundle
from ma_cluster.config import Fusion
from ma_cluster.hypotheses.fusion import fuse
from ma_cluster.images.contrast import Prepared
from ma_cluster.images.datasets import Sample, decode_mask, read_object
from ma_cluster.lesions.detector import Detector, Map, Maps
from ma_cluster.lesions.scoring import PixelCounts, auc_pr_33, average_precision, best_f1, threshold_keeping

ROWS: dict[str, Callable[[Maps], Map]] = {
    "hgn_1x": lambda maps: maps.hgn_1x,
    "hgn_half": lambda maps: maps.hgn_half,
    "hgn_geometric": lambda maps: fuse([maps.hgn_1x, maps.hgn_half], "geometric"),
    "hgn_arithmetic": lambda maps: fuse([maps.hgn_1x, maps.hgn_half], "arithmetic"),
    "prn_geometric": lambda maps: fuse(maps.stack(), "geometric"),
    "prn_arithmetic": lambda maps: fuse(maps.stack(), "arithmetic"),
}
"""Rows of the paper's Table 2 that one model gives, each a fusion of its maps."""


def calibrate(bundle: Bundle, samples: Sequence[Sample], roi_recall: float = 0.95) -> Bundle:
    """The bundle with the choices made on `samples` and their figures.

    Args:
        bundle: trained networks.
        samples: photographs with masks that trained nothing.
        roi_recall: share of lesion pixels that each region of interest must keep.
    """
    hypotheses = _counts(_without_prn(bundle), samples, ("hgn_1x", "hgn_half"))
    rois = {name: threshold_keeping(counts, roi_recall) for name, counts in hypotheses.items()}
    detector = dataclasses.replace(
        bundle.recipe.detector, roi_threshold_1x=rois["hgn_1x"], roi_threshold_half=rois["hgn_half"]
    )
    bundle = dataclasses.replace(bundle, recipe=dataclasses.replace(bundle.recipe, detector=detector))
    rows = tuple(ROWS) if "prn" in bundle.weights else tuple(name for name in ROWS if name.startswith("hgn"))
    counts = _counts(bundle, samples, rows)
    figures = {name: _figures(counts[name]) for name in rows}
    stage = "prn" if "prn" in bundle.weights else "hgn"
    fusions: tuple[Fusion, Fusion] = ("geometric", "arithmetic")
    fusion = max(fusions, key=lambda how: figures[f"{stage}_{how}"]["average_precision"])
    chosen = figures[f"{stage}_{fusion}"]
    detector = dataclasses.replace(detector, fusion=fusion, threshold=chosen["threshold"])
    validation = {"photographs": [sample.name for sample in samples], "roi_recall": roi_recall, "rows": figures}
    return dataclasses.replace(
        bundle, recipe=dataclasses.replace(bundle.recipe, detector=detector), validation=validation
    )


def _without_prn(bundle: Bundle) -> Bundle:
    return dataclasses.replace(bundle, weights={k: v for k, v in bundle.weights.items() if k.startswith("hgn")})


def _counts(bundle: Bundle, samples: Sequence[Sample], rows: Sequence[str]) -> dict[str, PixelCounts]:
    """Pixel counts of each row, pooled over the samples."""
    detector = Detector(bundle)
    total: dict[str, PixelCounts] = {}
    for sample in samples:
        assert sample.mask is not None
        prepared = detector.prepare(read_object(sample.image))
        truth = decode_mask(read_object(sample.mask))
        maps = detector.maps(prepared)
        for name in rows:
            counts = _count(ROWS[name](maps), prepared, truth)
            total[name] = total[name] + counts if name in total else counts
    return total


def _count(probability: Map, prepared: Prepared, truth: Bool[ndarray, "h w"]) -> PixelCounts:
    own = prepared.grid.uncrop(probability, prepared.shape)
    return PixelCounts.of(np.clip(own, 0, 1), truth)


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
