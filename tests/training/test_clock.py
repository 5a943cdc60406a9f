"""The clock of a run by minutes, on made-up time."""

from __future__ import annotations

from itertools import pairwise

import pytest

from ma_cluster.training.loop import Clock

STEP_S = 0.5


def run(minutes: float, reading_s: float, validation_s: float) -> tuple[list[float], list[float]]:
    """What is spent at each step, and when each validation ends."""
    now = 1000.0
    clock, spent, validated = Clock(minutes, lambda: now), list[float](), list[float]()
    now += reading_s
    while not clock.over:
        with clock.epoch():
            over = False
            while not over:
                spent.append(clock.spent)
                now += STEP_S
                over = clock.epoch_over
        now += validation_s
        clock.rested()
        validated.append(now - 1000)
    return spent, validated


@pytest.mark.parametrize("minutes", [2.0, 3.2, 5.9, 8.3])
@pytest.mark.parametrize("validation_s", [2.0, 12.0, 29.0])
def test_the_last_validation_ends_in_time_and_the_first_comes_early(minutes: float, validation_s: float) -> None:
    _, validated = run(minutes, 25.0, validation_s)
    assert validated[0] <= 25 + 25 + STEP_S + validation_s or minutes == 2  # too short to be broken
    assert 60 * minutes - 31 <= validated[-1] <= 60 * minutes + STEP_S
    epochs = [after - before - validation_s for before, after in pairwise(validated)]
    assert all(seconds >= 59 for seconds in epochs[1:])


@pytest.mark.parametrize("minutes", [3.2, 5.9, 8.3])
def test_the_time_that_is_spent_runs_from_0_to_1_without_a_leap(minutes: float) -> None:
    spent, _ = run(minutes, 60.0, 12.0)
    assert spent[0] == 0 and spent[-1] > 0.99
    steps = [after - before for before, after in pairwise(spent)]
    assert min(steps) > -0.01 and max(steps) < 0.1  # a validation that is shorter than reckoned gives time back


def test_without_a_limit_no_time_is_spent() -> None:
    clock = Clock()
    with clock.epoch():
        assert (clock.spent, clock.over, clock.epoch_over) == (0.0, False, False)
    clock.rested()
    assert not clock.over
