"""Masks against masks, pixels and lesions counted; grades against grades, beyond chance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import cohen_kappa_score

from ma_cluster.evaluation.agreement import Agreement, agree, kappa

PAIRS = arrays(np.bool_, (2, 6, 7))


def mask(*rows: str) -> np.ndarray:
    return np.array([[place == "#" for place in row] for row in rows])


def test_a_touched_lesion_is_found_and_an_untouched_call_is_false() -> None:
    called = mask(
        "##....",
        "......",
        "....#.",
    )
    reference = mask(
        ".##...",
        "......",
        "#.....",
    )
    found = agree(called, reference)
    assert (found.called_px, found.reference_px, found.both_px) == (3, 3, 1)
    assert (found.reference_lesions, found.found_lesions, found.false_lesions) == (2, 1, 1)
    assert (found.precision, found.recall, found.f1, found.sensitivity) == (1 / 3, 1 / 3, 1 / 3, 1 / 2)


@given(PAIRS)
def test_swapping_masks_swaps_precision_and_recall_of_lesions_and_pixels(pair: np.ndarray) -> None:
    one, other = agree(pair[0], pair[1]), agree(pair[1], pair[0])
    assert (one.called_px, one.reference_px, one.both_px) == (other.reference_px, other.called_px, other.both_px)
    assert one.f1 == other.f1
    assert one.reference_lesions - one.found_lesions == other.false_lesions


@given(PAIRS)
def test_counts_of_photographs_add_up(pair: np.ndarray) -> None:
    beside = np.zeros((6, 1), bool)  # so that lesions of the two do not touch
    whole = agree(np.hstack([pair[0], beside, pair[1]]), np.hstack([pair[1], beside, pair[0]]))
    parts = agree(pair[0], pair[1]) + agree(pair[1], pair[0]) + Agreement(photographs=-1)
    assert whole == parts


@given(PAIRS)
def test_the_f1_of_lesions_is_the_same_from_both_sides(pair: np.ndarray) -> None:
    one, other = agree(pair[0], pair[1]), agree(pair[1], pair[0])
    assert one.lesion_f1 == pytest.approx(other.lesion_f1)
    assert agree(pair[0], pair[0]).lesion_f1 == 1


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30), st.booleans())
def test_kappa_is_that_of_scikit_learn(pairs: list[tuple[int, int]], quadratic: bool) -> None:
    one, other = zip(*pairs, strict=True)
    found = kappa(one, other, 5, quadratic=quadratic)
    if len(set(one) | set(other)) == 1:
        assert found is None
    else:
        weights = "quadratic" if quadratic else None
        assert found == pytest.approx(cohen_kappa_score(one, other, labels=range(5), weights=weights))
