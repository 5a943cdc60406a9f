"""Losses of the patch refinement network against values worked out by hand."""

import math

import pytest
import torch

from ma_cluster.refinement.triplet import classification_loss, triplet_loss

EAST = torch.tensor([[2.0, 0.0]])
NORTH = torch.tensor([[0.0, 3.0]])
NORTH_EAST = torch.tensor([[1.0, 1.0]])


def test_a_triplet_that_holds_its_margin_costs_nothing():
    assert triplet_loss(EAST, EAST, NORTH, margin=0.2) == 0  # 0 - 1 + 0.2 < 0


def test_a_triplet_the_wrong_way_round_costs_the_distance_and_the_margin():
    assert triplet_loss(EAST, NORTH, EAST, margin=0.2) == pytest.approx(1.2)


def test_the_mean_is_over_all_triplets():
    anchor, positive = torch.cat([EAST, EAST]), torch.cat([NORTH_EAST, EAST])
    negative = torch.cat([NORTH_EAST, NORTH])
    assert triplet_loss(anchor, positive, negative, margin=0.2) == pytest.approx(0.2 / 2)


def test_the_distance_does_not_see_lengths():
    assert triplet_loss(5 * EAST, NORTH, EAST, 0.2) == pytest.approx(float(triplet_loss(EAST, NORTH, EAST, 0.2)))


def test_classification_weighs_anchors_and_negatives_alike_and_names_each_negative():
    undecided, sure = torch.zeros(1, 2), torch.tensor([[0.0, 50.0]])
    total, negatives = classification_loss(undecided, torch.cat([undecided, sure]))
    assert negatives.tolist() == pytest.approx([math.log(2), 50.0])
    assert total == pytest.approx((math.log(2) + (math.log(2) + 50) / 2) / 2)
