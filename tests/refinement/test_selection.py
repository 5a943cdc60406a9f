"""Selective sampling draws by loss."""

import numpy as np
from scipy import stats

from ma_cluster.refinement.selection import FLOOR, draw_by_loss


def test_draws_follow_the_losses():
    losses = np.array([0.1, 0.4, 0.0, 0.5, 2.0], dtype=np.float32)
    drawn = np.bincount(draw_by_loss(losses, 100_000, np.random.default_rng(0)), minlength=5)
    expected = np.maximum(losses, FLOOR) / np.maximum(losses, FLOOR).sum() * 100_000
    likely = [0, 1, 3, 4]
    scaled = expected[likely] * drawn[likely].sum() / expected[likely].sum()
    assert stats.chisquare(drawn[likely], scaled, sum_check=False).pvalue > 1e-3
    assert drawn[2] <= 3  # the floor alone: one in three million


def test_a_pool_without_loss_is_drawn_uniformly():
    drawn = np.bincount(draw_by_loss(np.zeros(10, np.float32), 100_000, np.random.default_rng(0)), minlength=10)
    assert stats.chisquare(drawn).pvalue > 1e-3


def test_draws_are_a_function_of_losses_and_generator():
    losses = np.random.default_rng(1).random(1000, dtype=np.float32)
    first, second = (draw_by_loss(losses, 50, np.random.default_rng(7)) for _ in range(2))
    assert (first == second).all()
