"""Losses of the patch refinement network against values worked out by hand, and a training step."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from ma_cluster.config import PrnConfig, tiny
from ma_cluster.networks import Losses, build_optimizer, descend, learning_rate
from ma_cluster.refinement.prn_training import TripletBatch, classification_loss, prn_losses, triplet_loss
from ma_cluster.refinement.resnet import build_prn

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


CONFIG = dataclasses.replace(tiny().prn, steps=30, learning_rate=3e-3)


def batch(config: PrnConfig, seed: int) -> TripletBatch:
    """Lesion patches dark in the middle, healthy ones not."""
    rng = np.random.default_rng(seed)
    parts = rng.integers(100, 156, (3, config.triplets, 3, config.patch_px, config.patch_px), dtype=np.uint8)
    parts[:2, :, :, 12:20, 12:20] = 20
    return TripletBatch(*(torch.from_numpy(part) for part in parts))


def step(model, optimizer, number: int, config: PrnConfig = CONFIG) -> Losses:
    losses = prn_losses(model, batch(config, number), config)
    descend(model, optimizer, losses.total, learning_rate(number, config))
    return losses


def test_steps_teach_the_network_to_tell_lesion_from_healthy():
    torch.manual_seed(0)
    model = build_prn(CONFIG)
    optimizer = build_optimizer(model, CONFIG)
    losses = [step(model, optimizer, number) for number in range(30)]
    assert losses[-1].total < 0.5 * losses[0].total
    assert losses[-1].negatives.shape == (CONFIG.triplets,)


def test_without_the_triplet_term_the_loss_is_the_cross_entropy_alone():
    config = dataclasses.replace(CONFIG, triplet_weight=0.0)
    model = build_prn(config)
    done = prn_losses(model, batch(config, 0), config)
    assert done.terms["triplet"] == 0
    assert done.total == done.terms["cross_entropy"]
