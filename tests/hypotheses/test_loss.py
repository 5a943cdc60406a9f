"""Losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ma_cluster.hypotheses.loss import kind_logits, soft_dice, weighted_cross_entropy


def logit_of(*probabilities: list[list[float]]) -> Tensor:
    """Logits of images of one kind whose lesion probabilities are given."""
    return torch.logit(torch.tensor(probabilities, dtype=torch.float64))[:, None]


PROBABILITIES = [[0.9, 0.5], [0.2, 0.1]]
LESION = torch.tensor([[[[True, False], [True, False]]]])


def weight_of(*weights: float) -> Tensor:
    return torch.tensor(weights, dtype=torch.float64)


def test_with_one_kind_the_losses_are_those_of_the_softmax_of_two_classes() -> None:
    logits = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    truth = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    assert torch.allclose(kind_logits(logits).sigmoid()[:, 0], logits.softmax(dim=1)[:, 1])
    expected = F.cross_entropy(logits, truth.long(), weight=torch.tensor([1.0, 10.0]), reduction="none").mean()
    ours = weighted_cross_entropy(kind_logits(logits), truth[:, None], torch.tensor([10.0]))
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("weight", [1.0, 10.0])
def test_cross_entropy_weighs_lesion_pixels_and_divides_by_all(weight: float) -> None:
    expected = -(weight * math.log(0.9) + math.log(0.5) + weight * math.log(0.2) + math.log(0.9)) / 4
    ours = weighted_cross_entropy(logit_of(PROBABILITIES), LESION, weight_of(weight))
    assert ours.item() == pytest.approx(expected)


def test_dice_by_hand() -> None:
    overlap, squares, lesion_pixels = 0.9 + 0.2, 0.81 + 0.25 + 0.04 + 0.01, 2
    expected = 1 - 2 * overlap / (squares + lesion_pixels + 1e-5)
    assert soft_dice(logit_of(PROBABILITIES), LESION).item() == pytest.approx(expected)


def test_dice_is_taken_over_the_whole_mini_batch() -> None:
    logit = logit_of(PROBABILITIES, [[0.1, 0.1], [0.1, 0.1]])
    lesion = torch.cat([LESION, torch.zeros_like(LESION)])
    expected = 1 - 2 * 1.1 / (1.11 + 0.04 + 2 + 1e-5)
    assert soft_dice(logit, lesion).item() == pytest.approx(expected)


def test_dice_runs_from_zero_for_the_truth_to_one_for_its_opposite() -> None:
    sure = torch.where(LESION, 40.0, -40.0)
    assert soft_dice(sure, LESION).item() == pytest.approx(0, abs=1e-5)
    assert soft_dice(-sure, LESION).item() == pytest.approx(1, abs=1e-5)


def test_each_kind_has_the_losses_that_it_would_have_alone() -> None:
    first, second = logit_of(PROBABILITIES), logit_of([[0.3, 0.6], [0.7, 0.2]])
    both, truth = torch.cat([first, second], dim=1), torch.cat([LESION, ~LESION], dim=1)
    alone = [soft_dice(first, LESION), soft_dice(second, ~LESION)]
    assert torch.allclose(soft_dice(both, truth), torch.cat(alone))
    alone = [
        weighted_cross_entropy(first, LESION, weight_of(5)),
        weighted_cross_entropy(second, ~LESION, weight_of(2)),
    ]
    assert torch.allclose(weighted_cross_entropy(both, truth, weight_of(5, 2)), torch.cat(alone))


def test_a_batch_without_lesions_has_finite_losses_and_gradients() -> None:
    logit = torch.zeros(1, 1, 4, 4, requires_grad=True)
    nothing = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    (soft_dice(logit, nothing) + weighted_cross_entropy(logit, nothing, torch.tensor([10.0]))).backward()
    assert logit.grad is not None and logit.grad.isfinite().all()


def test_the_gradients_of_both_losses_pass_a_numerical_check() -> None:
    logit = logit_of(PROBABILITIES).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: weighted_cross_entropy(x, LESION, weight_of(5)), (logit,))
    assert torch.autograd.gradcheck(lambda x: soft_dice(x, LESION), (logit,))
