"""The masks of a run against reference masks: pixels and lesions, counted."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis.extra.numpy import arrays

from ma_cluster.report.truth import Agreement, agree

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
