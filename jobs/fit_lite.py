"""Train one hypothesis network in a single process, without a cluster.

    python jobs/fit_lite.py --scale 0.5x --data IDRID --out runs/hgn_half [--steps N]

Stop it at any moment and start it again: it goes on from its last checkpoint. Its step function and its draws are the
ones that the cluster's training uses.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from numpy import ndarray

from ma_cluster.bundle import load_checkpoint, save_checkpoint
from ma_cluster.config import RECIPES, DetectorConfig, HgnConfig, Recipe
from ma_cluster.hypotheses.fitting import HgnBatch, build_hgn, build_optimizer, hgn_step
from ma_cluster.hypotheses.segment import probability_map
from ma_cluster.images.augment import SYMMETRIES, jitter, turn
from ma_cluster.images.contrast import MID_GREY, prepare
from ma_cluster.images.datasets import Sample, decode_mask, read_dataset, read_object
from ma_cluster.images.fundus import half_scale_mask, read_fundus
from ma_cluster.images.patches import Tiling, crop
from ma_cluster.images.pool import LesionPool, RegionPool
from ma_cluster.lesions.scoring import PixelCounts, average_precision, best_f1

log = logging.getLogger("fit_lite")
CHECKPOINT_STEPS = 100


@dataclasses.dataclass(frozen=True, slots=True)
class Photograph:
    """One annotated photograph on the grid of one scale."""

    enhanced: UInt8[ndarray, "h w 3"]
    fov: Bool[ndarray, "h w"]
    lesion: Bool[ndarray, "h w"]


def load(sample: Sample, recipe: Recipe, scale: str) -> Photograph:
    fundus = read_fundus(read_object(sample.image), recipe.image)
    prepared = prepare(fundus, recipe.image)
    assert sample.mask is not None
    lesion = fundus.grid.crop_mask(decode_mask(read_object(sample.mask)))
    if scale == "1x":
        return Photograph(prepared.enhanced_1x, prepared.fov_1x, lesion)
    return Photograph(prepared.enhanced_half, prepared.fov_half, half_scale_mask(lesion))


class Draws:
    """Mini-batches as a pure function of (seed, step)."""

    def __init__(self, photographs: Sequence[Photograph], config: HgnConfig, seed: int) -> None:
        self.photographs, self.config, self.seed = photographs, config, seed
        self.lesions = LesionPool([photograph.lesion for photograph in photographs])
        self.anywhere = RegionPool([photograph.fov for photograph in photographs], per_image=10**6, seed=seed)

    def batch(self, step: int) -> HgnBatch:
        rng = np.random.default_rng([self.seed, step])
        positives = round(self.config.batch_patches * self.config.lesion_share)
        ids = self.lesions.draw(positives, rng, per_lesion=self.config.per_lesion)
        others = rng.integers(len(self.anywhere), size=self.config.batch_patches - positives)
        centres = np.concatenate([self.lesions.centres(ids), self.anywhere.centres(others)])
        # a lesion is not always in the middle: shift by up to a quarter of the patch
        reach = self.config.patch_px // 4
        centres[:, 1:] += rng.integers(-reach, reach + 1, size=(len(centres), 2), dtype=np.int32)
        patches, lesion = zip(*[self.patch(*map(int, centre), rng) for centre in centres], strict=True)
        return HgnBatch(torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(lesion)))

    def patch(
        self, image: int, row: int, col: int, rng: np.random.Generator
    ) -> tuple[UInt8[ndarray, "s s 3"], Bool[ndarray, "s s"]]:
        photograph, size = self.photographs[image], self.config.patch_px
        symmetry = int(rng.integers(SYMMETRIES))
        patch = turn(crop(photograph.enhanced, row, col, size, MID_GREY), symmetry)
        return jitter(patch, rng, self.config.colour_jitter), turn(crop(photograph.lesion, row, col, size, 0), symmetry)


def validate(model: torch.nn.Module, photographs: Sequence[Photograph], config: DetectorConfig) -> dict[str, float]:
    model.eval()
    counts = []
    for photograph in photographs:
        tiling = Tiling(*photograph.fov.shape, config.tile_px, config.halo_px)
        probability = probability_map(model, photograph.enhanced, photograph.fov, tiling)
        counts.append(PixelCounts.of(probability, photograph.lesion))
    total = sum(counts[1:], counts[0])
    best = best_f1(total)
    return {"average_precision": average_precision(total), "f1": best.f1, "threshold": best.threshold}


def fit(recipe: Recipe, arguments: argparse.Namespace) -> None:
    config = recipe.hgn_1x if arguments.scale == "1x" else recipe.hgn_half
    samples = [sample for sample in read_dataset(arguments.data, recipe.split) if sample.mask]
    training = [load(s, recipe, arguments.scale) for s in samples if s.split == "training"]
    validation = [load(s, recipe, arguments.scale) for s in samples if s.split == "validation"]
    torch.manual_seed(arguments.seed)
    model = build_hgn(config).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config)
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.out / "last.safetensors"
    start = load_checkpoint(checkpoint, model, optimizer)["step"] if checkpoint.exists() else 0
    draws = Draws(training, config, arguments.seed)
    started, totals = time.monotonic(), []
    for step in range(start, config.steps):
        totals.append(hgn_step(model, optimizer, draws.batch(step), step, config))
        done = step + 1
        if done % CHECKPOINT_STEPS == 0 or done == config.steps:
            save_checkpoint(checkpoint, model, optimizer, {"step": done})
            means = {term: sum(losses[term] for losses in totals) / len(totals) for term in totals[0]}
            record = {"step": done, "seconds": time.monotonic() - started, **means}
            if done % arguments.validate_every == 0 or done == config.steps:
                record |= validate(model, validation, recipe.detector)
            with (arguments.out / "log.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            log.info("%s", json.dumps(record))
            totals = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=("1x", "0.5x"), required=True)
    parser.add_argument("--data", required=True, help="folder or prefix in IDRiD's layout, or a manifest")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="lite")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--validate-every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    recipe = RECIPES[arguments.recipe]()
    if arguments.steps:
        hgn = {
            name: dataclasses.replace(getattr(recipe, name), steps=arguments.steps) for name in ("hgn_1x", "hgn_half")
        }
        recipe = dataclasses.replace(recipe, **hgn)
    fit(recipe, arguments)


if __name__ == "__main__":
    main()
