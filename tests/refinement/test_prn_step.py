"""A training step of the patch refinement network."""

import dataclasses

import numpy as np
import torch

from ma_cluster.config import PrnConfig, tiny
from ma_cluster.images.annotated import Annotated
from ma_cluster.networks.optimising import build_optimizer
from ma_cluster.refinement.sampling import TripletDraws
from ma_cluster.refinement.step import TripletBatch, build_prn, prn_step

CONFIG = dataclasses.replace(tiny().prn, steps=30, learning_rate=3e-3)


def batch(config: PrnConfig, seed: int) -> TripletBatch:
    """Lesion patches dark in the middle, healthy ones not."""
    rng = np.random.default_rng(seed)
    parts = rng.integers(100, 156, (3, config.triplets, 3, config.patch_px, config.patch_px), dtype=np.uint8)
    parts[:2, :, :, 12:20, 12:20] = 20
    return TripletBatch(*(torch.from_numpy(part) for part in parts))


def test_steps_teach_the_network_to_tell_lesion_from_healthy():
    torch.manual_seed(0)
    model = build_prn(CONFIG)
    optimizer = build_optimizer(model, CONFIG)
    losses = [prn_step(model, optimizer, batch(CONFIG, step), step, CONFIG) for step in range(30)]
    assert losses[-1].total < 0.5 * losses[0].total
    assert losses[-1].negatives.shape == (CONFIG.triplets,)


def test_without_the_triplet_term_the_loss_is_the_cross_entropy_alone():
    config = dataclasses.replace(CONFIG, triplet_weight=0.0)
    model = build_prn(config)
    done = prn_step(model, build_optimizer(model, config), batch(config, 0), 0, config)
    assert done.triplet == 0
    assert done.total == done.cross_entropy


def annotated(seed: int) -> Annotated:
    rng = np.random.default_rng(seed)
    lesion = np.zeros((200, 220), dtype=bool)
    lesion[50:60, 70:80] = True
    enhanced = rng.integers(0, 256, (200, 220, 3), dtype=np.uint8)
    enhanced[lesion] = 7
    return Annotated(enhanced, np.ones((200, 220), dtype=bool), lesion)


def test_anchors_lie_on_lesions_and_negatives_away_from_them():
    draws = TripletDraws([annotated(0), annotated(1)], CONFIG, seed=3)
    triplets, ids = draws.batch(0, np.ones(draws.healthy, np.float32))
    middle = CONFIG.patch_px // 2
    # a flip moves the centre pixel of an even patch by one: look at the four in the middle
    centre = (slice(None), slice(None), slice(middle - 1, middle + 1), slice(middle - 1, middle + 1))
    assert (triplets.anchor[centre] == 7).flatten(1).any(dim=1).all()
    assert (triplets.positive[centre] == 7).flatten(1).any(dim=1).all()
    assert not (triplets.negative[centre] == 7).flatten(1).all(dim=1).any()
    assert ((ids >= 0) & (ids < draws.healthy)).all()


def test_a_batch_is_a_function_of_seed_step_and_losses():
    losses = np.random.default_rng(0).random(2 * CONFIG.healthy_per_image, dtype=np.float32)
    first, second = (TripletDraws([annotated(0), annotated(1)], CONFIG, seed=3).batch(5, losses) for _ in range(2))
    assert (first[1] == second[1]).all()
    assert torch.equal(first[0].anchor, second[0].anchor)
    other = TripletDraws([annotated(0), annotated(1)], CONFIG, seed=3).batch(6, losses)
    assert not torch.equal(first[0].anchor, other[0].anchor)


def test_plain_patches_are_those_of_their_ids_without_augmentation():
    draws = TripletDraws([annotated(0)], CONFIG, seed=3)
    ids = np.arange(10)
    ((part, patches),) = draws.plain(ids)
    again = torch.cat([patch for _, patch in draws.plain(ids[::-1].copy())]).flip(0)
    assert (part == ids).all()
    assert torch.equal(patches, again)
