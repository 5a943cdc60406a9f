"""ROC areas, rates and subgroups of the photographs' own answers, by hand and beside scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ma_cluster.errors import Triage, UsageError
from ma_cluster.evaluation.image_figures import GradedAnswer, Scores, area, best_beside, image_figures
from ma_cluster.images.datasets import Graded


def scores(positive: list[float], negative: list[float]) -> Scores:
    score = np.array([*positive, *negative])
    truth = np.arange(len(score)) < len(positive)
    return Scores(score, truth, np.ones((1, len(score)), np.int64))


def area_of(each: Scores) -> float:
    return float(area(*each.rates(each.weights))[0])


def answer(grade: int, score: float | None, group: str = "", **columns: str) -> GradedAnswer:
    name = group or f"eye {grade} {score} {columns}"
    graded = Graded(name, f"{name}.jpg", grade, "validation", name, columns)
    if score is None:
        return GradedAnswer(graded, "", None, None, "no_fov")
    return GradedAnswer(graded, "", score, Triage.REFER if score >= 0.5 else Triage.NONE, None)


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [
        ([0.9, 0.8], [0.2, 0.1], 1.0),
        ([0.1], [0.9], 0.0),
        ([0.5, 0.5], [0.5, 0.5], 0.5),  # ties count a half
        ([0.9, 0.4], [0.6, 0.1], 0.75),  # three of four pairs are in order
        ([0.9, 0.5], [0.5, 0.1], 0.875),
    ],
)
def test_the_area_is_the_share_of_pairs_in_order(positive: list[float], negative: list[float], expected: float) -> None:
    assert area_of(scores(positive, negative)) == expected


def test_the_area_is_scikit_learns_and_so_it_is_of_a_resample() -> None:
    rng = np.random.default_rng(0)
    score, truth = rng.integers(0, 12, 60) / 12, rng.random(60) < 0.4
    weights = rng.multinomial(60, np.full(60, 1 / 60), 5)
    found = area(*Scores(score, truth, weights).rates(weights))
    for row, ours in zip(weights, found, strict=True):
        assert ours == pytest.approx(roc_auc_score(np.repeat(truth, row), np.repeat(score, row)))


def test_rates_at_thresholds_from_above_all_scores_down() -> None:
    each = scores([0.9, 0.5], [0.5, 0.1])
    sensitivity, others = each.rates(each.weights)
    assert (sensitivity[0].tolist(), others[0].tolist()) == ([0, 0.5, 1, 1], [0, 0, 0.5, 1])
    assert best_beside(sensitivity, 1 - others, 0.5)[0] == 1
    assert best_beside(sensitivity, 1 - others, 0.51)[0] == 0.5
    assert best_beside(1 - others, sensitivity, 0.6)[0] == 0.5


def test_a_score_at_the_operating_point_is_called() -> None:
    each = scores([0.9, 0.5], [0.5, 0.1, 0.4, 0.3])
    sensitivity, specificity = each.called(each.weights, 0.5)
    assert (sensitivity[0], specificity[0]) == (1, 0.75)
    assert each.called(each.weights, 0.6)[0][0] == 0.5


def test_a_resample_without_photographs_of_a_kind_has_no_figures() -> None:
    each = scores([0.9, 0.5], [0.5, 0.1])
    none = np.array([[0, 0, 2, 2]])
    assert np.isnan(area(*each.rates(none))[0]) and np.isnan(each.called(none, 0.5)[0][0])
    assert each.called(none, 0.5)[1][0] == 0.5


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    healthy = [answer(0, 0.01 * n, camera="A" if n % 2 else "B", age=str(20 + n)) for n in range(12)]
    mild = [answer(1, score, camera="A", age="") for score in (0.05, 0.6)]
    moderate = [answer(2, 0.5 + 0.04 * n, camera="A" if n % 2 else "B", age=str(50 + n)) for n in range(6)]
    return image_figures([*healthy, *mild, *moderate, answer(4, None, camera="A")], refer_at=0.5)


def test_each_grade_is_told_from_none(figures: dict[str, Any]) -> None:
    assert (figures["images"], figures["unscored"]) == (21, {"no_fov": 1})
    assert figures["grades"] == {"0": 12, "1": 2, "2": 6}
    assert figures["triage"]["1"] == {"none": 1, "refer": 1, "ungradable": 0}
    comparisons = figures["comparisons"]
    assert list(comparisons) == ["none_against_any", "none_against_1", "none_against_2", "below_2_against_2_up"]
    assert comparisons["none_against_2"]["area"] == {"value": 1.0, "ci_low": 1.0, "ci_high": 1.0}
    mild = comparisons["none_against_1"]
    assert (mild["with"], mild["without"]) == (2, 12)
    assert mild["area"]["value"] == pytest.approx((5.5 / 12 + 1) / 2, abs=1e-4)
    assert mild["sensitivity"]["value"] == 0.5 and mild["specificity"]["value"] == 1
    assert mild["sensitivity_at_specificity"]["0.95"]["value"] == 0.5
    for figure in (comparisons["none_against_any"]["area"], mild["area"]):
        assert figure["ci_low"] <= figure["value"] <= figure["ci_high"]


def test_columns_are_subgroups_by_value_or_by_thirds(figures: dict[str, Any]) -> None:
    assert list(figures["subgroups"]["camera"]) == ["A", "B"]
    by_camera = figures["subgroups"]["camera"]
    assert by_camera["A"]["none_against_any"]["with"] + by_camera["B"]["none_against_any"]["with"] == 8
    thirds = figures["subgroups"]["age"]
    assert [of["none_against_any"]["with"] + of["none_against_any"]["without"] for of in thirds.values()] == [6, 6, 6]
    assert "area" not in thirds["<= 25.6667"]["none_against_any"]  # all of them are healthy


def test_a_column_of_many_texts_is_left_out() -> None:
    answers = [answer(n % 2, n / 20, note=f"note {n}") for n in range(20)]
    assert image_figures(answers, 0.5)["columns_left_out"] == ["note"]


def test_photographs_of_one_patient_are_drawn_together() -> None:
    def width(group: Any) -> float:
        rng = np.random.default_rng(1)
        answers = [answer(n % 2, float(rng.random()), group=group(n)) for n in range(40)]
        figure = image_figures(answers, 0.5)["comparisons"]["none_against_any"]["specificity"]
        return float(figure["ci_high"] - figure["ci_low"])

    assert width(lambda n: f"patient {n // 10}") != width(lambda n: f"eye {n}")
    once = image_figures([answer(n, float(n), group="both") for n in (0, 1, 0, 1)], 0.5)
    assert once["comparisons"]["none_against_any"]["area"]["ci_low"] == 1


def test_calibration_is_told_by_fifths(figures: dict[str, Any]) -> None:
    fifths = figures["calibration"]["fifths"]
    assert [each["images"] for each in fifths] == [4, 4, 4, 4, 4]
    assert (fifths[0]["share"], fifths[-1]["share"]) == (0, 1)
    assert 0 < figures["calibration"]["brier"] < 0.25


def test_photographs_of_one_kind_alone_are_refused() -> None:
    for grade in (0, 2):
        with pytest.raises(UsageError, match="with and without retinopathy"):
            image_figures([answer(grade, 0.3), answer(grade, 0.7), answer(2 - grade, None)], 0.5)
