"""The photograph's own answer, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from ma_cluster.config import GradingConfig
from ma_cluster.errors import BundleError, Triage
from ma_cluster.lesions.findings import check_grading, image_score, photograph_features, triage

CONFIG = GradingConfig(features=("a", "b"), mean=(1.0, 0.0), scale=(2.0, 0.5), weights=(1.0, -0.5), bias=0.5)


def test_each_kind_of_lesion_is_measured_within_the_field_of_view() -> None:
    maps = np.zeros((2, 3, 4), np.float32)
    maps[0] = [[0.9, 0.1, 0.1, 0.6], [0.1, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1]]
    fov = np.ones((3, 4), bool)
    found = photograph_features(maps, fov)
    assert {name.partition("_")[0] for name in found} == {"MA", "HE"}
    assert found["MA_largest"] == pytest.approx(math.log(9), abs=1e-5)
    assert found["MA_mean"] == pytest.approx(math.log(2.5 / 12), abs=1e-5)
    assert found["MA_count"] == pytest.approx(math.log(3))
    fov[0, 0] = False
    assert photograph_features(maps * fov, fov)["MA_largest"] == pytest.approx(math.log(1.5), abs=1e-5)


def test_certainty_and_nothing_at_all_are_finite() -> None:
    for value in (0.0, 1.0):
        found = photograph_features(np.full((4, 2, 2), value, np.float32), np.ones((2, 2), bool))
        assert len(found) == 12 and all(map(math.isfinite, found.values()))


def test_what_the_judge_says_takes_the_place_of_peaks() -> None:
    maps, fov = np.full((2, 3, 4), 0.1, np.float32), np.ones((3, 4), bool)
    found = photograph_features(maps, fov, np.array([0.9, 0.6, 0.3, 0.1], np.float32))
    assert found.keys() == {"MA_mean", "HE_mean", "judged_surest", "judged_sum", "judged_sure"}
    assert found["judged_surest"] == pytest.approx(math.log(1.5), abs=1e-5)
    assert found["judged_sum"] == pytest.approx(math.log(2.9))
    assert found["judged_sure"] == pytest.approx(math.log(2))
    assert all(map(math.isfinite, photograph_features(maps, fov, np.zeros(0, np.float32)).values()))


def test_the_score_is_the_logistic_of_the_weighted_features() -> None:
    odds = 0.5 + 1.0 * (3.0 - 1.0) / 2.0 - 0.5 * 1.0 / 0.5
    assert image_score({"a": 3.0, "b": 1.0, "unused": 9.0}, CONFIG) == pytest.approx(1 / (1 + math.exp(-odds)))
    assert 0 <= image_score({"a": -1e9, "b": 0.0}, CONFIG) < 1e-9 < image_score({"a": 1e9, "b": 0.0}, CONFIG) <= 1


@pytest.mark.parametrize(
    ("lesions", "score", "gradable", "expected"),
    [
        (3, 0.2, True, Triage.NONE),  # the score decides, where there is one
        (0, 0.6, True, Triage.REFER),
        (0, 0.6, False, Triage.REFER),  # signs that are seen count on a poor photograph, too
        (0, 0.2, False, Triage.UNGRADABLE),
        (1, None, True, Triage.REFER),
        (1, None, False, Triage.REFER),
        (0, None, True, Triage.NONE),
        (0, None, False, Triage.UNGRADABLE),
    ],
)
def test_what_is_to_be_done_with_a_photograph(
    lesions: int, score: float | None, gradable: bool, expected: Triage
) -> None:
    assert triage(lesions, score, 0.6, gradable=gradable) is expected


def test_a_grading_of_features_that_the_network_does_not_give_is_refused() -> None:
    grading = replace(CONFIG, features=("MA_largest", "HE_largest"))
    check_grading(grading, kinds=2, judged=False)
    with pytest.raises(BundleError, match="grading is of HE_largest, which"):
        check_grading(grading, kinds=1, judged=False)
