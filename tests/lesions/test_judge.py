"""Candidates, what is measured on them, and a judge that learns from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ma_cluster.errors import BundleError, UsageError
from ma_cluster.lesions.judge import (
    Candidates,
    Judge,
    around,
    build_judge,
    check_judge,
    find_candidates,
    fit_judge,
    judge_candidates,
    judgements,
    measure,
)

SHAPE = (60, 80)
FOV = np.ones(SHAPE, bool)


def spots(*places: tuple[int, int, float]) -> np.ndarray:
    """A map with a spot of three by three pixels at each (row, col, probability), surest in the middle."""
    found = np.zeros(SHAPE, np.float32)
    for row, col, probability in places:
        found[row - 1 : row + 2, col - 1 : col + 2] = probability * 0.8
        found[row, col] = probability
    return found


def photograph(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(90, 160, (*SHAPE, 3)).astype(np.uint8)


def test_a_candidate_is_the_peak_of_a_spot_however_faint() -> None:
    found = find_candidates(spots((10, 20, 0.9), (40, 60, 0.05), (30, 30, 0.02)))
    assert found.tolist() == [[10, 20], [40, 60]]


def test_two_spots_that_touch_are_two_candidates_only_where_they_are_apart() -> None:
    assert len(find_candidates(spots((20, 20, 0.9), (20, 28, 0.5)))) == 2
    assert len(find_candidates(spots((20, 20, 0.9), (20, 22, 0.5)))) == 1


def test_no_spot_no_candidate() -> None:
    assert find_candidates(np.zeros(SHAPE, np.float32)).shape == (0, 2)
    found = judge_candidates(Judge(65).eval(), np.zeros((4, *SHAPE), np.float32), photograph(), FOV)
    assert [len(each) for each in found] == [0, 0]
    assert not around(*found, SHAPE).any()


@pytest.mark.parametrize("kinds", [1, 4])
def test_measures_are_numbers_and_as_many_for_any_photograph_of_a_network(kinds: int) -> None:
    places = np.array([[10, 20], [40, 60], [0, 0]])
    for level in (0.0, 1.0):
        maps = np.stack([np.full(SHAPE, level, np.float32)] * kinds)
        found = measure(maps, photograph(), FOV, places)
        assert found.shape == (3, 29 + 9 * kinds) and np.isfinite(found).all()


def test_a_turned_photograph_has_the_same_measures() -> None:
    maps, enhanced = np.stack([spots((20, 31, 0.9)), spots((44, 50, 0.6))]), photograph()
    upright = measure(maps, enhanced, FOV, np.array([[20, 31]]))
    turned = [np.ascontiguousarray(each) for each in (maps[:, ::-1, ::-1], enhanced[::-1, ::-1], FOV)]
    assert measure(*turned, np.array([[39, 48]])) == pytest.approx(upright, rel=1e-3, abs=2e-2)


def test_a_judge_learns_from_measures_what_the_network_does_not_tell() -> None:
    rng = np.random.default_rng(0)
    measures = rng.normal(5, 3, (2000, 6)).astype(np.float32)
    lesion = measures[:, 2] > 8
    judge = fit_judge(Candidates(measures, lesion), seed=0, steps=200)
    said = judgements(judge, measures)
    assert ((said > 0.5) == lesion).mean() > 0.97
    again = fit_judge(Candidates(measures, lesion), seed=0, steps=200)
    assert np.array_equal(judgements(again, measures), said)
    rebuilt = build_judge(judge.state_dict())
    rebuilt.load_state_dict(judge.state_dict())
    assert np.array_equal(judgements(rebuilt.eval(), measures), said)


@pytest.mark.parametrize("lesion", [True, False])
def test_candidates_of_one_kind_are_nothing_to_judge_by(lesion: bool) -> None:
    with pytest.raises(UsageError, match="nothing to judge by"):
        fit_judge(Candidates(np.zeros((9, 3), np.float32), np.full(9, lesion)), seed=0)


def test_what_is_judged_lies_around_its_candidate_and_the_higher_wins() -> None:
    class BySize(torch.nn.Module):
        """Sure of what is probable itself: the first measure is the log odds there."""

        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(1))

        def forward(self, measures: torch.Tensor) -> torch.Tensor:
            return measures[:, 0] * self.one

    maps = np.stack([spots((20, 20, 0.9), (20, 25, 0.4))])
    judged = around(*judge_candidates(BySize(), maps, photograph(), FOV), SHAPE)
    assert judged[20, 20] == judged[17, 17] == judged[23, 23] == pytest.approx(0.9, abs=1e-3)
    assert judged[20, 28] == pytest.approx(0.4, abs=1e-3)
    assert judged[20, 16] == judged[20, 29] == 0


def test_a_judge_of_another_networks_measures_is_refused() -> None:
    check_judge(Judge(65), 4)
    check_judge(None, 1)
    with pytest.raises(BundleError, match="fit the judge again"):
        check_judge(Judge(65), 1)
