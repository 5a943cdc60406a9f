"""How the networks are run, for those who change it: `bench_networks.py engine halo dense growth --out FILE.json`.

    engine  the hypothesis stage beside a bare loop over the same tiles
    halo    how far a tiled answer lies from that of the whole photograph, and what is computed for it
    dense   the refinement of a region in shared computation beside patch by patch
    growth  time and memory as the photograph grows

Results and options are those of `ma-cluster bench`: each runs in a process of its own, ratios are of times of one run.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Bool, UInt8
from numpy import ndarray
from torch import nn

from ma_cluster.bundle import load_weights
from ma_cluster.config import PrnConfig
from ma_cluster.errors import UsageError
from ma_cluster.hypotheses.maps import probability_maps
from ma_cluster.images.patches import Tiling
from ma_cluster.images.reading import MID_GREY, Prepared
from ma_cluster.lesions.detector import Detector
from ma_cluster.machine import dedicate
from ma_cluster.networks import fold, normalise
from ma_cluster.refinement.dense import DensePrn, refine_dense
from ma_cluster.refinement.patchwise import Patchwise, lattice_nodes, refine
from ma_cluster.refinement.resnet import build_prn
from ma_cluster.report.bench import NETWORKS, Benchmark, Map, Rows, Subject, hypothesis_network, peak_mb, run_benchmarks

HALOS_PX = (0, 16, 32, 48, 64, 80, 96)
WHOLE_PX, KEPT_PX = 1024, 256
"""Side of the part of the 0.5x grid that is looked at whole, and of the kept parts it is cut into: many seams."""
PAPER_PATCH_PX = PrnConfig().patch_px
ROI_SHARES, ROI_STRIDES, ROI_SIDE = (0.01, 1.0), (1, 4), 1024
PATCHES = 1024
"""Patches that are timed one by one; the seconds of all follow from their number."""
GROWTH = (0.3, 0.5, 1.0, 1.44, 2.0)
"""Diameters of the canonical field of view over the model's: about 1 to 50 megapixels for one made at 12."""
_SMALLEST_PX = 256  # a configuration allows no smaller diameter


def main() -> None:
    """Run the benchmarks that are named, or all, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; all without a name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="lite")
    parser.add_argument("--image", type=Path, help="a photograph; without it one of `sample`, at 12 megapixels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=1, help="passes of which the fastest counts")
    settings = vars(parser.parse_args())
    names, out = settings.pop("names") or list(BENCHMARKS), settings.pop("out")

    def show(name: str, rows: Rows | str) -> None:
        sys.stdout.write(f"{name}  {rows if isinstance(rows, str) else json.dumps(rows)}\n")

    report = run_benchmarks({name: BENCHMARKS[name] for name in names}, Subject(**settings), show)
    out.write_text(json.dumps(report, indent=2) + "\n")


def engine(subject: Subject) -> Iterator[dict[str, Any]]:
    """What the detector's hypothesis stage makes of the networks: a bare loop over the same tiles is 1.

    Both on a process that is dedicated, a tile to each core.
    """
    bundle = subject.bundle()
    prepared = subject.photograph().prepared(bundle.recipe.image)
    work = [
        (hypothesis_network(bundle, name, subject.device, folded=True), tile)
        for name in NETWORKS
        for tile in _tiles(subject, prepared, name)
    ]

    @torch.inference_mode()
    def look(item: tuple[nn.Module, torch.Tensor]) -> None:
        network, tile = item
        network(tile)

    tile_map = dedicate(subject.threads)
    bare = subject.fastest(lambda: list(tile_map(look, work)))
    detector = Detector(bundle, device=subject.device, threads=subject.threads)
    ours = subject.fastest(lambda: detector.hypotheses(prepared))
    yield {
        "tiles": len(work),
        "megapixels": round(sum(tile[0, 0].numel() for _, tile in work) / 1e6, 2),
        "bare_seconds": round(bare, 2),
        "seconds": round(ours, 2),
        "efficiency": round(bare / ours, 3),
    }


def halo(subject: Subject) -> Iterator[dict[str, Any]]:
    """Differences in probability at 0.5x; and megapixels that the model's tiles would have over those of the FOV."""
    torch.set_num_threads(subject.threads)
    bundle = subject.bundle(flips_half=1)
    prepared = subject.photograph().prepared(bundle.recipe.image)
    network = hypothesis_network(bundle, "hgn_half", subject.device, folded=True)
    middle = tuple(slice(max(0, side - WHOLE_PX) // 2, (side + WHOLE_PX) // 2) for side in prepared.fov_half.shape)
    enhanced, fov = prepared.enhanced_half[middle], prepared.fov_half[middle]
    (height, width), full = fov.shape, prepared.fov_1x.shape
    whole = probability_maps(network, enhanced, np.ones_like(fov), Tiling(height, width, WHOLE_PX, 0))[0]
    for halo_px in HALOS_PX:
        tiled = probability_maps(network, enhanced, fov, Tiling(height, width, KEPT_PX + 2 * halo_px, halo_px))[0]
        off = np.abs(tiled - whole)[fov]
        tiling = Tiling(full[0], full[1], max(bundle.recipe.detector.tile_px, 2 * halo_px + 16), halo_px)
        computed = sum(window.shape[0] * window.shape[1] for window in tiling.covering(prepared.fov_1x))
        yield {
            "halo_px": halo_px,
            "mean_difference": float(f"{off.mean():.2g}"),
            "quantile_0.999": float(f"{np.quantile(off, 0.999):.2g}"),
            "largest": float(f"{off.max():.2g}"),
            "computed_over_fov_at_1x": round(computed / int(prepared.fov_1x.sum()), 2),
        }


def dense(subject: Subject) -> Iterator[dict[str, Any]]:
    """The refinement of a region in shared computation beside patch by patch, the reference: of the darkest hundredth
    of a square, and of all of it; with the model's patches and with the paper's, by the same network.

    Raises:
        UsageError: the model has no refinement.
    """
    tile_map = dedicate(subject.threads)
    bundle = subject.bundle()
    if "prn" not in bundle.weights:
        raise UsageError("the model has no refinement network; choose another with --model")
    config = bundle.recipe.prn
    network = build_prn(config)
    load_weights(network, bundle.weights["prn"], "prn")
    network.to(subject.device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    folded = copy.deepcopy(network)
    fold(folded)
    prepared = subject.photograph().prepared(bundle.recipe.image)
    enhanced = prepared.enhanced_1x if config.scale == "1x" else prepared.enhanced_half
    middle = tuple(slice(max(0, side - ROI_SIDE) // 2, (side + ROI_SIDE) // 2) for side in enhanced.shape[:2])
    enhanced = enhanced[middle]
    settings = itertools.product(sorted({config.patch_px, PAPER_PATCH_PX}), ROI_STRIDES, ROI_SHARES)
    for patch_px, stride, share in settings:
        shared = DensePrn(network, patch_px, stride).to(subject.device)
        patchwise = Patchwise(folded, patch_px + 2 * config.context_px, stride)
        roi = _darkest(enhanced, share)
        some = roi & (np.cumsum(roi).reshape(roi.shape) <= PATCHES * stride**2)
        answers: dict[str, Map] = {}
        fast = subject.fastest(lambda: answers.update(dense=refine_dense(shared, enhanced, roi, tile_map)))  # noqa: B023
        slow = subject.fastest(lambda: answers.update(exact=refine(patchwise, enhanced, some, tile_map)))  # noqa: B023
        nodes, timed = (int(lattice_nodes(each, stride).sum()) for each in (roi, some))
        slow *= nodes / timed
        yield {
            "patch_px": patch_px,
            "stride_px": stride,
            "roi_share": share,
            "patches": nodes,
            "patchwise_seconds": round(slow, 2),
            "dense_seconds": round(fast, 2),
            "speed_up": round(slow / fast, 2),
            "mean_difference": round(float(np.abs(answers["dense"] - answers["exact"])[some].mean()), 4),
        }


def growth(subject: Subject) -> Iterator[dict[str, Any]]:
    """Seconds and this process's largest memory so far as the canonical photograph grows, the smallest first."""
    bundle, data = subject.bundle(), subject.photograph().data
    diameters = (bundle.recipe.image.fov_diameter_px * factor for factor in GROWTH)
    for diameter in (each for each in diameters if each >= _SMALLEST_PX):
        image = replace(bundle.recipe.image, fov_diameter_px=diameter)
        sized = replace(bundle, recipe=replace(bundle.recipe, image=image))
        best = subject.fastest_detection(sized, data)
        total, megapixels = sum(best.seconds.values()), np.pi / 4 * diameter**2 / 1e6
        yield {
            "fov_diameter_px": round(diameter),
            "fov_megapixels": round(megapixels, 2),
            "seconds": {stage: round(value, 2) for stage, value in best.seconds.items()},
            "total_seconds": round(total, 2),
            "hgn_seconds_per_fov_megapixel": round(best.seconds["hgn"] / megapixels, 3),
            "peak_mb": peak_mb(),
        }


BENCHMARKS: dict[str, Benchmark] = {"engine": engine, "halo": halo, "dense": dense, "growth": growth}


def _tiles(subject: Subject, prepared: Prepared, name: str) -> list[torch.Tensor]:
    """The tiles of a network as it takes them, in memory before the clock starts."""
    one = name == "hgn_1x"
    enhanced, fov = (prepared.enhanced_1x, prepared.fov_1x) if one else (prepared.enhanced_half, prepared.fov_half)
    config = subject.bundle().recipe.detector
    tiling = Tiling(fov.shape[0], fov.shape[1], config.tile_px, config.halo_px)
    padded = tiling.pad(enhanced, fill=MID_GREY)
    crops = [np.ascontiguousarray(tiling.crop(padded, window)) for window in tiling.covering(fov)]
    return [normalise(torch.from_numpy(crop).permute(2, 0, 1)[None].to(subject.device)) for crop in crops]


def _darkest(enhanced: UInt8[ndarray, "h w 3"], share: float) -> Bool[ndarray, "h w"]:
    """The share of the pixels that is darkest in green, smoothed: blobs, as regions of interest are."""
    green = cv2.GaussianBlur(enhanced[:, :, 1].astype(np.float32), (0, 0), 3)
    return green <= np.quantile(green, share)


if __name__ == "__main__":
    main()
