"""Intervals and verdicts on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from ma_cluster.evaluation.figures import (
    Interval,
    draw_groups,
    draw_weights,
    group_numbers,
    interval,
    resampled_precision,
    verdict,
)
from ma_cluster.evaluation.scoring import PixelCounts, average_precision, coarse


def photograph(rng: np.random.Generator, skill: float) -> PixelCounts:
    """A map of 20,000 pixels, one in fifty lesion; `skill` parts them, and half of the scores are close to 0 or 1."""
    truth = rng.random(20_000) < 0.02
    odds = rng.normal(0, 3, truth.shape) - 5 + truth * skill * rng.gamma(2, 1, truth.shape)
    return PixelCounts.of((1 / (1 + np.exp(-odds))).astype(np.float32), truth)


def photographs(skill: float, seed: int, count: int = 12) -> list[PixelCounts]:
    rng = np.random.default_rng(seed)
    return [photograph(rng, skill) for _ in range(count)]


@pytest.mark.parametrize("skill", [0.5, 2.0, 4.0, 8.0])
def test_coarse_bins_move_the_average_precision_by_less_than_a_thousandth(skill: float) -> None:
    counts = photographs(skill, seed=1)
    once = np.ones((1, len(counts)), np.int64)
    (ours,) = resampled_precision([coarse(each) for each in counts], once)
    assert ours == pytest.approx(average_precision(sum(counts[1:], counts[0])), abs=1e-3)


def test_a_resample_counts_a_photograph_as_often_as_it_was_drawn() -> None:
    counts = photographs(3.0, seed=2, count=3)
    (ours,) = resampled_precision([coarse(each) for each in counts], np.array([[2, 0, 1]]))
    assert ours == pytest.approx(average_precision(counts[0] + counts[0] + counts[2]), abs=1e-3)


def test_each_resample_draws_as_many_photographs_as_there_are_and_the_same_again() -> None:
    weights = draw_weights(7, resamples=50, seed=3)
    assert (weights.sum(axis=1) == 7).all()
    assert (weights == draw_weights(7, resamples=50, seed=3)).all()
    assert (weights != draw_weights(7, resamples=50, seed=4)).any()


def test_photographs_of_one_group_are_drawn_together_and_those_without_alone() -> None:
    numbers = group_numbers(["eve", "", "bob", "eve", ""])
    assert numbers.tolist() == [0, 1, 2, 0, 3]
    weights = draw_groups(numbers)
    assert (weights[:, 0] == weights[:, 3]).all() and (weights[:, 1] != weights[:, 4]).any()
    assert (weights[:, [0, 1, 2, 4]].sum(axis=1) == 4).all()


@pytest.mark.parametrize("name", ["", "everybody"])
def test_without_groups_that_differ_photographs_are_drawn(name: str) -> None:
    assert (draw_groups(group_numbers([name] * 7)) == draw_weights(7)).all()


def test_copies_of_one_eye_make_nothing_surer() -> None:
    counts = [coarse(each) for each in photographs(3.0, seed=2, count=6)]
    once = interval(resampled_precision(counts, draw_groups(group_numbers([""] * 6))))
    names = [f"eye {number}" for number in range(6)] * 4
    copies = interval(resampled_precision(counts * 4, draw_groups(group_numbers(names))))
    assert (copies.low, copies.high) == pytest.approx((once.low, once.high))


def test_a_clear_winner_holds_and_its_mirror_does_not() -> None:
    weights = draw_weights(12)
    good, poor = ([coarse(each) for each in photographs(skill, seed=5)] for skill in (5.0, 2.0))
    difference = resampled_precision(good, weights) - resampled_precision(poor, weights)
    assert verdict(interval(difference), 12) == "holds"
    assert interval(difference).above_zero == 1
    assert verdict(interval(-difference), 12) == "does not"


def test_of_two_that_are_the_same_nothing_can_be_told() -> None:
    weights = draw_weights(12)
    counts = [coarse(each) for each in photographs(4.0, seed=6)]
    same = interval(resampled_precision(counts, weights) - resampled_precision(counts, weights))
    assert (same.low, same.high, same.above_zero) == (0, 0, 0)
    assert verdict(same, 12) == "cannot be told"
    other = [coarse(each) for each in photographs(4.0, seed=7)]
    difference = interval(resampled_precision(counts, weights) - resampled_precision(other, weights))
    assert verdict(difference, 12) == "cannot be told"


def test_of_few_photographs_nothing_can_be_told() -> None:
    assert verdict(Interval(0.1, 0.2, 1.0), 4) == "cannot be told"
    assert verdict(Interval(0.1, 0.2, 1.0), 5) == "holds"


def test_resamples_without_a_lesion_have_no_figure() -> None:
    healthy = PixelCounts.of(np.array([0.5, 0.25], np.float32), np.zeros(2, bool))
    sick = PixelCounts.of(np.array([0.5, 0.25], np.float32), np.array([True, False]))
    drawn = resampled_precision([coarse(healthy), coarse(sick)], np.array([[2, 0], [1, 1], [0, 2]]))
    assert np.isnan(drawn[0])
    assert drawn[1:].tolist() == [0.5, 1.0]
    assert (interval(drawn).low, interval(drawn).high) == (pytest.approx(0.5, abs=0.02), pytest.approx(1, abs=0.02))
