"""A `Tally` of all photographs -> the figures of the paper's Table 2, with intervals, and a word on each claim.

Intervals are over photographs drawn again with replacement, all rows with the same ones: differences of rows are
paired.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from numpy import ndarray

from ma_cluster.errors import UsageError
from ma_cluster.evaluation.false_pixels import PLACES
from ma_cluster.evaluation.scoring import (
    RATES,
    Operating,
    at_threshold,
    auc_pr_33,
    average_precision,
    best_f1,
    sensitivity_at,
)
from ma_cluster.evaluation.tally import RowCounts, Tally

CLAIMS = (
    ("hgn_geometric", "hgn_1x"),
    ("hgn_geometric", "hgn_half"),
    ("hgn_arithmetic", "hgn_1x"),
    ("hgn_arithmetic", "hgn_half"),
    ("prn_geometric", "hgn_geometric"),
    ("prn_arithmetic", "hgn_arithmetic"),
    ("prn_geometric", "cls_geometric"),
    ("prn_arithmetic", "cls_arithmetic"),
)
"""What the paper says is better than what: two scales than one, refinement than none, triplet loss than none."""
DECIMALS = 4
RESAMPLES = 2000
SEED = 0
COVERAGE = 0.95
FEWEST = 5
"""Photographs, or groups of them, that a verdict needs: so few resamples differ below that their interval means
little."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Bounds of the middle 95 % of the resamples, and the share of them above 0."""

    low: float
    high: float
    above_zero: float


def table_figures(tally: Tally, thresholds: Mapping[str, float]) -> dict[str, Any]:
    """The rows and differences of table.json.

    Args:
        tally: of all photographs.
        thresholds: by row, where validation chose one; the others get the best one of these photographs.

    Raises:
        UsageError: no photograph has a lesion.
    """
    if not any(row.lesions.lesions for row in tally.rows.values()):
        raise UsageError("the masks of these photographs hold no lesion, so there is nothing to find; check the data")
    pooled = [photograph for photograph in tally.photographs if photograph.pixels]
    groups = group_numbers([photograph.group for photograph in pooled])
    weights, independent = draw_groups(groups), int(groups.max()) + 1
    drawn = {name: resampled_precision([each.pixels[name] for each in pooled], weights) for name in tally.rows}
    rows = {name: _row(counts, drawn[name], thresholds.get(name)) for name, counts in tally.rows.items()}
    claims = [(better, than) for better, than in CLAIMS if better in rows and than in rows]
    differences = [_difference((better, than), tally.rows, drawn, independent) for better, than in claims]
    return {"rows": rows, "differences": differences}


def healthy_figures(tally: Tally) -> dict[str, Any] | None:
    """Lesions called on photographs that have none; None without such photographs."""
    called = [photograph.called for photograph in tally.photographs if photograph.healthy]
    if not called:
        return None
    return {
        "images": len(called),
        "lesions_per_image": _rounded(float(np.mean(called))),
        "median": float(np.median(called)),
        "most": max(called),
        "images_without": sum(count == 0 for count in called),
    }


def called_figures(tally: Tally) -> dict[str, Any]:
    """What `detect` reports at the default operating point on annotated photographs, and on what its outlines err.

    `false_on` are shares of the false pixels of all outlines, the unsure ones too; see `false_pixels`.
    """
    annotated = [photograph for photograph in tally.photographs if photograph.lesions]
    lesions = sum(next(iter(photograph.lesions.values())).lesions for photograph in annotated)
    pixels = {place: sum(photograph.false_on.get(place, 0) for photograph in annotated) for place in PLACES}
    return {
        "found": _rounded(sum(photograph.found for photograph in annotated) / max(lesions, 1)),
        "false_per_image": _rounded(float(np.mean([photograph.false for photograph in annotated]))),
        "false_on": {place: _rounded(count / max(sum(pixels.values()), 1)) for place, count in pixels.items()},
    }


def _row(counts: RowCounts, drawn: Float[ndarray, "r"], threshold: float | None) -> dict[str, Any]:
    pixels, bounds = counts.pixels, interval(drawn)
    best = best_f1(pixels)
    operating = best if threshold is None else at_threshold(pixels, threshold)
    froc = {f"{rate:g}": _rounded(sensitivity_at(counts.lesions, rate)) for rate in RATES}
    return {
        "auc_pr_33": _rounded(auc_pr_33(pixels)),
        "average_precision": _rounded(average_precision(pixels)),
        "ci_low": _rounded(bounds.low),
        "ci_high": _rounded(bounds.high),
        **_operating(operating),
        "threshold_from": "these photographs" if threshold is None else "the bundle's validation",
        "at_half": _operating(at_threshold(pixels, 0.5)),
        "best": _operating(best),
        "froc": froc | {"mean": _rounded(float(np.mean([sensitivity_at(counts.lesions, rate) for rate in RATES])))},
    }


def _operating(operating: Operating) -> dict[str, float]:
    return {name: _rounded(value) for name, value in dataclasses.asdict(operating).items()}


def _difference(
    claim: tuple[str, str], rows: Mapping[str, RowCounts], drawn: Mapping[str, Float[ndarray, "r"]], groups: int
) -> dict[str, Any]:
    better, than = claim
    exact = interval(drawn[better] - drawn[than])
    bounds = Interval(_rounded(exact.low), _rounded(exact.high), _rounded(exact.above_zero))
    difference = average_precision(rows[better].pixels) - average_precision(rows[than].pixels)
    return {
        "better": better,
        "than": than,
        "difference": _rounded(difference),
        "ci_low": bounds.low,
        "ci_high": bounds.high,
        "share_above_zero": bounds.above_zero,
        "claim": verdict(bounds, groups),
    }


def _rounded(value: float) -> float:
    return round(value, DECIMALS) + 0.0  # no -0.0


def draw_weights(photographs: int, resamples: int = RESAMPLES, seed: int = SEED) -> Int64[ndarray, "r n"]:
    """How often each photograph is in each resample."""
    return np.random.default_rng(seed).multinomial(photographs, np.full(photographs, 1 / photographs), resamples)


def group_numbers(groups: Sequence[str]) -> Int64[ndarray, "n"]:
    """The number of the group of each photograph, from 0; one without a name is a group of its own.

    Where all have the same name each is its own as well: of one group nothing could be told.
    """
    names = [name or f"\0{number}" for number, name in enumerate(groups)]
    order = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([order[name] for name in names]) if len(order) > 1 else np.arange(len(names))


def draw_groups(numbers: Int64[ndarray, "n"]) -> Int64[ndarray, "r n"]:
    """How often each photograph is in each resample: as often as its group was drawn."""
    return draw_weights(int(numbers.max()) + 1)[:, numbers]


def resampled_precision(
    photographs: Sequence[Int64[ndarray, "2 b"]], weights: Int64[ndarray, "r n"]
) -> Float[ndarray, "r"]:
    """The average precision of each resample; NaN where it drew no lesion."""
    stacked = np.stack(photographs).astype(float)
    lesion, background = (weights @ stacked[:, kind, ::-1] for kind in (0, 1))
    true, called = np.cumsum(lesion, axis=1), np.cumsum(lesion + background, axis=1)
    positives = true[:, -1]
    total = (lesion * true / np.maximum(called, 1)).sum(axis=1)
    return np.divide(total, positives, out=np.full(len(weights), np.nan), where=positives > 0)


def interval(values: Float[ndarray, "r"]) -> Interval:
    """Percentile interval of a resampled figure, without the resamples that have none."""
    known = values[~np.isnan(values)]
    low, high = np.quantile(known, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Interval(float(low), float(high), float((known > 0).mean()))


def verdict(difference: Interval, groups: int) -> str:
    """What the interval of a difference over so many groups of photographs says of "the first is better"."""
    if groups < FEWEST:
        return "cannot be told"
    if difference.low > 0:
        return "holds"
    return "does not" if difference.high < 0 else "cannot be told"
