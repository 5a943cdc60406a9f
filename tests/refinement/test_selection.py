"""Selective sampling draws by loss."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ma_cluster.refinement.selection import BLOCK, FLOOR, UNIFORMS_PER_DRAW, LossTable, probability_of_error, share_out
from ma_cluster.training.stages import PrnStage


def test_what_is_kept_of_a_patch_is_the_probability_that_it_errs():
    probability = np.array([0.0, 0.3, 0.999])
    assert probability_of_error(-np.log(1 - probability)) == pytest.approx(probability)
    assert probability_of_error(np.array([1e4])) == 1  # however wrong, no more


def test_a_new_table_is_drawn_uniformly_and_never_past_its_end():
    table = LossTable(1500)  # the second block is half empty
    drawn = table.draw(300_000, np.random.default_rng(0))
    counts = np.bincount(drawn, minlength=1500)
    assert len(counts) == 1500
    assert stats.chisquare(counts).pvalue > 1e-3


def test_a_table_draws_by_the_losses_across_groups_and_blocks():
    losses = np.random.default_rng(1).gamma(0.5, size=5000).astype(np.float32)
    table = _table(losses)
    counts = np.bincount(table.draw(2_000_000, np.random.default_rng(2)), minlength=5000)
    common = losses > 0.02  # at least 16 draws expected of each, so that chi-square holds
    expected = losses[common] / losses[common].sum(dtype=np.float64) * counts[common].sum()
    assert stats.chisquare(counts[common], expected, sum_check=False).pvalue > 1e-3


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=40), st.integers(1, 50))
def test_the_costliest_patches_are_those_of_the_highest_losses_that_are_known(losses: list[float], count: int):
    expected = sorted((-loss, number) for number, loss in enumerate(losses) if loss != 1.0)[:count]
    ids, found = _table(np.array(losses, np.float32)).highest(count, besides=1.0)
    assert ids.tolist() == [number for _, number in expected]
    np.testing.assert_allclose(found, np.maximum([-loss for loss, _ in expected], FLOOR))


def test_a_patch_that_is_surely_wrong_is_among_the_costliest():
    first = PrnStage.first_loss
    table = LossTable(3, first)
    table.update(np.array([1, 2]), probability_of_error(np.array([1e3, 0.5])).astype(np.float32))
    ids, losses = table.highest(3, first)
    assert ids.tolist() == [1, 2] and losses[0] == 1


def test_the_costliest_patches_are_found_wherever_they_are_in_a_large_table():
    losses = np.random.default_rng(4).random(100_000, np.float32)
    ids, found = _table(losses).highest(24, besides=1.0)
    assert ids.tolist() == np.argsort(-losses)[:24].tolist()
    np.testing.assert_array_equal(found, losses[ids])


def test_one_patch_in_a_hundred_thousand_that_is_wrong_is_nearly_all_that_is_drawn():
    table = _table(np.zeros(100_000, np.float32))
    table.update(np.array([77_777]), np.array([1e6]))
    drawn = table.draw(10_000, np.random.default_rng(0))
    assert np.count_nonzero(drawn == 77_777) >= 9_990  # the floor of all others together: one in ten million


def test_draws_of_a_table_come_in_no_order():
    drawn = LossTable(10_000).draw(10_000, np.random.default_rng(0))
    assert abs(stats.spearmanr(np.arange(10_000), drawn).statistic) < 0.05


@given(st.lists(st.tuples(st.integers(0, 4099), st.floats(0, 1e6, width=32)), max_size=200), st.integers(1, 7))
def test_a_table_is_a_function_of_its_losses_however_they_came(updates, batch):
    expected = np.ones(4100, np.float32)
    table = LossTable(4100)
    for start in range(0, len(updates), batch):
        part = updates[start : start + batch]
        table.update(np.array([i for i, _ in part]), np.array([loss for _, loss in part]))
    for identity, loss in updates:
        expected[identity] = max(loss, FLOOR)
    np.testing.assert_array_equal(table.losses, expected)
    np.testing.assert_array_equal(table.block_sums, _table(expected).block_sums)
    assert np.isclose(table.mean, expected.mean(dtype=np.float64))


def test_the_last_of_several_losses_of_a_patch_counts():
    table = LossTable(4)
    table.update(np.array([2, 2, 2]), np.array([5.0, 0.0, 3.0], np.float32))
    assert table.losses.tolist() == [1, 1, 3, 1]
    assert table.total == 6


@pytest.mark.parametrize(
    ("ids", "losses", "message"),
    [
        ([0, 1], [0.5, np.nan], "1 of 2 losses are NaN, infinite or negative, the first for patch 1"),
        ([0, 1], [np.inf, 0.5], "the first for patch 0"),
        ([0, 1], [0.5, -0.1], "the first for patch 1"),
        ([0, 1], [1e300, 0.5], "the first for patch 0"),
        ([0, 10], [0.5, 0.5], "0 to 10 do not lie in 0 to 9"),
        ([-1, 0], [0.5, 0.5], "-1 to 0 do not lie in 0 to 9"),
    ],
)
def test_a_batch_that_cannot_be_is_refused_whole(ids, losses, message):
    table = LossTable(10)
    with pytest.raises(ValueError, match=message):
        table.update(np.array(ids), np.array(losses))
    assert table.losses.tolist() == [1] * 10


def test_an_empty_batch_and_an_empty_draw_are_nothing():
    table = LossTable(10)
    table.update(np.array([], np.int64), np.array([], np.float32))
    assert table.total == 10
    assert len(table.draw(0, np.random.default_rng(0))) == 0


def test_a_table_without_patches_and_a_draw_below_zero_are_refused():
    with pytest.raises(ValueError, match="at least one patch"):
        LossTable(0)
    with pytest.raises(ValueError, match="negative"):
        LossTable(10).draw(-1, np.random.default_rng(0))


def test_parts_of_a_table_draw_what_the_whole_draws():
    losses = np.random.default_rng(3).random(3 * BLOCK, dtype=np.float32)
    whole, left, right = _table(losses), _table(losses[:BLOCK]), _table(losses[BLOCK:])
    counts = share_out(np.concatenate([left.block_sums, right.block_sums]), 1000, np.random.default_rng(4))
    bits = np.random.PCG64(5)
    first = left.place(counts[:1], np.random.Generator(np.random.PCG64(5)))
    bits.advance(UNIFORMS_PER_DRAW * len(first))
    second = right.place(counts[1:], np.random.Generator(bits)) + BLOCK
    expected = whole.place(counts, np.random.Generator(np.random.PCG64(5)))
    np.testing.assert_array_equal(np.concatenate([first, second]), expected)


def test_a_table_takes_under_six_bytes_a_patch_even_while_it_draws_and_learns():
    size, rng = 8_000_000, np.random.default_rng(0)
    ids, losses = rng.integers(size, size=10_000), rng.random(10_000, dtype=np.float32)
    tracemalloc.start()
    try:
        table = LossTable(size)
        for _ in range(3):
            table.update(ids, losses)
            table.draw(10_000, rng)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert table.nbytes / size < 4.3
    assert peak / size < 6


def _table(losses):
    table = LossTable(len(losses))
    table.update(np.arange(len(losses)), losses)
    return table
