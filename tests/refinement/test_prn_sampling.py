"""Where triplets come from: anchors and positives on lesions, negatives where the config says, far from any lesion."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ma_cluster.config import Negatives, PrnConfig, tiny
from ma_cluster.errors import UsageError
from ma_cluster.images.annotated import Annotated
from ma_cluster.refinement.prn_training import TripletCuts

CONFIG = replace(tiny().prn, negative_margin_px=5)


def photograph(lesion: bool) -> Annotated:
    mask = np.zeros((64, 64), bool)
    mask[30:34, 20:24] = lesion
    return Annotated(np.full((64, 64, 3), 128, np.uint8), np.ones((64, 64), bool), mask)


WITH, WITHOUT = photograph(lesion=True), photograph(lesion=False)
MIXED = [WITHOUT, WITH, WITHOUT, WITH]


def negatives(config: PrnConfig) -> np.ndarray:
    cuts = TripletCuts(MIXED, config, seed=1)
    return cuts.plain(np.arange(cuts.healthy)).centres


@pytest.mark.parametrize(("source", "images"), [("both", [0, 1, 2, 3]), ("regions", [1, 3]), ("photographs", [0, 2])])
def test_negatives_come_from_the_photographs_asked_for(source: Negatives, images: list[int]) -> None:
    centres = negatives(replace(CONFIG, negatives=source))
    assert len(centres) == len(images) * CONFIG.healthy_per_image
    assert np.unique(centres[:, 0]).tolist() == images


def test_negatives_keep_their_distance_from_lesions() -> None:
    centres = negatives(replace(CONFIG, negatives="regions", healthy_per_image=500))
    off_rows = np.maximum(30 - centres[:, 1], centres[:, 1] - 33)
    off_cols = np.maximum(20 - centres[:, 2], centres[:, 2] - 23)
    assert np.hypot(np.maximum(off_rows, 0), np.maximum(off_cols, 0)).min() > 5


def test_negatives_come_from_what_a_hypothesis_network_proposes() -> None:
    proposed = np.zeros((64, 64), bool)
    proposed[8:16, 8:16] = proposed[28:40, 20:24] = True  # the second lies on a lesion
    asked, unasked = replace(WITH, proposed=proposed), replace(WITH, proposed=np.zeros((64, 64), bool))
    cuts = TripletCuts([asked, unasked], replace(CONFIG, negatives="regions", healthy_per_image=500), seed=1)
    image, row, col = cuts.plain(np.arange(cuts.healthy)).centres.T
    assert proposed[row[image == 0], col[image == 0]].all() and row[image == 0].max() < 16
    assert len(np.unique(row[image == 1])) > 50  # where nothing is suspected any place will do


def test_anchors_and_positives_lie_on_lesions() -> None:
    cuts = TripletCuts(MIXED, CONFIG, seed=1).of_step(0, np.arange(CONFIG.triplets))
    image, row, col = cuts.centres[: 2 * CONFIG.triplets].T
    assert all(MIXED[i].lesion[r, c] for i, r, c in zip(image, row, col, strict=True))


def test_a_source_that_the_data_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="photographs"):
        TripletCuts([WITH, WITH], replace(CONFIG, negatives="photographs"), seed=1)


def test_triplets_are_a_function_of_seed_step_and_negatives():
    ids = np.arange(CONFIG.triplets)
    first, second = (TripletCuts(MIXED, CONFIG, seed=3).of_step(5, ids) for _ in range(2))
    assert np.array_equal(first.centres, second.centres) and np.array_equal(first.symmetries, second.symmetries)
    other = TripletCuts(MIXED, CONFIG, seed=3).of_step(6, ids)
    assert not np.array_equal(first.centres, other.centres)
    assert np.array_equal(first.centres[2 * len(ids) :], other.centres[2 * len(ids) :])  # the negatives given
