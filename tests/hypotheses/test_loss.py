"""Losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ma_cluster.hypotheses.loss import lesion_probability, soft_dice, weighted_cross_entropy


def logits_of(probabilities: list[list[float]]) -> Tensor:
    """Two-class logits of one image whose lesion probabilities are given."""
    lesion = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([torch.zeros_like(lesion), torch.logit(lesion)])[None]


PROBABILITIES = [[0.9, 0.5], [0.2, 0.1]]
LESION = torch.tensor([[[True, False], [True, False]]])


def test_the_lesion_probability_is_the_softmax() -> None:
    logits = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(lesion_probability(logits), logits.softmax(dim=1)[:, 1])
    assert lesion_probability(logits_of(PROBABILITIES))[0].tolist() == [pytest.approx(row) for row in PROBABILITIES]


@pytest.mark.parametrize("weight", [1.0, 10.0])
def test_cross_entropy_weighs_lesion_pixels_and_divides_by_all(weight: float) -> None:
    expected = -(weight * math.log(0.9) + math.log(0.5) + weight * math.log(0.2) + math.log(0.9)) / 4
    assert weighted_cross_entropy(logits_of(PROBABILITIES), LESION, weight).item() == pytest.approx(expected)


def test_dice_by_hand() -> None:
    overlap, squares, lesion_pixels = 0.9 + 0.2, 0.81 + 0.25 + 0.04 + 0.01, 2
    expected = 1 - 2 * overlap / (squares + lesion_pixels + 1e-5)
    assert soft_dice(logits_of(PROBABILITIES), LESION).item() == pytest.approx(expected)


def test_dice_is_taken_over_the_whole_mini_batch() -> None:
    logits = torch.cat([logits_of(PROBABILITIES), logits_of([[0.1, 0.1], [0.1, 0.1]])])
    lesion = torch.cat([LESION, torch.zeros_like(LESION)])
    expected = 1 - 2 * 1.1 / (1.11 + 0.04 + 2 + 1e-5)
    assert soft_dice(logits, lesion).item() == pytest.approx(expected)


def test_dice_runs_from_zero_for_the_truth_to_one_for_its_opposite() -> None:
    sure = torch.where(LESION, 40.0, -40.0)
    logits = torch.stack([torch.zeros_like(sure), sure], dim=1)
    assert soft_dice(logits, LESION).item() == pytest.approx(0, abs=1e-5)
    assert soft_dice(-logits, LESION).item() == pytest.approx(1, abs=1e-5)


def test_a_batch_without_lesions_has_finite_losses_and_gradients() -> None:
    logits = torch.zeros(1, 2, 4, 4, requires_grad=True)
    nothing = torch.zeros(1, 4, 4, dtype=torch.bool)
    (soft_dice(logits, nothing) + weighted_cross_entropy(logits, nothing, 10.0)).backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_the_gradients_of_both_losses_pass_a_numerical_check() -> None:
    logits = logits_of(PROBABILITIES).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: weighted_cross_entropy(x, LESION, 5.0), (logits,))
    assert torch.autograd.gradcheck(lambda x: soft_dice(x, LESION), (logits,))
