"""Pixel-level figures against scikit-learn, against brute force, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from ma_cluster.evaluation.scoring import (
    BINS,
    PixelCounts,
    at_threshold,
    auc_pr_33,
    average_precision,
    best_f1,
    threshold_keeping,
)

SCORES = np.array([[1.0, 0.9, 0.75, 0.5], [0.5, 0.25, 0.1, 0.0]], np.float32)
TRUTH = np.array([[1, 0, 1, 1], [0, 0, 1, 0]], bool)
COUNTS = PixelCounts.of(SCORES, TRUTH)


@st.composite
def maps(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Scores with many ties, at least one lesion pixel and one of background."""
    size = draw(st.integers(2, 60))
    levels = draw(st.lists(st.integers(0, BINS - 1), min_size=size, max_size=size))
    truth = np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    truth[:2] = True, False
    return (np.array(levels) / (BINS - 1)).astype(np.float32), truth


@settings(deadline=None)
@given(maps())
def test_average_precision_equals_scikit_learn(case: tuple[np.ndarray, np.ndarray]) -> None:
    scores, truth = case
    assert average_precision(PixelCounts.of(scores, truth)) == pytest.approx(average_precision_score(truth, scores))


def test_average_precision_of_a_million_pixels_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random((1000, 1000)) < 0.01
    scores = np.clip(rng.beta(1, 6, truth.shape) + truth * rng.beta(2, 3, truth.shape), 0, 1).astype(np.float32)
    expected = average_precision_score(truth.ravel(), scores.ravel())
    assert average_precision(PixelCounts.of(scores, truth)) == pytest.approx(expected, abs=1e-5)


@settings(deadline=None)
@given(st.lists(maps(), min_size=1, max_size=4))
def test_counts_of_photographs_add_up(cases: list[tuple[np.ndarray, np.ndarray]]) -> None:
    total = PixelCounts(np.zeros(BINS, np.int64), np.zeros(BINS, np.int64))
    for scores, truth in cases:
        total += PixelCounts.of(scores, truth)
    together = PixelCounts.of(*(np.concatenate(parts) for parts in zip(*cases, strict=True)))
    assert (total.lesion == together.lesion).all() and (total.background == together.background).all()


def test_every_pixel_is_counted_once() -> None:
    assert (COUNTS.lesion.sum(), COUNTS.background.sum()) == (4, 4)
    assert (COUNTS.lesion[-1], COUNTS.background[0]) == (1, 1)


@pytest.mark.parametrize(
    ("threshold", "precision", "recall"),
    [
        (0.0, 4 / 8, 1.0),
        (0.1, 4 / 7, 1.0),
        (0.25, 3 / 6, 3 / 4),
        (0.5, 3 / 5, 3 / 4),
        (0.75, 2 / 3, 1 / 2),
        (1.0, 1.0, 1 / 4),
    ],
)
def test_a_pixel_is_called_from_its_very_score_on(threshold: float, precision: float, recall: float) -> None:
    found = at_threshold(COUNTS, threshold)
    assert (found.precision, found.recall) == pytest.approx((precision, recall))
    assert found.f1 == pytest.approx(2 * precision * recall / (precision + recall))


def test_the_33_threshold_area_by_hand() -> None:
    # the called pixels change after 0, 3/32, 8/32, 16/32, 24/32 and 28/32; the points between are
    # (recall, precision): (1, 1/2), (1, 4/7), (3/4, 1/2), (3/4, 3/5), (1/2, 2/3), (1/4, 1/2), (1/4, 1)
    area = 1 / 4 * (4 / 7 + 1 / 2) / 2 + 1 / 4 * (3 / 5 + 2 / 3) / 2 + 1 / 4 * (2 / 3 + 1 / 2) / 2
    assert auc_pr_33(COUNTS) == pytest.approx(area)


def test_the_33_threshold_area_equals_brute_force_on_every_score_of_its_grid() -> None:
    rng = np.random.default_rng(2)
    scores = (rng.integers(0, 33, 500) / 32).astype(np.float32)
    truth = rng.random(500) < scores * 0.6
    precision, recall = [], []
    for step in range(33):
        called = scores >= step / 32
        recall.append((called & truth).sum() / truth.sum())
        precision.append((called & truth).sum() / called.sum() if called.any() else 1.0)
    expected = -np.trapezoid(precision, recall)
    assert auc_pr_33(PixelCounts.of(scores, truth)) == pytest.approx(expected)


def test_a_perfect_map_scores_one_and_an_inverted_one_little() -> None:
    perfect = PixelCounts.of(TRUTH.astype(np.float32), TRUTH)
    assert (average_precision(perfect), best_f1(perfect).f1) == (1.0, 1.0)
    inverted = PixelCounts.of(1 - TRUTH.astype(np.float32), TRUTH)
    assert average_precision(inverted) == pytest.approx(0.5)


def test_photographs_without_lesions_score_nothing_and_break_nothing() -> None:
    healthy = PixelCounts.of(SCORES, np.zeros_like(TRUTH))
    assert average_precision(healthy) == 0
    assert (at_threshold(healthy, 0.5).recall, at_threshold(healthy, 0.5).f1) == (0, 0)


@settings(deadline=None, max_examples=40)
@given(maps())
def test_the_best_f1_is_the_best_of_all_thresholds(case: tuple[np.ndarray, np.ndarray]) -> None:
    scores, truth = case
    best = best_f1(PixelCounts.of(scores, truth))
    called = scores >= np.unique(scores)[:, None]
    f1 = 2 * (called & truth).sum(axis=1) / (called.sum(axis=1) + truth.sum())
    assert best.f1 == pytest.approx(f1.max())


@settings(deadline=None)
@given(maps(), st.floats(0.05, 1))
def test_the_kept_recall_is_reached_and_one_bin_higher_it_is_not(
    case: tuple[np.ndarray, np.ndarray], recall: float
) -> None:
    counts = PixelCounts.of(*case)
    threshold = threshold_keeping(counts, recall)
    assert at_threshold(counts, threshold).recall >= recall
    if threshold < 1:
        assert at_threshold(counts, threshold + 1 / (BINS - 1)).recall < recall
