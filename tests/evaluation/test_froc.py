"""Lesion-level matching on arrays small enough to write out, and against the plain definition."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ma_cluster.evaluation.scoring import RATES, THRESHOLDS, LesionCounts, label, sensitivity_at

PICTURE = """
    9 9 . . . . 7 .
    . . . . . . 7 .
    . . . 5 5 . . .
    . . 5 . . . . 8
    . . . . . . . .
    3 3 . 6 . . 4 4
"""
REFERENCE = """
    . x . . . . . .
    . x . . . . . .
    . . . . x . . .
    . . . . . . . .
    . . . . . . . .
    x x . . . x . x
"""


def drawn(text: str) -> np.ndarray:
    """A digit d is a probability of d / 10, a dot 0."""
    rows = [line.split() for line in text.strip().splitlines()]
    return np.array([[0 if cell == "." else int(cell) / 10 for cell in row] for row in rows], np.float32)


def mask(text: str) -> np.ndarray:
    return np.array([[cell == "x" for cell in line.split()] for line in text.strip().splitlines()])


def at(counts: LesionCounts, threshold: float) -> tuple[int, int]:
    """Lesions found and false components at the lowest threshold counted that is not below `threshold`."""
    place = int(np.searchsorted(THRESHOLDS, threshold))
    return int(counts.found[place]), int(counts.false[place])


@pytest.mark.parametrize(
    ("threshold", "found", "false"),
    [
        (0.91, 0, 0),
        (0.85, 1, 0),  # the 9s touch the first lesion
        (0.75, 1, 1),  # the 8 touches nothing
        (0.65, 1, 2),  # nor do the 7s
        (0.55, 1, 3),  # the 6 is beside the fifth lesion, not on it
        (0.45, 2, 3),  # the 5s meet at a corner: one component, which overlaps the second lesion
        (0.35, 3, 3),
        (0.25, 4, 3),
    ],
)
def test_a_lesion_is_found_by_one_pixel_and_a_component_without_overlap_is_false(
    threshold: float, found: int, false: int
) -> None:
    counts = LesionCounts.of(drawn(PICTURE), label(mask(REFERENCE)))
    assert counts.lesions == 5
    assert at(counts, threshold) == (found, false)


def test_two_lesions_under_one_component_are_both_found() -> None:
    counts = LesionCounts.of(
        np.full((3, 9), 0.5, np.float32), label(mask("x . . . x . . . .\n" + ". . . . . . . . .\n" * 2))
    )
    assert at(counts, 0.4) == (2, 0)


def test_components_that_run_together_are_one() -> None:
    apart = drawn("9 . 9 . 9\n. . . . .")
    joined = drawn("9 2 9 2 9\n. . . . .")
    nothing = label(np.zeros((2, 5), bool))
    assert [at(LesionCounts.of(apart, nothing), t)[1] for t in (0.1, 0.5)] == [3, 3]
    counts = LesionCounts.of(joined, nothing)
    assert [at(counts, t)[1] for t in (0.1, 0.5)] == [1, 3]
    assert counts.false_per_photograph[np.searchsorted(THRESHOLDS, 0.1)] == 3


def plain(probability: np.ndarray, truth: np.ndarray) -> tuple[list[int], list[int]]:
    """The definition, threshold by threshold, on the whole array."""
    lesions, reference = cv2.connectedComponents(truth.astype(np.uint8), connectivity=8)
    found, false = [], []
    for threshold in THRESHOLDS:
        called = probability >= threshold
        count, labels = cv2.connectedComponents(called.astype(np.uint8), connectivity=8)
        found.append(sum((called & (reference == n)).any() for n in range(1, lesions)))
        false.append(sum(not (truth & (labels == n)).any() for n in range(1, count)))
    return found, false


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from([0.3, 0.9, 0.98]))
def test_counts_equal_the_plain_definition_on_random_maps(seed: int, empty: float) -> None:
    rng = np.random.default_rng(seed)
    probability = rng.random((24, 31)).astype(np.float32) * (rng.random((24, 31)) > empty)
    truth = rng.random((24, 31)) < 0.03
    counts = LesionCounts.of(probability, label(truth))
    found, false = plain(probability, truth)
    assert counts.found.tolist() == found
    assert counts.false.tolist() == false


def test_counts_of_photographs_add_up_and_rates_are_of_a_photograph() -> None:
    probability, labels = drawn(PICTURE), label(mask(REFERENCE))
    healthy = LesionCounts.of(drawn("9 . .\n. . ."), label(np.zeros((2, 3), bool)))
    both = LesionCounts.of(probability, labels) + healthy
    assert (both.photographs, both.lesions) == (2, 5)
    assert at(both, 0.25) == (4, 4)
    assert sensitivity_at(both, 1 / 8) == 0  # the healthy one's 9 is false from the first threshold on
    assert sensitivity_at(both, 1 / 2) == 1 / 5
    assert sensitivity_at(both, 2.0) == 4 / 5


def test_a_map_that_is_nowhere_called_finds_nothing_and_invents_nothing() -> None:
    counts = LesionCounts.of(np.zeros((5, 5), np.float32), label(np.eye(5, dtype=bool)))
    assert not counts.found.any()
    assert not counts.false.any()
    assert [sensitivity_at(counts, rate) for rate in RATES] == [0.0] * 7


def test_low_thresholds_at_which_all_runs_together_do_not_count_as_better() -> None:
    probability = np.full((9, 9), 0.1, np.float32)
    probability[::2, ::2] = 0.9  # 25 false components above 0.1, a single true one below
    truth = np.zeros((9, 9), bool)
    truth[1, 1] = True
    counts = LesionCounts.of(probability, label(truth))
    assert counts.false[0] == 0
    assert counts.found[0] == 1
    assert sensitivity_at(counts, 8.0) == 0
