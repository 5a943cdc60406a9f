"""What is chosen on validation photographs once the networks are trained: the numbers of the detector.

Photographs of the validation split and their masks go in; a recipe whose `DetectorConfig` holds the choice, and the
figures that justify it, come out. Pixels are counted on each photograph's own grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32
from numpy import ndarray

from ma_cluster.bundle import Bundle
from ma_cluster.config import DetectorConfig, Fusion, GradingConfig
from ma_cluster.errors import UsageError
from ma_cluster.evaluation.image_figures import REFERABLE, Scores, area
from ma_cluster.evaluation.scoring import PixelCounts, auc_pr_33, average_precision, best_f1, threshold_keeping
from ma_cluster.evaluation.tally import own_grid, row_map, rows_given
from ma_cluster.hypotheses.maps import Maps, scale_odds
from ma_cluster.images.datasets import Graded, Sample, decode_mask, look_at_each, read_object
from ma_cluster.images.reading import Prepared
from ma_cluster.lesions.detector import Detector
from ma_cluster.lesions.findings import image_score, log_odds

_FUSIONS: tuple[Fusion, Fusion] = ("geometric", "arithmetic")
_ODDS = (1.0, 2.0, 4.0, 8.0, 16.0)
_WEIGHTS_1X, _WEIGHTS_PRN = (0.0, 0.5, 1.0), (0.0, 1.0)
_HYPOTHESES = ("hgn_1x", "hgn_half")
_LEAST_SLOPE = 0.05  # of the calibration: a higher score never makes retinopathy less likely
_NEWTON_STEPS = 100
_ROUNDING = 1e-9
_LARGEST = 0.999  # of a score that a lesion must reach
_SMALLEST = 1e-3  # networks that tell nothing apart do best to call every pixel; a detector must not


def calibrate(bundle: Bundle, samples: Sequence[Sample], threads: int | None = None) -> Bundle:
    """The bundle with the choices made on `samples` and their figures.

    The maps of all annotated samples are held at once, about 100 MB for each photograph of 12 megapixels.

    Args:
        bundle: the networks, and what of the detector is not chosen here.
        samples: annotated photographs, and healthy ones without a mask: these set `least_score`.
        threads: as for `Detector`.

    Raises:
        UsageError: a photograph cannot be used, or is of another size than its mask; or the masks outline nothing.
    """
    annotated = [sample for sample in samples if sample.mask is not None]
    recipe = bundle.recipe
    detector = Detector(bundle, threads=threads)
    cases = look_at_each(annotated, lambda sample: _case(sample, detector))
    if not any(case.truth.any() for case in cases):
        raise UsageError("the masks of the validation photographs outline nothing to choose by; check the data")
    roi = [threshold_keeping(_pool(cases, _row(name)), recipe.detector.roi_recall) for name in _HYPOTHESES]
    config = replace(recipe.detector, roi_threshold_1x=roi[0], roi_threshold_half=roi[1], prn_odds=1.0, least_score=0.0)
    refiner = Detector(_with(bundle, config), threads=threads)
    cases = [_refined(case, refiner) for case in cases]
    if bundle.stage == "prn":
        config = replace(config, prn_odds=_best_odds(cases))
    cases = [_scaled(case, config.prn_odds) for case in cases]
    config, counts = _fused(config, cases, bundle.stage)
    threshold = min(max(best_f1(counts).threshold, _SMALLEST), 1 - _SMALLEST)
    config = replace(config, threshold=threshold)
    validation: dict[str, Any] = {"photographs": [sample.name for sample in annotated]}
    validation["rows"] = {name: _figures(_pool(cases, _row(name))) for name in rows_given(bundle.weights)}
    validation["detector"] = _figures(counts)
    healthy = [sample for sample in samples if sample.mask is None]
    if healthy:
        calls = _calls(Detector(_with(bundle, config), threads=threads), healthy)
        config = replace(config, least_score=least_score(calls, config.healthy_calls))
        validation["healthy"] = _healthy_figures(calls, config.least_score)
    return replace(_with(bundle, config), validation=validation)


def least_score(calls: Sequence[Sequence[float]], calls_allowed: float) -> float:
    """The smallest score at which healthy photographs have at most so many calls on average.

    Args:
        calls: of each photograph, the scores of what is called at any score, all of it false.
        calls_allowed: on average.

    0.9 0.5 | 0.7 | (none)   with 0.34 allowed, so one of three: the second largest is 0.7, called is what lies above it
    """
    scores = sorted((score for of_one in calls for score in of_one), reverse=True)
    allowed = int(calls_allowed * len(calls))
    return 0.0 if len(scores) <= allowed else float(min(np.nextafter(np.float32(scores[allowed]), 1), _LARGEST))


def fit_grading(bundle: Bundle, graded: Sequence[Graded], threads: int | None = None) -> Bundle:
    """The bundle with what its photographs' own answers follow from, and their figures.

    The regression is fitted on the photographs that train. Their own networks have seen some of these, so that it is
    too sure of itself: those that validate set its slope and its bias, and then `refer_at`.

    Args:
        bundle: the networks.
        graded: photographs that train, and others that validate.
        threads: as for `Detector`.

    Raises:
        UsageError: there are none with, or none without retinopathy among the ones or the others, or none to refer
            among those that validate.
    """
    for part in ("training", "validation"):
        grades = [each.grade for each in graded if each.split == part]
        if min(grades, default=1) > 0 or max(grades, default=0) < (REFERABLE if part == "validation" else 1):
            raise UsageError(
                f"the grades need {part} photographs with and without retinopathy, some of them to be referred: name "
                "them in a column split"
            )
    detector = Detector(bundle, threads=threads)
    measured = [detector.features(detector.prepare(read_object(each.image))) for each in graded]
    parts = {
        part: [(features, each.grade) for features, each in zip(measured, graded, strict=True) if each.split == part]
        for part in ("training", "validation")
    }
    config = calibrated(fitted(parts["training"], bundle.recipe.grading), parts["validation"])
    scores = np.array([image_score(features, config) for features, _ in parts["validation"]])
    grade = np.array([each for _, each in parts["validation"]])
    figures = {
        "training": len(parts["training"]),
        "validation": len(scores),
        "area": _area(scores, grade > 0),
        "sensitivity": float((scores >= config.refer_at)[grade >= REFERABLE].mean()),
        "specificity": float((scores < config.refer_at)[grade == 0].mean()),
    }
    rounded = {name: round(value, 4) for name, value in figures.items()}
    recipe = replace(bundle.recipe, grading=config)
    return replace(bundle, recipe=recipe, validation=bundle.validation | {"grading": rounded})


def fitted(graded: Sequence[tuple[Mapping[str, float], int]], config: GradingConfig) -> GradingConfig:
    """The logistic regression of retinopathy on the features, standardised, with a ridge of 1 on their weights.

    Args:
        graded: of each photograph its features and its grade.
        config: what is not fitted.
    """
    names = tuple(graded[0][0])
    features = np.array([[each[name] for name in names] for each, _ in graded])
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    truth = np.array([grade > 0 for _, grade in graded])
    *weights, bias = _logistic((features - mean) / scale, truth, np.zeros(len(names)))
    return replace(
        config,
        features=names,
        mean=tuple(mean.tolist()),
        scale=tuple(scale.tolist()),
        weights=tuple(weights),
        bias=bias,
    )


def calibrated(config: GradingConfig, graded: Sequence[tuple[Mapping[str, float], int]]) -> GradingConfig:
    """The regression with its slope and bias as photographs have them that trained nothing (Platt scaling, with a ridge
    towards a slope of 1), and the score from which as many as must be are referred, and the fewest others.
    """
    grade = np.array([each for _, each in graded])
    odds = np.array([log_odds(features, config) for features, _ in graded])
    slope, shift = _logistic(odds[:, None], grade > 0, np.ones(1))
    slope = max(slope, _LEAST_SLOPE)
    config = replace(
        config, weights=tuple(weight * slope for weight in config.weights), bias=config.bias * slope + shift
    )
    scores = np.array([image_score(features, config) for features, _ in graded])
    referable = np.sort(scores[grade >= REFERABLE])[::-1]
    last = referable[math.ceil(config.refer_sensitivity * len(referable) - _ROUNDING) - 1]
    below = scores[scores < last]
    return replace(config, refer_at=float(last if len(below) == 0 else (last + below.max()) / 2))


def _logistic(x: Float[ndarray, "n f"], truth: Bool[ndarray, "n"], towards: Float[ndarray, "f"]) -> list[float]:
    """Weights and bias of a logistic regression by Newton's steps, with half the squared distance of the weights from
    `towards` added to its loss.
    """
    ones, keep = np.ones((len(x), 1)), np.append(np.ones(x.shape[1]), 0.0)
    design, start = np.hstack([x, ones]), np.append(towards, 0.0)
    found = start.copy()
    for _ in range(_NEWTON_STEPS):
        probability = 1 / (1 + np.exp(-np.clip(design @ found, -50, 50)))
        curvature = (design * (probability * (1 - probability))[:, None]).T @ design + np.diag(keep + _ROUNDING)
        step = np.linalg.solve(curvature, design.T @ (truth - probability) - keep * (found - start))
        found += step
        if np.abs(step).max() < _ROUNDING:
            break
    values: list[float] = found.tolist()
    return values


def _area(scores: Float[ndarray, "n"], positive: Bool[ndarray, "n"]) -> float:
    """Under the ROC curve."""
    once = np.ones((1, len(scores)), np.int64)
    return float(area(*Scores(scores, positive, once).rates(once))[0])


def _calls(detector: Detector, samples: Sequence[Sample]) -> list[list[float]]:
    """The score of each call on each photograph."""
    found = (detector.detect(read_object(sample.image)).lesions for sample in samples)
    return [[lesion.score for lesion in lesions] for lesions in found]


def _healthy_figures(calls: Sequence[Sequence[float]], least: float) -> dict[str, Any]:
    counts = [sum(score >= least for score in of_one) for of_one in calls]
    clean = sum(count == 0 for count in counts) / len(counts)
    return {"photographs": len(calls), "mean_calls": round(float(np.mean(counts)), 4), "without_calls": round(clean, 4)}


def _with(bundle: Bundle, config: DetectorConfig) -> Bundle:
    return replace(bundle, recipe=replace(bundle.recipe, detector=config))


def _fused(config: DetectorConfig, cases: Sequence[_Case], stage: str) -> tuple[DetectorConfig, PixelCounts]:
    """The mean, and the weights of the 1x network and the PRN, that do best; and the pixel counts of what they give."""
    refined = _WEIGHTS_PRN if stage == "prn" else (1.0,)
    choices = [
        replace(config, fusion=how, weight_1x=one, weight_prn=prn)
        for how in _FUSIONS
        for one in _WEIGHTS_1X
        for prn in refined
    ]
    counted = [
        (choice, _pool(cases, lambda case: own_grid(case.maps[stage].fused(choice), case.prepared)))  # noqa: B023
        for choice in choices
    ]
    return max(counted, key=lambda pair: average_precision(pair[1]))


@dataclass(frozen=True, slots=True)
class _Case:
    """A validation photograph, its reference and the maps found on it."""

    prepared: Prepared
    truth: Bool[ndarray, "h w"]
    maps: dict[str, Maps]
    """The maps found on it, by the network that completes them."""


def _case(sample: Sample, detector: Detector) -> _Case:
    assert sample.mask is not None
    prepared = detector.prepare(read_object(sample.image))
    return _Case(
        prepared, decode_mask(read_object(sample.mask), prepared.shape), {"hgn": detector.hypotheses(prepared)}
    )


def _refined(case: _Case, detector: Detector) -> _Case:
    maps = {name: detector.refinements(case.prepared, case.maps["hgn"], name) for name in detector.refiners}
    return replace(case, maps=case.maps | maps)


def _pool(cases: Sequence[_Case], map_of: Callable[[_Case], Float32[ndarray, "h w"]]) -> PixelCounts:
    """Pixel counts of a map over all photographs."""
    counts = [PixelCounts.of(map_of(case), case.truth) for case in cases]
    return sum(counts[1:], counts[0])


def _row(row: str) -> Callable[[_Case], Float32[ndarray, "h w"]]:
    return lambda case: row_map(row, case.maps, case.prepared)


def _scaled(case: _Case, odds: float) -> _Case:
    """The case with the odds of each refinement scaled."""
    maps = {}
    for network, own in case.maps.items():
        if own.prn_1x is not None and own.prn_half is not None:
            own = replace(own, prn_1x=scale_odds(own.prn_1x, odds), prn_half=scale_odds(own.prn_half, odds))
        maps[network] = own
    return replace(case, maps=maps)


def _best_odds(cases: Sequence[_Case]) -> float:
    """The odds of the refinement that do best in either mean."""

    def best(odds: float) -> float:
        scaled = [_scaled(replace(case, maps={"prn": case.maps["prn"]}), odds) for case in cases]
        return max(average_precision(_pool(scaled, _row(f"prn_{how}"))) for how in _FUSIONS)

    return max(_ODDS, key=best)


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
