"""Train the networks of a model in a single process, without a cluster.

    python jobs/fit_lite.py hgn_half --data IDRID --out runs/hgn_half [--steps N]

Stop it at any moment and start it again: it goes on from its last checkpoint. Step functions and draws are those that
training on a cluster calls.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import nn

from ma_cluster.checkpoint import load_checkpoint, save_checkpoint
from ma_cluster.config import RECIPES, HgnConfig, Negatives, PrnConfig, Recipe, Scale
from ma_cluster.evaluation.scoring import PixelCounts, average_precision, best_f1
from ma_cluster.hypotheses.probability import probability_map
from ma_cluster.hypotheses.proposals import Proposals
from ma_cluster.hypotheses.sampling import HgnDraws
from ma_cluster.hypotheses.step import build_hgn, hgn_step
from ma_cluster.images.annotated import Annotated, load_annotated
from ma_cluster.images.datasets import read_dataset
from ma_cluster.images.patches import Tiling
from ma_cluster.networks.optimising import build_optimizer
from ma_cluster.networks.tensors import channels_first
from ma_cluster.refinement.sampling import TripletDraws, validation_patches
from ma_cluster.refinement.step import build_prn, prn_probability, prn_step

log = logging.getLogger("fit_lite")
CHECKPOINT_STEPS = 100
Losses = dict[str, float]


def load_split(recipe: Recipe, scale: Scale, arguments: argparse.Namespace, split: str) -> list[Annotated]:
    known = read_dataset(arguments.data, recipe.split, arguments.healthy)
    samples = [sample for sample in known if sample.split == split and (sample.mask or sample.label == "healthy")]
    propose = Proposals(arguments.hgn_half, recipe) if arguments.hgn_half else None
    return [load_annotated(sample, scale, recipe.image, propose) for sample in samples]


def validate_hgn(model: nn.Module, photographs: Sequence[Annotated], recipe: Recipe) -> Losses:
    """Exact average precision over whole photographs."""
    model.eval()
    counts = []
    for photograph in photographs:
        height, width = photograph.fov.shape
        tiling = Tiling(height, width, recipe.detector.tile_px, recipe.detector.halo_px)
        counts.append(
            PixelCounts.of(probability_map(model, photograph.enhanced, photograph.fov, tiling), photograph.lesion)
        )
    total = sum(counts[1:], counts[0])
    best = best_f1(total)
    return {"average_precision": average_precision(total), "f1": best.f1, "threshold": best.threshold}


def fit_hgn(recipe: Recipe, config: HgnConfig, scale: Scale, arguments: argparse.Namespace) -> None:
    draws = HgnDraws(load_split(recipe, scale, arguments, "training"), config, arguments.seed)
    validation = load_split(recipe, scale, arguments, "validation")
    model = build_hgn(config)
    optimizer = build_optimizer(model, config)

    def step(number: int) -> Losses:
        return hgn_step(model, optimizer, draws.batch(number), number, config)

    loop(model, optimizer, step, lambda: validate_hgn(model, validation, recipe), arguments)


def fit_prn(recipe: Recipe, config: PrnConfig, arguments: argparse.Namespace) -> None:
    """Selective sampling on a pool whose losses live in this process: 1 - p(healthy), uniform at first."""
    draws = TripletDraws(load_split(recipe, config.scale, arguments, "training"), config, arguments.seed)
    unseen = load_split(recipe, config.scale, arguments, "validation")
    validation = [validation_patches(photograph, config, arguments.seed) for photograph in unseen]
    model = build_prn(config)
    optimizer = build_optimizer(model, config)
    losses = np.ones(draws.healthy, dtype=np.float32)

    def refresh(number: int) -> None:
        rng = np.random.default_rng([arguments.seed, number, 1])
        share = 1.0 if losses.min() == 1.0 else config.refresh_share
        model.eval()
        for ids, patches in draws.plain(rng.choice(draws.healthy, round(share * draws.healthy), replace=False)):
            losses[ids] = prn_probability(model, patches).numpy()

    def step(number: int) -> Losses:
        due = number % config.refresh_steps == 0 and (number or arguments.init)  # a trained network can score at once
        if due and not arguments.uniform:
            refresh(number)
        batch, ids = draws.batch(number, losses)
        done = prn_step(model, optimizer, batch, number, config)
        if not arguments.uniform:
            losses[ids] = 1 - np.exp(-done.negatives.cpu().numpy())
        return done.values()

    def validate() -> Losses:
        return validate_prn(model, validation) | {"pool_loss": float(losses.mean())}

    loop(model, optimizer, step, validate, arguments)


def validate_prn(model: nn.Module, validation: Sequence[tuple[np.ndarray, np.ndarray]]) -> Losses:
    """Average precision over patches of lesions and of healthy places, as training on a cluster has it."""
    model.eval()
    counts = []
    for pixels, truth in validation:
        parts = [
            prn_probability(model, channels_first(pixels[n : n + 256])).numpy() for n in range(0, len(pixels), 256)
        ]
        counts.append(PixelCounts.of(np.concatenate(parts), truth))
    return {"average_precision": average_precision(sum(counts[1:], counts[0]))}


def loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Callable[[int], Losses],
    validate: Callable[[], Losses],
    arguments: argparse.Namespace,
) -> None:
    """Steps, checkpoints, a line of JSON for each checkpoint."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    checkpoint = arguments.out / "last.safetensors"
    if checkpoint.exists():
        first = load_checkpoint(checkpoint, model, optimizer)["step"]
    else:
        first = 0
        if arguments.init is not None:
            load_checkpoint(arguments.init, model)
    started, recent = time.monotonic(), []
    for number in range(first, arguments.steps):
        recent.append(step(number))
        done = number + 1
        if done % CHECKPOINT_STEPS and done != arguments.steps:
            continue
        save_checkpoint(checkpoint, model, optimizer, {"step": done})
        means = {term: sum(losses[term] for losses in recent) / len(recent) for term in recent[0]}
        record = {"step": done, "seconds": round(time.monotonic() - started, 1), **means}
        if done % arguments.validate_every == 0 or done == arguments.steps:
            record |= validate()
        with (arguments.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        log.info("%s", json.dumps(record))
        recent = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=("hgn_1x", "hgn_half", "prn", "cls"))
    parser.add_argument("--data", required=True, help="folder or prefix in IDRiD's layout, or a manifest")
    parser.add_argument("--healthy", help="folder or prefix of photographs without retinopathy")
    parser.add_argument("--hgn-half", help="checkpoint: training goes where this hypothesis network errs")
    parser.add_argument("--negatives", choices=get_args(Negatives), default=PrnConfig().negatives)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="lite")
    parser.add_argument("--init", type=Path, help="begin with the weights of this checkpoint (a warm restart)")
    parser.add_argument("--learning-rate", type=float, help="peak, instead of the recipe's")
    parser.add_argument("--context", type=int, help="of the refinement, pixels, instead of the recipe's")
    parser.add_argument("--healthy-per-image", type=int, help="of the refinement's pool, instead of the recipe's")
    parser.add_argument("--uniform", action="store_true", help="draw negatives uniformly, not by their loss")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--validate-every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(arguments.seed)
    recipe = RECIPES[arguments.recipe]()
    config = getattr(recipe, "prn" if arguments.network == "cls" else arguments.network)
    arguments.steps = arguments.steps or config.steps
    rate = arguments.learning_rate or config.learning_rate
    config = dataclasses.replace(config, steps=arguments.steps, learning_rate=rate)
    if arguments.network.startswith("hgn"):
        fit_hgn(recipe, config, "1x" if arguments.network == "hgn_1x" else "0.5x", arguments)
    else:
        context = config.context_px if arguments.context is None else arguments.context
        pool = arguments.healthy_per_image or config.healthy_per_image
        config = dataclasses.replace(config, context_px=context, negatives=arguments.negatives, healthy_per_image=pool)
        weight = 0.0 if arguments.network == "cls" else config.triplet_weight
        fit_prn(recipe, dataclasses.replace(config, triplet_weight=weight), arguments)


if __name__ == "__main__":
    main()
