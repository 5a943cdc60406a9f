"""Photographs of several evaluations as one, as of five folds, and two models on the same photographs.

photographs.parquet keeps of each photograph what can be added up and drawn again; two evaluations are paired by the
digests of photographs and masks, whatever their order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int64
from numpy import ndarray

from ma_cluster.errors import UsageError
from ma_cluster.evaluation.figures import (
    DECIMALS,
    Interval,
    draw_groups,
    group_numbers,
    interval,
    resampled_precision,
    verdict,
)
from ma_cluster.evaluation.scoring import RATES, LesionCounts, average_precision, fine
from ma_cluster.evaluation.tally import Photograph, RowCounts, Tally
from ma_cluster.storage.parquet import from_parquet, to_parquet

PHOTOGRAPHS = "photographs.parquet"
"""The file of an evaluation that holds them."""


def encode_photographs(photographs: Sequence[Photograph]) -> bytes:
    """photographs.parquet: a row for each photograph, `rows` with the counts of each row of the table.

    A group, whose name may be a patient's, is called by the digest of one of its photographs. One name for all, as of a
    data set, is that of no group: beside another evaluation's it would tell the two apart, not the photographs.
    """
    called = {each.group: each.digest for each in sorted(photographs, key=lambda each: each.digest, reverse=True)}
    annotated = {each.group for each in photographs if each.pixels}
    if len(annotated) == 1:
        called |= dict.fromkeys(annotated, "")
    values = [
        _to_values(photograph) | {"group": photograph.group and called[photograph.group]} for photograph in photographs
    ]
    return to_parquet(pa.Table.from_pylist(values, _SCHEMA))


def decode_photographs(data: bytes) -> list[Photograph]:
    """What `encode_photographs` wrote."""
    return [_from_values(values) for values in from_parquet(data).to_pylist()]


def pool(photographs: Iterable[Photograph]) -> Tally:
    """The tally of these photographs, pixels by coarse score bins; without examples.

    Raises:
        UsageError: one whose pixels count was looked at twice; healthy ones may be in each fold.
    """
    listed = list(photographs)
    annotated = [photograph for photograph in listed if photograph.pixels]
    if len({photograph.digest for photograph in annotated}) < len(annotated):
        raise UsageError("a photograph is in more than one of the evaluations; pool those of different photographs")
    common = set.intersection(*({*photograph.pixels} for photograph in annotated)) if annotated else set()
    rows = {}
    for name in [name for name in (annotated[0].pixels if annotated else ()) if name in common]:
        pixels = sum((photograph.pixels[name] for photograph in annotated[1:]), annotated[0].pixels[name])
        lesions = [photograph.lesions[name] for photograph in annotated]
        rows[name] = RowCounts(fine(pixels), sum(lesions[1:], lesions[0]))
    return Tally(rows, tuple(listed))


def paired_differences(ours: Tally, theirs: Tally) -> list[dict[str, Any]]:
    """Of each row that both have: how much more ours gives, with the interval over photographs drawn again.

    Raises:
        UsageError: they are not of the same photographs and masks, or have no row in common.
    """
    pairs = _paired(ours, theirs)
    rows = [name for name in ours.rows if name in theirs.rows]
    if not rows:
        raise UsageError("the evaluations have no row in common; `evaluate --rows` chooses them")
    groups = group_numbers([mine.group or its.group for mine, its in pairs])
    weights, independent = draw_groups(groups), int(groups.max()) + 1
    found = []
    for name in rows:
        pixels = [resampled_precision([pair[side].pixels[name] for pair in pairs], weights) for side in (0, 1)]
        lesions = [resampled_sensitivity([pair[side].lesions[name] for pair in pairs], weights) for side in (0, 1)]
        whole = [average_precision(tally.rows[name].pixels) for tally in (ours, theirs)]
        once = np.ones((1, len(pairs)), np.int64)
        froc = [float(resampled_sensitivity([pair[side].lesions[name] for pair in pairs], once)[0]) for side in (0, 1)]
        for figure, (own, other), (mine, its) in (
            ("average_precision", whole, pixels),
            ("froc_mean", froc, lesions),
        ):
            bounds = interval(mine - its)
            found.append({"row": name, "figure": figure, "ours": own, "theirs": other} | _said(bounds, independent))
    return [
        {key: round(value, DECIMALS) if isinstance(value, float) else value for key, value in each.items()}
        for each in found
    ]


def resampled_sensitivity(photographs: Sequence[LesionCounts], weights: Int64[ndarray, "r n"]) -> Float[ndarray, "r"]:
    """The mean sensitivity at `RATES` of each resample, as `sensitivity_at` reads one."""
    found, false = (
        weights @ np.stack([getattr(counts, kind) for counts in photographs]) for kind in ("found", "false")
    )
    lesions = np.maximum(weights @ np.array([counts.lesions for counts in photographs]), 1)
    drawn = weights.sum(axis=1)[:, None]
    rates = np.maximum.accumulate(false[:, ::-1], axis=1)[:, ::-1] / drawn
    sensitivity = found / lesions[:, None]
    return np.mean([np.where(rates <= rate, sensitivity, 0).max(axis=1) for rate in RATES], axis=0)


def _paired(ours: Tally, theirs: Tally) -> list[tuple[Photograph, Photograph]]:
    mine, its = ({each.digest: each for each in tally.photographs if each.pixels} for tally in (ours, theirs))
    if mine.keys() != its.keys():
        alone = len(mine.keys() - its.keys()), len(its.keys() - mine.keys())
        raise UsageError(
            f"the evaluations are of different photographs or masks: {alone[0]} in the first alone, {alone[1]} in the "
            "second; evaluate both models on the same"
        )
    return [(mine[digest], its[digest]) for digest in sorted(mine)]


def _said(bounds: Interval, groups: int) -> dict[str, Any]:
    return {"ci_low": bounds.low, "ci_high": bounds.high, "better": verdict(bounds, groups)}


_COUNTS = pa.list_(pa.int64())
_ROW = pa.struct(
    {
        "name": pa.string(),
        "lesion_pixels": _COUNTS,
        "background_pixels": _COUNTS,
        "lesions": pa.int64(),
        "found": _COUNTS,
        "false": _COUNTS,
    }
)
_SCHEMA = pa.schema(
    {
        "number": pa.int64(),
        "digest": pa.string(),
        "group": pa.string(),
        "healthy": pa.bool_(),
        "called": pa.int64(),
        "found": pa.int64(),
        "false": pa.int64(),
        "false_on": pa.string(),
        "rows": pa.list_(_ROW),
    }
)


def _to_values(photograph: Photograph) -> dict[str, Any]:
    plain = {name: getattr(photograph, name) for name in ("number", "digest", "healthy", "called", "found", "false")}
    rows = [
        {
            "name": name,
            "lesion_pixels": pixels[0],
            "background_pixels": pixels[1],
            "lesions": photograph.lesions[name].lesions,
            "found": photograph.lesions[name].found,
            "false": photograph.lesions[name].false,
        }
        for name, pixels in photograph.pixels.items()
    ]
    return plain | {"false_on": json.dumps(photograph.false_on), "rows": rows}


def _from_values(values: dict[str, Any]) -> Photograph:
    rows = values.pop("rows")
    pixels = {row["name"]: np.array([row["lesion_pixels"], row["background_pixels"]], np.int64) for row in rows}
    lesions = {
        row["name"]: LesionCounts(1, row["lesions"], np.array(row["found"], np.int64), np.array(row["false"], np.int64))
        for row in rows
    }
    return Photograph(**values | {"false_on": json.loads(values["false_on"]), "pixels": pixels, "lesions": lesions})
