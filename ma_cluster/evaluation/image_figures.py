"""The photographs' own answers against grades -> the figures of images.json: ROC, operating point, subgroups.

An answer is an image score; grade 0 is no retinopathy. Areas and rates are exact, of ranks and counts; their intervals
are over photographs drawn again with replacement, or over groups of them where the grades name such.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64
from numpy import ndarray

from ma_cluster.errors import ImageError, Triage, UsageError
from ma_cluster.evaluation.figures import DECIMALS, draw_groups, group_numbers, interval
from ma_cluster.images.datasets import Graded, read_object
from ma_cluster.lesions.detector import Detector

SPECIFICITIES = (0.8, 0.85, 0.9, 0.95)
SENSITIVITIES = (0.8, 0.9, 0.95, 0.98)
REFERABLE = 2
"""The least grade that screening programmes refer: more than mild."""
_MOST_VALUES = 10  # of a column that are groups as they are; of more the numbers are cut into thirds
_FEWEST = 2  # photographs with and without, below which a subgroup has no figures
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class GradedAnswer:
    """What became of one graded photograph."""

    graded: Graded
    digest: str
    """sha256 of its bytes."""
    score: float | None
    """Its image score; None where it could not be scored."""
    triage: Triage | None
    reason: str | None
    """Why it could not be scored."""


def answer_photograph(detector: Detector, graded: Graded) -> GradedAnswer:
    """Look at one photograph, of a model that has a grading. One that cannot be scored is an answer, too.

    Raises:
        StoreError: it cannot be read.
    """
    data = read_object(graded.image)
    digest = hashlib.sha256(data).hexdigest()
    try:
        detection = detector.segment(detector.prepare(data))
    except ImageError as error:
        return GradedAnswer(graded, digest, None, None, error.reason.value)
    assert detection.image_score is not None
    return GradedAnswer(graded, digest, detection.image_score, detection.triage, None)


@dataclass(frozen=True, slots=True)
class Scores:
    """Scored photographs, which of them have what is looked for, and how often each is in each resample."""

    score: Float[ndarray, "n"]
    positive: Bool[ndarray, "n"]
    weights: Int64[ndarray, "r n"]

    def of(self, chosen: Bool[ndarray, "n"]) -> Scores:
        """Those of some photographs."""
        return Scores(self.score[chosen], self.positive[chosen], self.weights[:, chosen])

    def rates(self, weights: Int64[ndarray, "r n"]) -> tuple[Float[ndarray, "r t"], Float[ndarray, "r t"]]:
        """Sensitivity, and the share of the others that is called, at thresholds from above all scores down to the
        least; NaN where a resample has no photograph of that kind.

        scores 0.9+ 0.5- 0.5+ 0.1-   sensitivity 0 1/2 1 1, of the others 0 0 1/2 1
        """
        order = np.argsort(-self.score, kind="stable")
        last = np.flatnonzero(np.diff(self.score[order], append=-np.inf))  # of those of one score
        found = []
        for kind in (self.positive, ~self.positive):
            counts = np.cumsum((weights * kind)[:, order], axis=1)
            called = np.concatenate([np.zeros((len(weights), 1)), counts[:, last]], axis=1)
            whole = counts[:, -1:]
            found.append(np.divide(called, whole, out=np.full(called.shape, np.nan), where=whole > 0))
        return found[0], found[1]

    def called(self, weights: Int64[ndarray, "r n"], at: float) -> tuple[Float[ndarray, "r"], Float[ndarray, "r"]]:
        """Sensitivity and specificity of calling what scores `at` or more."""
        shares = []
        for kind, right in ((self.positive, self.score >= at), (~self.positive, self.score < at)):
            whole = weights @ kind
            shares.append(
                np.divide(weights @ (kind & right), whole, out=np.full(len(weights), np.nan), where=whole > 0)
            )
        return shares[0], shares[1]


def area(sensitivity: Float[ndarray, "r t"], others: Float[ndarray, "r t"]) -> Float[ndarray, "r"]:
    """Under the ROC curve: the share of pairs, one with and one without, that are in order, ties a half."""
    return np.trapezoid(sensitivity, others, axis=1)


def best_beside(wanted: Float[ndarray, "r t"], given: Float[ndarray, "r t"], least: float) -> Float[ndarray, "r"]:
    """The largest of one rate over the thresholds at which another is `least` or more; nothing is interpolated."""
    allowed = np.where(given >= least - _ROUNDING, wanted, np.where(np.isnan(given), np.nan, 0.0))
    return np.asarray(allowed.max(axis=1))


def image_figures(answers: Sequence[GradedAnswer], refer_at: float) -> dict[str, Any]:
    """The figures of images.json.

    Args:
        answers: of all photographs.
        refer_at: the bundle's frozen operating point.

    Raises:
        UsageError: no photograph with, or none without retinopathy could be scored.
    """
    scored = [answer for answer in answers if answer.score is not None]
    grade = np.array([answer.graded.grade for answer in scored], dtype=np.int64)
    if not (grade == 0).any() or not (grade > 0).any():
        raise UsageError("it takes photographs with and without retinopathy that can be scored; check the grades")
    score = np.array([answer.score for answer in scored], dtype=np.float64)
    weights = draw_groups(group_numbers([answer.graded.group for answer in scored]))
    every = {name: (chosen, Scores(score, positive, weights)) for name, chosen, positive in _comparisons(grade)}
    columns, left_out = _columns([answer.graded.columns for answer in scored])
    asked = {name: every[name] for name in ("none_against_any", "below_2_against_2_up") if name in every}
    return {
        "images": len(answers),
        "unscored": dict(Counter(answer.reason for answer in answers if answer.reason is not None)),
        "grades": {str(g): int((grade == g).sum()) for g in np.unique(grade)},
        "triage": {str(g): _triage(scored, int(g)) for g in np.unique(grade)},
        "refer_at": refer_at,
        "comparisons": {name: _figures(scores.of(chosen), refer_at) for name, (chosen, scores) in every.items()},
        "calibration": _calibration(score, grade > 0),
        "subgroups": {
            column: {
                value: {name: _figures(scores.of(chosen & of), refer_at) for name, (chosen, scores) in asked.items()}
                for value, of in groups.items()
            }
            for column, groups in columns.items()
        },
        "columns_left_out": left_out,
    }


def _comparisons(grade: Int64[ndarray, "n"]) -> Iterator[tuple[str, Bool[ndarray, "n"], Bool[ndarray, "n"]]]:
    """Name, photographs that take part, and which of those are to be called."""
    yield "none_against_any", grade >= 0, grade > 0
    for each in np.unique(grade[grade > 0]).tolist():
        yield f"none_against_{each}", (grade == 0) | (grade == each), grade > 0
    if (grade >= REFERABLE).any():
        yield "below_2_against_2_up", grade >= 0, grade >= REFERABLE


def _figures(scores: Scores, refer_at: float) -> dict[str, Any]:
    """Of one comparison; empty but for the counts where there are too few photographs."""
    counts = {"with": int(scores.positive.sum()), "without": int((~scores.positive).sum())}
    if min(counts.values()) < _FEWEST:
        return counts
    once = np.ones((1, len(scores.score)), np.int64)
    own, drawn = ((*scores.rates(weights), *scores.called(weights, refer_at)) for weights in (once, scores.weights))

    def told(figure: Any) -> dict[str, float]:
        bounds = interval(figure(*drawn))
        return {"value": _round(figure(*own)[0]), "ci_low": _round(bounds.low), "ci_high": _round(bounds.high)}

    return {
        **counts,
        "area": told(lambda sensitivity, others, *_: area(sensitivity, others)),
        "sensitivity": told(lambda *rates: rates[2]),
        "specificity": told(lambda *rates: rates[3]),
        "sensitivity_at_specificity": {
            f"{least:g}": told(lambda found, others, *_: best_beside(found, 1 - others, least))  # noqa: B023
            for least in SPECIFICITIES
        },
        "specificity_at_sensitivity": {
            f"{least:g}": told(lambda found, others, *_: best_beside(1 - others, found, least))  # noqa: B023
            for least in SENSITIVITIES
        },
    }


def _triage(scored: Sequence[GradedAnswer], grade: int) -> dict[str, int]:
    counts = Counter(answer.triage for answer in scored if answer.graded.grade == grade)
    return {todo.value: counts[todo] for todo in Triage}


def _calibration(score: Float[ndarray, "n"], positive: Bool[ndarray, "n"]) -> dict[str, Any]:
    """Brier score, and by fifths of the photographs the mean score beside the share that has retinopathy."""
    fifths = np.array_split(np.argsort(score, kind="stable"), 5)
    return {
        "brier": _round(float(np.mean((score - positive) ** 2))),
        "fifths": [
            {"images": len(of), "mean_score": _round(score[of].mean()), "share": _round(positive[of].mean())}
            for of in fifths
            if len(of)
        ],
    }


def _columns(
    rows: Sequence[Mapping[str, str]],
) -> tuple[dict[str, dict[str, Bool[ndarray, "n"]]], list[str]]:
    """Subgroups by column and value; and the columns whose values are too many and no numbers."""
    found: dict[str, dict[str, Bool[ndarray, "n"]]] = {}
    left_out = []
    for column in dict.fromkeys(name for row in rows for name in row):
        values = np.array([row.get(column, "").strip() for row in rows])
        known = sorted(set(values.tolist()) - {""})
        if len(known) <= _MOST_VALUES:
            found[column] = {value: values == value for value in known}
        elif (numbers := _numbers(values)) is not None:
            low, high = (float(cut) for cut in np.nanquantile(numbers, [1 / 3, 2 / 3]))
            middle = (numbers > low) & (numbers <= high)
            thirds = {f"<= {low:g}": numbers <= low, f"{low:g} to {high:g}": middle, f"> {high:g}": numbers > high}
            found[column] = thirds
        else:
            left_out.append(column)
    return {column: groups for column, groups in found.items() if groups}, left_out


def _numbers(values: ndarray) -> Float[ndarray, "n"] | None:
    try:
        return np.array([float(value) if value else np.nan for value in values.tolist()])
    except ValueError:
        return None


def _round(value: float) -> float:
    return round(float(value), DECIMALS) + 0.0
