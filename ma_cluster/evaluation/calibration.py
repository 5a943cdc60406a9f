"""Checkpoints of training -> a bundle, with regions of interest, odds, fusion and threshold chosen on photographs.

Photographs of the validation split and their masks go in; a recipe whose `DetectorConfig` holds the choice, and the
figures that justify it, come out. Pixels are counted on each photograph's own grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from numpy import ndarray
from torch import Tensor

from ma_cluster.bundle import Bundle, restore_checkpoint
from ma_cluster.config import Fusion, Recipe
from ma_cluster.evaluation.scoring import PixelCounts, auc_pr_33, average_precision, best_f1, threshold_keeping
from ma_cluster.evaluation.tally import network_of, row_map, rows_given
from ma_cluster.hypotheses.fusion import scale_odds
from ma_cluster.images.contrast import Prepared
from ma_cluster.images.datasets import Sample, decode_mask, read_checkpoint, read_object
from ma_cluster.lesions.detector import Detector, Maps
from ma_cluster.lesions.stages import build_network

_FUSIONS: tuple[Fusion, Fusion] = ("geometric", "arithmetic")
_ODDS = (1.0, 2.0, 4.0, 8.0, 16.0)
_SMALLEST = 1e-3  # networks that tell nothing apart do best to call every pixel; a detector must not


def pack(
    checkpoints: Mapping[str, Sequence[str]],
    recipe: Recipe,
    attribution: str,
    validation: Sequence[Sample] = (),
    threads: int | None = None,
) -> Bundle:
    """A bundle of what `save_checkpoint` wrote, calibrated where there are validation photographs.

    Args:
        checkpoints: URLs of each network's checkpoints, by the network's name (hgn_1x, hgn_half, prn, cls). Of several,
            as of a training gone on with, the mean of the weights (Wortsman et al., "Model soups", ICML 2022).
        recipe: of the networks.
        attribution: of the data they were trained on, as its licence asks for.
        validation: photographs with masks on which regions of interest, fusion and threshold are chosen; without any
            the recipe's stay.
        threads: of the calibration, as for `Detector`.

    Raises:
        BundleError: a checkpoint is of another network, or a required one is missing.
        UsageError: there is no such checkpoint.
    """
    weights = {name: _mean([_read(url, name, recipe) for url in urls]) for name, urls in checkpoints.items()}
    bundle = Bundle(recipe, weights, attribution)
    return calibrate(bundle, validation, threads) if validation else bundle


def calibrate(bundle: Bundle, samples: Sequence[Sample], threads: int | None = None) -> Bundle:
    """The bundle with the choices made on `samples` and their figures.

    The maps of all samples are held at once, about 100 MB for each photograph of 12 megapixels. `threads` is as for
    `Detector`.
    """
    recipe = bundle.recipe
    detector = Detector(bundle, threads=threads)
    cases = [_case(sample, detector) for sample in samples]
    roi = [threshold_keeping(_pool(cases, name), recipe.detector.roi_recall) for name in ("hgn_1x", "hgn_half")]
    config = dataclasses.replace(recipe.detector, roi_threshold_1x=roi[0], roi_threshold_half=roi[1], prn_odds=1.0)
    refined = dataclasses.replace(bundle, recipe=dataclasses.replace(recipe, detector=config))
    refiner = Detector(refined, threads=threads)
    cases = [_refined(case, refiner) for case in cases]
    if bundle.stage == "prn":
        rows = [f"prn_{how}" for how in _FUSIONS]
        odds = max(_ODDS, key=lambda odds: max(average_precision(_pool(cases, row, odds)) for row in rows))
        config = dataclasses.replace(config, prn_odds=odds)
    figures = {name: _figures(_pool(cases, name, config.prn_odds)) for name in rows_given(bundle.weights)}
    fusion = max(_FUSIONS, key=lambda how: figures[f"{bundle.stage}_{how}"]["average_precision"])
    threshold = min(max(figures[f"{bundle.stage}_{fusion}"]["threshold"], _SMALLEST), 1 - _SMALLEST)
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


def _pool(cases: Sequence[_Case], row: str, odds: float = 1.0) -> PixelCounts:
    """Pixel counts of a row over all photographs, the refinement's odds scaled."""
    counts = [
        PixelCounts.of(row_map(row, _scaled(case.maps, network_of(row), odds), case.prepared), case.truth)
        for case in cases
    ]
    return sum(counts[1:], counts[0])


def _scaled(maps: dict[str, Maps], network: str, odds: float) -> dict[str, Maps]:
    """The maps of a network alone, its refinement's odds scaled."""
    own = maps[network]
    if own.prn_1x is None or own.prn_half is None:
        return {network: own}
    prn = {"prn_1x": scale_odds(own.prn_1x, odds), "prn_half": scale_odds(own.prn_half, odds)}
    return {network: dataclasses.replace(own, **prn)}


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


def _read(url: str, name: str, recipe: Recipe) -> dict[str, Tensor]:
    network = build_network(name, recipe)
    restore_checkpoint(read_checkpoint(url), name, network)
    return network.state_dict()


def _mean(networks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each tensor; counts, which have none, are the last network's."""
    *_, last = networks
    return {
        key: torch.stack([network[key] for network in networks]).mean(dim=0) if value.is_floating_point() else value
        for key, value in last.items()
    }
