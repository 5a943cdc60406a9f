"""A training step of the patch refinement network."""

import dataclasses

import numpy as np
import torch

from ma_cluster.config import PrnConfig, tiny
from ma_cluster.networks.optimising import Losses, build_optimizer, descend, learning_rate
from ma_cluster.refinement.step import TripletBatch, build_prn, prn_losses

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
