"""The ledger draws by loss across its shards, as one table would; what it holds survives, or its loss is an error."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import ray
from scipy import stats

from ma_cluster.cluster.training.ledger import LossLedger, shard_bounds
from ma_cluster.errors import LedgerLostError
from ma_cluster.refinement.selection import BLOCK, LossTable

pytestmark = pytest.mark.usefixtures("local_ray")
SIZE = 5 * BLOCK + 100
LOSSES = np.random.default_rng(0).gamma(0.5, size=SIZE).astype(np.float32)


@pytest.fixture(scope="module")
def shared_ledger(local_ray):
    with closing(LossLedger.create(SIZE, shards=3)) as ledger:
        yield ledger


@pytest.fixture
def ledger(shared_ledger):
    """Three shards that hold LOSSES."""
    shared_ledger.update(np.arange(SIZE), LOSSES)
    return shared_ledger


def test_shards_meet_between_blocks_and_are_no_more_than_the_blocks():
    assert shard_bounds(SIZE, 3) == [0, 2 * BLOCK, 4 * BLOCK, SIZE]
    assert shard_bounds(100, 8) == [0, 100]


def test_draws_follow_the_losses_across_shards(ledger):
    counts = np.bincount(ledger.draw(2_000_000, epoch=0, seed=1), minlength=SIZE)
    common = LOSSES > 0.02
    expected = LOSSES[common] / LOSSES[common].sum(dtype=np.float64) * counts[common].sum()
    assert stats.chisquare(counts[common], expected, sum_check=False).pvalue > 1e-3
    assert np.isclose(ledger.loss_mean(), LOSSES.mean(dtype=np.float64), rtol=1e-6)


def test_a_new_ledger_is_uniform():
    with closing(LossLedger.create(3000, shards=2)) as ledger:
        assert stats.chisquare(np.bincount(ledger.draw(300_000, 0, 0), minlength=3000)).pvalue > 1e-3


def test_a_ledger_of_any_number_of_shards_draws_what_one_table_draws(ledger):
    table = LossTable(SIZE)
    table.update(np.arange(SIZE), LOSSES)
    expected = table.draw(10_000, np.random.default_rng([7, 3]))
    np.testing.assert_array_equal(ledger.draw(10_000, epoch=3, seed=7), expected)
    with closing(LossLedger.create(SIZE, shards=6)) as finer:
        finer.update(np.arange(SIZE), LOSSES)
        np.testing.assert_array_equal(finer.draw(10_000, epoch=3, seed=7), expected)


def test_the_costliest_patches_of_all_shards_are_those_of_one_table(ledger):
    table = LossTable(SIZE)
    table.update(np.arange(SIZE), LOSSES)
    for found, expected in zip(ledger.highest(50, 1.0), table.highest(50, 1.0), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_epochs_and_seeds_draw_differently(ledger):
    first = ledger.draw(1000, 0, 0)
    assert (first == ledger.draw(1000, 0, 0)).all()
    assert (first != ledger.draw(1000, 1, 0)).any()
    assert (first != ledger.draw(1000, 0, 1)).any()


def test_the_last_of_several_losses_of_a_patch_counts(ledger):
    ledger.update(np.array([5000, 10, 5000]), np.array([9.0, 1.0, 1e7], np.float32))
    assert np.count_nonzero(ledger.draw(1000, 0, 0) == 5000) > 990


def test_a_batch_with_a_bad_loss_changes_no_shard(ledger):
    before = ledger.loss_mean()
    for ids, losses in (([0, SIZE - 1], [5.0, np.nan]), ([0, SIZE - 1], [5.0, -1.0]), ([0, SIZE], [5.0, 1.0])):
        with pytest.raises(ValueError, match=r"diverged|another pool"):
            ledger.update(np.array(ids), np.array(losses))
    assert ledger.loss_mean() == before


def test_tasks_can_use_the_ledger_they_are_handed(ledger):
    @ray.remote(num_cpus=0)
    def work(handed, first):
        handed.update(np.arange(first, first + 100), np.full(100, 2.0, np.float32))
        return handed.draw(100, 0, 0)

    ray.get([work.remote(ledger, first) for first in (0, 3000)])
    expected = LOSSES.copy()
    expected[:100] = expected[3000:3100] = 2.0
    assert np.isclose(ledger.loss_mean(), expected.mean(dtype=np.float64), rtol=1e-6)


def test_two_updaters_at_once_lose_nothing(ledger):
    def work(first):
        for number in range(first, SIZE, 20):
            ids = np.arange(number, min(number + 10, SIZE))
            ledger.update(ids, ids.astype(np.float32))

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.isclose(ledger.loss_mean(), (SIZE - 1) / 2)


def test_a_restored_ledger_draws_what_the_lost_one_would_have(ledger, tmp_path):
    ledger.snapshot(str(tmp_path))
    expected = ledger.draw(5000, epoch=2, seed=4)
    with closing(LossLedger.create(SIZE, shards=2)) as restored:
        restored.restore(str(tmp_path))
        np.testing.assert_array_equal(restored.draw(5000, epoch=2, seed=4), expected)


def test_a_snapshot_in_a_bucket_is_read_back(ledger, weed):
    url = f"{weed.bucket('ledger')}/losses"
    ledger.snapshot(url)
    expected = ledger.draw(100, 0, 0)
    ledger.update(np.arange(SIZE), np.ones(SIZE, np.float32))
    ledger.restore(url)
    np.testing.assert_array_equal(ledger.draw(100, 0, 0), expected)


def test_a_snapshot_stays_valid_until_the_next_one_is_whole(ledger, tmp_path):
    ledger.snapshot(str(tmp_path))
    manifest, mean = (tmp_path / "ledger.json").read_bytes(), ledger.loss_mean()
    for _ in range(2):
        ledger.update(np.arange(SIZE), np.full(SIZE, 3.0, np.float32))
        ledger.snapshot(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "ledger.json"]
    ledger.restore(str(tmp_path))
    assert ledger.loss_mean() == 3.0
    ledger.update(np.arange(SIZE), LOSSES)
    ledger.snapshot(str(tmp_path))  # now in b; the state of the first is in force until its manifest is written
    ledger.snapshot(str(tmp_path))  # in a again, with the bytes of the first
    assert (tmp_path / "ledger.json").read_bytes() == manifest
    ledger.restore(str(tmp_path))
    assert ledger.loss_mean() == mean


def test_a_damaged_or_foreign_snapshot_is_refused(ledger, tmp_path):
    ledger.snapshot(str(tmp_path))
    with closing(LossLedger.create(SIZE + 1)) as other, pytest.raises(LedgerLostError, match="same pool"):
        other.restore(str(tmp_path))
    part = next((tmp_path / "a").iterdir())
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with closing(LossLedger.create(SIZE)) as other, pytest.raises(LedgerLostError, match="not what its manifest says"):
        other.restore(str(tmp_path))
    manifest = json.loads((tmp_path / "ledger.json").read_text())
    (tmp_path / "ledger.json").write_text(json.dumps(manifest | {"parts": manifest["parts"][1:]}))
    with pytest.raises(LedgerLostError, match="same pool"):
        ledger.restore(str(tmp_path))
    with pytest.raises(LedgerLostError, match="no snapshot"):
        ledger.restore(str(tmp_path / "elsewhere"))


def test_a_ledger_without_snapshot_is_lost_with_its_actor():
    with closing(LossLedger.create(SIZE, shards=2)) as ledger:
        _kill_a_shard(ledger)
        with pytest.raises(LedgerLostError, match="make the ledger anew"):
            ledger.draw(10, 0, 0)


def _kill_a_shard(ledger):
    """kill -9 of the second actor, from outside."""
    pid = ray.get(ledger._shards[1].__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.05)
