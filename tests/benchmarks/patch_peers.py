"""What the patch stream is measured against: torch's DataLoader and WebDataset, and how a side is timed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ma_cluster.config import HgnConfig, ImageConfig
from ma_cluster.hypotheses.hgn_training import HgnCuts, hgn_batch
from ma_cluster.images.annotated import SYMMETRIES, Cuts, cut, draw_gains, load_annotated, scale_contrast, turn
from ma_cluster.images.datasets import Sample

SEED = 1
WORKERS = 2
_SHARD_PATCHES = 256
Epoch = Callable[[range, float], dict[str, float]]
"""Delivers the mini-batches of some steps, each followed by so many seconds of work."""


def consume(batches: Iterable[Any], seconds: float) -> tuple[float, float]:
    """Take each batch, then work on it; seconds waited and worked."""
    waited = worked = 0.0
    began = time.perf_counter()
    for _ in batches:
        taken = time.perf_counter()
        time.sleep(seconds)
        waited, worked = waited + taken - began, worked + time.perf_counter() - taken
        began = time.perf_counter()
    return waited, worked


def figures_of(patches: int, began: float, times: Iterable[tuple[float, float]]) -> dict[str, float]:
    """Pace since `began`, and the share of the consumers' time that they waited."""
    pace = patches / (time.perf_counter() - began)
    waited, worked = (sum(part) for part in zip(*times, strict=True))
    return {"patches_per_second": pace, "waiting_share": waited / (waited + worked)}


class Steps(Dataset[tuple[np.ndarray, np.ndarray]]):
    """Mini-batches by their step. Each worker prepares the photographs when first asked."""

    def __init__(self, samples: list[Sample], image: ImageConfig, config: HgnConfig) -> None:
        self._load = [partial(load_annotated, sample, "1x", image) for sample in samples]
        self._config, self._cuts = config, None

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> Any:
        if self._cuts is None:
            self._photographs = [load() for load in self._load]
            self._cuts = HgnCuts(self._photographs, self._config, SEED)
        return hgn_batch(*cut(self._photographs, self._cuts.of_step(step), self._config.patch_px), 1)


class Order:
    """Which steps come next; a sampler that can be set between epochs, as persistent workers want it."""

    def __init__(self) -> None:
        self.steps = range(0)

    def __iter__(self) -> Any:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)


def loader(samples: list[Sample], image: ImageConfig, config: HgnConfig) -> Epoch:
    """torch's DataLoader, its two workers kept over the epochs."""
    order = Order()
    batches: DataLoader[Any] = DataLoader(
        Steps(samples, image, config),
        batch_size=None,
        sampler=order,
        num_workers=WORKERS,
        persistent_workers=True,
        multiprocessing_context="spawn",  # Ray's threads live in this process
    )

    def deliver(steps: range, seconds: float) -> dict[str, float]:
        began, order.steps = time.perf_counter(), steps
        return figures_of(len(steps) * config.batch_patches, began, [consume(batches, seconds)])

    return deliver


def webdataset_side(samples: list[Sample], image: ImageConfig, config: HgnConfig, folder: Path) -> dict[str, Epoch]:
    """Tar shards of patches, read by two workers of a WebLoader; nothing where WebDataset is not installed."""
    try:
        import webdataset as wds
    except ImportError:
        return {}
    batch = config.batch_patches
    photographs = [load_annotated(sample, "1x", image) for sample in samples]
    draws = HgnCuts(photographs, config, SEED)
    with wds.ShardWriter(f"{folder}/%04d.tar", maxcount=_SHARD_PATCHES, verbose=0) as writer:
        for step in range(WORKERS * _SHARD_PATCHES // batch):
            cuts = draws.of_step(step)
            plain = Cuts(cuts.centres, np.zeros_like(cuts.symmetries), np.ones_like(cuts.gains))
            for row, (patch, lesion) in enumerate(zip(*cut(photographs, plain, config.patch_px), strict=True)):
                writer.write({"__key__": f"{step}_{row}", "patch": patch.tobytes(), "lesion": lesion.tobytes()})
    shards = sorted(str(file) for file in folder.glob("*.tar"))
    dataset = wds.WebDataset(shards, shardshuffle=False, resampled=True).map(partial(augmented, config=config))
    batches = wds.WebLoader(
        dataset.batched(batch, collation_fn=together),
        batch_size=None,
        num_workers=WORKERS,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )

    def deliver(steps: range, seconds: float) -> dict[str, float]:
        began = time.perf_counter()
        return figures_of(len(steps) * batch, began, [consume(islice(iter(batches), len(steps)), seconds)])

    return {"webdataset": deliver}


def augmented(sample: dict[str, Any], config: HgnConfig) -> tuple[np.ndarray, np.ndarray]:
    """A patch of a shard under another symmetry and other gains each time."""
    rng, side = np.random.default_rng(), config.patch_px
    symmetry = int(rng.integers(SYMMETRIES))
    patch = turn(np.frombuffer(sample["patch"], np.uint8).reshape(side, side, 3), symmetry)
    lesion = turn(np.frombuffer(sample["lesion"], np.uint8).reshape(side, side), symmetry)
    return scale_contrast(patch, draw_gains(rng, config.colour_jitter)), lesion


def together(patches: list[tuple[np.ndarray, np.ndarray]]) -> Any:
    """A mini-batch."""
    return hgn_batch(*(np.stack(part) for part in zip(*patches, strict=True)), 1)
