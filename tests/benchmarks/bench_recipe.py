"""What each part of the 0.5x network's recipe gives: `bench_recipe.py --data IDRID --healthy GRADES --out FOLDER`.

Trains the network whole and without one part of its recipe at a time, all else alike, and looks at the photographs of
the fold that it has not seen, on the grid of 0.5x and without flips. Runs lie in FOLDER/PART_FOLD_SEED; one that is
there is not trained again, so that several calls, side by side, share the work, and the last writes the figures of all.

Intervals are over photographs. How much another seed changes is told beside: a difference smaller than that one is of
no part.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from numpy import ndarray

from ma_cluster import machine
from ma_cluster.config import Recipe, SplitConfig, lite, to_dict
from ma_cluster.evaluation.figures import draw_weights, interval, resampled_precision
from ma_cluster.evaluation.pooling import (
    PHOTOGRAPHS,
    decode_photographs,
    encode_photographs,
    paired_differences,
    pool,
    resampled_sensitivity,
)
from ma_cluster.evaluation.scoring import LesionCounts, PixelCounts, average_precision, coarse, label
from ma_cluster.evaluation.tally import Photograph
from ma_cluster.hypotheses.frrn import build_hgn
from ma_cluster.hypotheses.maps import probability_maps
from ma_cluster.images.annotated import load_annotated
from ma_cluster.images.datasets import Sample, read_split
from ma_cluster.images.patches import Tiling
from ma_cluster.training.checkpoints import checkpoint_weights, read_checkpoint
from ma_cluster.training.run import TrainRequest
from ma_cluster.training.start import train_local

WHOLE, HEALTHY = "whole", "healthy"
PARTS: dict[str, dict[str, Any]] = {
    WHOLE: {},
    HEALTHY: {},
    "selection": {"hard_share": 0.0, "healthy_share": 0.18},
    "other_lesions": {"kinds": ("MA",), "haemorrhage_share": 0.0},
    "light_and_geometry": {
        "any_rotation": False,
        "zoom": 1.0,
        "contrast_low": 1.0,
        "contrast_high": 1.0,
        "offset": 0.0,
        "blur_share": 0.0,
        "noise_share": 0.0,
    },
}
"""By the part that is left out, what the recipe's `hgn_half` has instead; `healthy` leaves the photographs out."""
CALLS = 0.5
"""On a photograph without lesions, where the share of lesions found is read."""
ROW = "hgn_half"
EPOCH = 125
"""Steps after which photographs without lesions are searched for hard places."""


def main() -> None:
    """Train what is not there yet, then write the figures of all that is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="IDRiD's segmentation part")
    parser.add_argument("--healthy", required=True, help="CSV of image and grade")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="left out, one at a time")
    parser.add_argument("--folds", type=int, nargs="+", default=[5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for fold in arguments.folds:
            for part in arguments.parts:
                folder = arguments.out / f"{part}_{fold}_{seed}"
                if not (folder / PHOTOGRAPHS).exists():
                    looked_at = look(train(part, fold, seed, folder, arguments), arguments.data, arguments.healthy)
                    (folder / PHOTOGRAPHS).write_bytes(encode_photographs(looked_at))
    said = {"benchmark": "recipe", "steps": arguments.steps, "whole": to_dict(lite().hgn_half)}
    report = said | {"machine": machine.describe()} | figures(arguments.out)
    (arguments.out / "recipe.json").write_text(json.dumps(report, indent=2) + "\n")


def train(part: str, fold: int, seed: int, folder: Path, arguments: argparse.Namespace) -> tuple[Recipe, str]:
    """A network without this part -> its recipe and its last checkpoint."""
    whole = lite()
    recipe = replace(whole, split=SplitConfig.fold(fold), hgn_half=replace(whole.hgn_half, **PARTS[part]))
    request = TrainRequest(
        network="hgn_half",
        data=arguments.data,
        out=str(folder.resolve()),
        recipe=recipe,
        healthy=None if part == HEALTHY else arguments.healthy,
        seed=seed,
        steps=arguments.steps,
        epoch_steps=min(arguments.steps, EPOCH),
        threads=arguments.threads,
        resume=True,
    )
    return recipe, train_local(request).last


def look(trained: tuple[Recipe, str], data: str, healthy: str) -> list[Photograph]:
    """The photographs that validate, as the network answers for them."""
    recipe, checkpoint = trained
    model = build_hgn(recipe.hgn_half, len(recipe.hgn_half.kinds))
    model.load_state_dict(checkpoint_weights(read_checkpoint(checkpoint), checkpoint))
    model.eval()

    def of(number: int, sample: Sample) -> Photograph:
        photograph = load_annotated(sample, "0.5x", recipe.image)
        height, width = photograph.fov.shape
        tiling = Tiling(height, width, recipe.detector.tile_px, recipe.detector.halo_px)
        probability = probability_maps(model, photograph.enhanced, photograph.fov, tiling)[0]
        counts = LesionCounts.of(probability, label(photograph.lesion))
        pixels = coarse(PixelCounts.of(probability, photograph.lesion))
        return Photograph(number, sample.name, sample.mask is None, 0, {ROW: pixels}, {ROW: counts})

    samples = read_split(data, recipe.split, "validation", healthy)
    return [of(number, sample) for number, sample in enumerate(samples, 1)]


def figures(folder: Path) -> dict[str, Any]:
    """Of the runs in a folder: each fold and all of them together, what each part gives, what another seed changes."""
    runs = {path.parent.name: decode_photographs(path.read_bytes()) for path in sorted(folder.glob(f"*/{PHOTOGRAPHS}"))}
    of_folds = [photographs for name, photographs in runs.items() if name.startswith(WHOLE) and name.endswith("_1")]
    pooled = list({each.digest: each for photographs in of_folds for each in photographs if not each.healthy}.values())
    differences = {}
    for name, photographs in runs.items():
        part, fold, seed = name.rsplit("_", 2)
        other = f"{WHOLE}_{fold}_{seed if part != WHOLE else 1}"
        if other in runs and other != name:
            differences[name] = {"whole": other} | difference(runs[other], photographs)
    return {
        "runs": {name: of_run(photographs) for name, photographs in runs.items()},
        "folds": {"photographs": len(pooled), "runs": len(of_folds)} | _precision(pooled) if pooled else None,
        "differences": differences,
    }


def of_run(photographs: Sequence[Photograph]) -> dict[str, Any]:
    """Figures of one network."""
    whole = [np.ones((1, count), np.int64) for count in _sizes(photographs)]
    found = float(found_at_calls(photographs, *whole)[0])
    return _precision([each for each in photographs if not each.healthy]) | {"found_at_calls": round(found, 4)}


def difference(ours: Sequence[Photograph], theirs: Sequence[Photograph]) -> dict[str, Any]:
    """How much more the first finds than the second."""
    paired = paired_differences(*(pool(each for each in side if not each.healthy) for side in (ours, theirs)))
    weights = [draw_weights(count, seed=number) for number, count in enumerate(_sizes(ours))]
    bounds = interval(found_at_calls(ours, *weights) - found_at_calls(theirs, *weights))
    values = {name: of_run(side)["found_at_calls"] for name, side in (("ours", ours), ("theirs", theirs))}
    calls = values | {"ci_low": round(bounds.low, 4), "ci_high": round(bounds.high, 4)}
    return {each.pop("figure"): each for each in paired} | {"found_at_calls": calls}


def found_at_calls(
    photographs: Iterable[Photograph], annotated: Int64[ndarray, "r n"], healthy: Int64[ndarray, "r m"]
) -> Float[ndarray, "r"]:
    """Share of the lesions found where a healthy photograph has CALLS false ones, of each resample."""
    listed = list(photographs)
    lesions, none = ([each.lesions[ROW] for each in listed if each.healthy is kind] for kind in (False, True))
    found = annotated @ np.stack([each.found for each in lesions])
    of = annotated @ np.array([each.lesions for each in lesions])
    false = healthy @ np.stack([each.false for each in none]) / healthy.sum(axis=1)[:, None]
    most = np.maximum.accumulate(false[:, ::-1], axis=1)[:, ::-1]
    return np.where(most <= CALLS, found / np.maximum(of, 1)[:, None], 0).max(axis=1)


def _sizes(photographs: Sequence[Photograph]) -> tuple[int, int]:
    healthy = sum(each.healthy for each in photographs)
    return len(photographs) - healthy, healthy


def _precision(annotated: Sequence[Photograph]) -> dict[str, float]:
    tally = pool(annotated)
    weights = draw_weights(len(annotated))
    bounds = interval(resampled_precision([each.pixels[ROW] for each in annotated], weights))
    once = np.ones((1, len(annotated)), np.int64)
    froc = float(resampled_sensitivity([each.lesions[ROW] for each in annotated], once)[0])
    values = {
        "average_precision": average_precision(tally.rows[ROW].pixels),
        "ci_low": bounds.low,
        "ci_high": bounds.high,
        "froc_mean": froc,
    }
    return {name: round(value, 4) for name, value in values.items()}


if __name__ == "__main__":
    main()
