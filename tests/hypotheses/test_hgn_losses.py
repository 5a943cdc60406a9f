"""The losses against numbers worked out by hand, and a training step: schedule, golden losses, resumption."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ma_cluster.config import HgnConfig, tiny
from ma_cluster.hypotheses.frrn import Frrn, build_hgn, kind_logits
from ma_cluster.hypotheses.hgn_training import HgnBatch, hgn_losses, soft_dice, weighted_cross_entropy
from ma_cluster.hypotheses.maps import hgn_probability
from ma_cluster.networks import build_optimizer, descend, learning_rate, normalise
from ma_cluster.training.checkpoints import checkpoint_bytes, restore_checkpoint


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


CONFIG = replace(tiny().hgn_half, patch_px=32)


def batch_of(step: int, config: HgnConfig = CONFIG) -> HgnBatch:
    """Dark dots on grainy mid-grey, another mini-batch for each step."""
    rng = np.random.default_rng(step)
    count, side = config.batch_patches, config.patch_px
    rows, cols = np.indices((side, side))
    centres = rng.integers(10, side - 10, (count, 2, 1, 1))
    lesion = np.hypot(rows - centres[:, 0], cols - centres[:, 1]) < 5
    grey = rng.normal(128, 10, (count, 3, side, side)) - 60 * lesion[:, None]
    return HgnBatch(torch.from_numpy(np.clip(grey, 0, 255).astype(np.uint8)), torch.from_numpy(lesion)[:, None])


def fresh(config: HgnConfig = CONFIG) -> tuple[Frrn, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = build_hgn(config)
    return model, build_optimizer(model, config)


def run(model: Frrn, optimizer: torch.optim.AdamW, steps: range, config: HgnConfig = CONFIG) -> list[float]:
    totals = []
    for step in steps:
        losses = hgn_losses(model, batch_of(step), config)
        descend(model, optimizer, losses.total, learning_rate(step, config))
        totals.append(losses.total.item())
    return totals


def test_the_rate_warms_up_linearly_and_ends_at_zero_on_half_a_cosine() -> None:
    config = HgnConfig(steps=110, warmup_steps=10, learning_rate=2.0)
    rates = [learning_rate(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert (rates[10], rates[60], rates[110]) == pytest.approx((2.0, 1.0, 0.0))
    assert rates[35] == pytest.approx(1 + 0.5**0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_rate_stays_zero_after_the_last_step_and_needs_no_warm_up() -> None:
    config = HgnConfig(steps=10, learning_rate=1.0)
    assert learning_rate(0, config) == 1.0
    assert learning_rate(15, config) == 0.0


def test_normalise_puts_mid_grey_at_zero() -> None:
    grey = torch.tensor([0, 128, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    assert normalise(grey).flatten().tolist() == [-1.0, 0.0, 127 / 128]


def test_weight_decay_is_for_kernels_alone() -> None:
    model = build_hgn(CONFIG)
    kernels, others = build_optimizer(model, replace(CONFIG, weight_decay=0.1)).param_groups
    assert (kernels["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim == 4 for p in kernels["params"]) and all(p.ndim == 1 for p in others["params"])
    assert len(kernels["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_the_terms_of_a_step_add_up() -> None:
    model, _ = fresh()
    terms = hgn_losses(model, batch_of(0), replace(CONFIG, dice_weight=0.5)).values()
    assert terms["total"] == pytest.approx(terms["cross_entropy"] + 0.5 * terms["dice"])
    assert 0 < terms["dice"] < 1


def test_the_losses_of_the_tiny_recipe_are_golden() -> None:
    """In float32, since bfloat16 differs among CPUs by some percent after four steps."""
    (model, optimizer), totals = fresh(), []
    for step in range(CONFIG.steps):
        total = hgn_losses(model, batch_of(step), CONFIG, dtype=torch.float32).total
        descend(model, optimizer, total, learning_rate(step, CONFIG))
        totals.append(total.item())
    assert totals == pytest.approx([3.01273, 2.35348, 2.01650, 1.79658], rel=1e-3)
    assert run(*fresh(), range(CONFIG.steps)) == pytest.approx(totals, rel=0.05)


def test_training_finds_the_dots() -> None:
    config = replace(CONFIG, steps=30, learning_rate=5e-3)
    model, optimizer = fresh(config)
    run(model, optimizer, range(config.steps), config)
    unseen = batch_of(1000)
    found = hgn_probability(model.eval(), unseen.patches)[:, 0] > 0.5
    overlap = 2 * (found & unseen.truth[:, 0]).sum() / (found.sum() + unseen.truth[:, 0].sum())
    assert overlap > 0.8


def test_two_steps_and_two_resumed_equal_four() -> None:
    model, optimizer = fresh()
    losses = run(model, optimizer, range(4))
    stopped, stopped_optimizer = fresh()
    first = run(stopped, stopped_optimizer, range(2))
    data = checkpoint_bytes({"model": stopped}, stopped_optimizer, {"step": 2})
    torch.manual_seed(1)
    resumed = build_hgn(CONFIG)
    resumed_optimizer = build_optimizer(resumed, CONFIG)
    position = restore_checkpoint(data, "last", {"model": resumed}, resumed_optimizer)
    second = run(resumed, resumed_optimizer, range(position["step"], 4))
    assert first + second == losses
    for name, ours in model.state_dict().items():
        assert torch.equal(ours, resumed.state_dict()[name]), name


def test_probabilities_are_float32_on_the_cpu_whatever_the_patch_holds() -> None:
    model, _ = fresh()
    for level in (0, 128, 255):
        patches = torch.full((2, 3, 32, 32), level, dtype=torch.uint8)
        probability = hgn_probability(model.eval(), patches)
        assert probability.shape == (2, 1, 32, 32) and probability.dtype == torch.float32
        assert (probability >= 0).all() and (probability <= 1).all()
