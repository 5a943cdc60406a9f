"""The patches of a step reach the workers that they belong to, and are the same however many there are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from fundus_set import NAMES, write_training_set
from hypothesis import given
from hypothesis import strategies as st

from ma_cluster.cluster.training.patch_stream import (
    StoredPhotographs,
    open_streams,
    prepare_photographs,
    read_stream,
)
from ma_cluster.config import ImageConfig, SplitConfig, tiny
from ma_cluster.errors import UsageError
from ma_cluster.hypotheses.frrn import build_hgn
from ma_cluster.hypotheses.hgn_training import HgnCuts
from ma_cluster.images.annotated import Annotated, cut, load_annotated
from ma_cluster.images.datasets import read_dataset
from ma_cluster.networks import build_optimizer
from ma_cluster.refinement.prn_training import TripletCuts
from ma_cluster.training.checkpoints import Proposals, checkpoint_bytes
from ma_cluster.training.context import HealthyCutter, HgnCutter, TripletCutter, Work, share

PATCHES = 7  # divides by no number of workers
HGN = replace(tiny().hgn_half, batch_patches=PATCHES, colour_jitter=0.1)
PRN = replace(tiny().prn, triplets=PATCHES, colour_jitter=0.1)


def annotated(seed: int) -> Annotated:
    rng = np.random.default_rng(seed)
    lesion = np.zeros((150, 140), bool)
    lesion[60:66, 70:75] = lesion[20:23, 30:33] = True
    return Annotated(rng.integers(0, 256, (150, 140, 3), dtype=np.uint8), np.ones((150, 140), bool), lesion)


PHOTOGRAPHS = [annotated(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def stored(local_ray: None) -> StoredPhotographs:
    return StoredPhotographs(tuple(ray.put(photograph) for photograph in PHOTOGRAPHS))


@ray.remote(num_cpus=0)
def read_all(stream: Any, rows: range) -> list[dict[str, np.ndarray]]:
    return list(read_stream(stream, rows))


def delivered(cutter: Any, work: list[Work], workers: int) -> list[dict[str, np.ndarray]]:
    """What the workers get, put together again step by step."""
    streams = open_streams(cutter, work, PATCHES, workers)
    parts = ray.get([read_all.remote(stream, share(PATCHES, n, workers)) for n, stream in enumerate(streams)])
    return [
        {name: np.concatenate([columns[name] for columns in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]


@given(st.integers(1, 100), st.integers(1, 20))
def test_shares_cover_each_row_once_and_differ_by_one_at_most(rows: int, workers: int) -> None:
    shares = [share(rows, worker, workers) for worker in range(workers)]
    assert [row for part in shares for row in part] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_share_of_the_docstring() -> None:
    assert [list(share(10, worker, 4)) for worker in range(4)] == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_patches_of_a_step_are_those_of_its_number_whoever_cuts(stored: StoredPhotographs, workers: int) -> None:
    cuts, steps = HgnCuts(PHOTOGRAPHS, HGN, 1), range(5, 17)
    cutter = HgnCutter(stored, lambda: cuts, HGN.patch_px)
    got = delivered(cutter, [Work(step) for step in steps], workers)
    assert [set(columns["step"].tolist()) for columns in got] == [{step} for step in steps]
    for step, columns in zip(steps, got, strict=True):
        patches, lesion = cut(PHOTOGRAPHS, cuts.of_step(step), HGN.patch_px)
        assert columns["row"].tolist() == list(range(PATCHES))
        assert np.array_equal(columns["patch"], patches) and np.array_equal(columns["lesion"], lesion)


def test_triplets_hold_the_negatives_that_were_drawn(stored: StoredPhotographs) -> None:
    cuts = TripletCuts(PHOTOGRAPHS, PRN, 1)
    work = [Work(step, np.arange(step, step + PATCHES)) for step in (3, 4)]
    got = delivered(TripletCutter(stored, lambda: cuts, PRN.patch_px), work, 2)
    for item, columns in zip(work, got, strict=True):
        assert item.ids is not None
        patches, _ = cut(PHOTOGRAPHS, cuts.of_step(item.step, item.ids), PRN.patch_px)
        assert columns["id"].tolist() == item.ids.tolist()
        for name, wanted in zip(("anchor", "positive", "negative"), np.split(patches, 3), strict=True):
            assert np.array_equal(columns[name], wanted)


def test_healthy_patches_come_as_they_are(stored: StoredPhotographs) -> None:
    cuts, ids = TripletCuts(PHOTOGRAPHS, PRN, 1), np.arange(0, 7 * PATCHES, 7)
    (columns,) = delivered(HealthyCutter(stored, lambda: cuts, PRN.patch_px), [Work(0, ids)], 1)
    wanted, lesion = cut(PHOTOGRAPHS, cuts.plain(ids), PRN.patch_px)
    centre = PRN.patch_px // 2
    assert np.array_equal(columns["patch"], wanted) and columns["id"].tolist() == ids.tolist()
    assert not lesion[:, centre, centre].any()


def test_rows_of_another_worker_are_refused(stored: StoredPhotographs) -> None:
    cuts = HgnCuts(PHOTOGRAPHS, HGN, 1)
    cutter = HgnCutter(stored, lambda: cuts, HGN.patch_px)
    streams = open_streams(cutter, [Work(0)], PATCHES, 2)
    swapped = [read_all.remote(stream, share(PATCHES, 1 - worker, 2)) for worker, stream in enumerate(streams)]
    with pytest.raises(RuntimeError, match="Ray Data sent this worker rows"):
        ray.get(swapped)


def test_photographs_are_prepared_as_a_single_process_would(tmp_path: Path, local_ray: None) -> None:
    write_training_set(tmp_path)
    samples = read_dataset(str(tmp_path), SplitConfig())
    recipe = tiny()
    torch.manual_seed(0)
    network = build_hgn(recipe.hgn_half)
    (tmp_path / "hgn.safetensors").write_bytes(
        checkpoint_bytes({"model": network}, build_optimizer(network, recipe.hgn_half), {"step": 0})
    )
    propose = Proposals(str(tmp_path / "hgn.safetensors"), recipe)
    prepared = prepare_photographs(samples, "0.5x", recipe.image, propose)
    assert [sample.name for sample in samples] == list(NAMES)
    (ours,) = prepared.fetch([1]).values()
    wanted = load_annotated(samples[1], "0.5x", recipe.image, propose)
    assert np.array_equal(ours.enhanced, wanted.enhanced) and np.array_equal(ours.lesion, wanted.lesion)
    assert ours.proposed.any() and np.mean(ours.proposed != wanted.proposed) < 1e-3  # another number of threads
    assert ours.lesion.any()


def test_a_photograph_that_cannot_train_is_named_by_its_number(tmp_path: Path, local_ray: None) -> None:
    write_training_set(tmp_path)
    samples = read_dataset(str(tmp_path), SplitConfig())
    Path(samples[1].image).write_bytes(b"<html>not found</html>")
    with pytest.raises(UsageError, match=r"photograph 2 of 3.*not_an_image"):
        prepare_photographs(samples, "0.5x", ImageConfig())
