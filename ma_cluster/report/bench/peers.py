"""The hypothesis stage beside MONAI's sliding window and beside a bare loop; shared computation beside patches."""

from __future__ import annotations

import copy
import importlib
import itertools
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from numpy import ndarray
from torch import nn

from ma_cluster.bundle import load_weights
from ma_cluster.config import PrnConfig
from ma_cluster.errors import UsageError
from ma_cluster.evaluation.scoring import PixelCounts, average_precision
from ma_cluster.hypotheses.loss import lesion_probability
from ma_cluster.images.contrast import MID_GREY, Prepared
from ma_cluster.images.patches import Tiling
from ma_cluster.lesions.detector import Detector, Maps
from ma_cluster.networks.folding import fold
from ma_cluster.networks.tensors import normalise
from ma_cluster.networks.tile_executor import dedicate
from ma_cluster.refinement.dense import DensePrn, refine_dense
from ma_cluster.refinement.patchwise import Patchwise, lattice_nodes, refine
from ma_cluster.refinement.step import build_prn
from ma_cluster.report.bench.subject import Subject, hypothesis_network

NETWORKS = ("hgn_1x", "hgn_half")
MONAI_TILE, MONAI_OVERLAP = 512, 0.25
PAPER_PATCH_PX = PrnConfig().patch_px
ROI_SHARES, ROI_STRIDES, ROI_SIDE = (0.01, 1.0), (1, 4), 1024
PATCHES = 1024
"""As many are timed patch by patch; the seconds of all follow from their number."""

Map = Float32[ndarray, "h w"]


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


def monai(subject: Subject) -> Iterator[dict[str, Any]]:
    """The hypothesis stage against MONAI's `sliding_window_inference` with the same networks in plain torch.

    Once as `evaluate` needs it, each map whole, as MONAI makes them, and once as `detect` runs it.

    Raises:
        UsageError: MONAI is not installed.
    """
    try:
        sliding = importlib.import_module("monai.inferers").sliding_window_inference
    except ImportError as error:
        raise UsageError("MONAI is not installed: pip install 'ma_cluster[bench]'") from error
    torch.set_num_threads(subject.threads)
    bundle, photograph = subject.bundle(), subject.photograph()
    prepared = photograph.prepared(bundle.recipe.image)
    theirs: dict[str, Map] = {}

    def slide() -> None:
        for name in NETWORKS:
            network = hypothesis_network(bundle, name, subject.device, folded=False)
            enhanced = prepared.enhanced_1x if name == "hgn_1x" else prepared.enhanced_half
            whole = normalise(torch.from_numpy(enhanced).permute(2, 0, 1)[None].contiguous())
            with torch.inference_mode():
                logits = sliding(
                    whole.to(subject.device), (MONAI_TILE,) * 2, 1, network, overlap=MONAI_OVERLAP, mode="gaussian"
                )
            theirs[name] = lesion_probability(logits)[0].cpu().numpy()

    peer_seconds = subject.fastest(slide)
    detector = Detector(bundle, device=subject.device, threads=subject.threads)
    seconds = subject.fastest(lambda: detector.hypotheses(prepared))
    in_detect = min(detector.segment(prepared).seconds["hgn"] for _ in range(subject.repeats))
    maps = detector.hypotheses(prepared)
    yield {
        "monai_seconds": round(peer_seconds, 2),
        "seconds": round(seconds, 2),
        "speed_up": round(peer_seconds / seconds, 2),
        "seconds_in_detect": round(in_detect, 2),
        "speed_up_in_detect": round(peer_seconds / in_detect, 2),
        "difference_at_1x": _differences(maps.hgn_1x, theirs["hgn_1x"], prepared.fov_1x),
        **_precisions(prepared, photograph.truth, maps, theirs),
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


def _tiles(subject: Subject, prepared: Prepared, name: str) -> list[torch.Tensor]:
    """The tiles of a network as it takes them, in memory before the clock starts."""
    one = name == "hgn_1x"
    enhanced, fov = (prepared.enhanced_1x, prepared.fov_1x) if one else (prepared.enhanced_half, prepared.fov_half)
    config = subject.bundle().recipe.detector
    tiling = Tiling(fov.shape[0], fov.shape[1], config.tile_px, config.halo_px)
    padded = tiling.pad(enhanced, fill=MID_GREY)
    crops = [np.ascontiguousarray(tiling.crop(padded, window)) for window in tiling.covering(fov)]
    return [normalise(torch.from_numpy(crop).permute(2, 0, 1)[None].to(subject.device)) for crop in crops]


def _differences(ours: Map, theirs: Map, fov: Bool[ndarray, "h w"]) -> dict[str, float]:
    """Of two probability maps within the field of view. Both are cut into tiles, so the largest lie at their seams."""
    off = np.abs(ours - theirs)[fov]
    return {
        "median": round(float(np.median(off)), 6),
        "quantile_0.999": round(float(np.quantile(off, 0.999)), 5),
        "largest": round(float(off.max()), 4),
    }


def _precisions(
    prepared: Prepared, truth: Bool[ndarray, "h w"] | None, maps: Maps, theirs: dict[str, Map]
) -> dict[str, float]:
    """Average precision of the 1x map, ours and the peer's; nothing without a truth."""
    if truth is None:
        return {}
    known = prepared.grid.crop_mask(truth)
    pairs = {"average_precision_1x": maps.hgn_1x, "monai_average_precision_1x": theirs["hgn_1x"] * prepared.fov_1x}
    return {name: round(average_precision(PixelCounts.of(each, known)), 4) for name, each in pairs.items()}


def _darkest(enhanced: UInt8[ndarray, "h w 3"], share: float) -> Bool[ndarray, "h w"]:
    """The share of the pixels that is darkest in green, smoothed: blobs, as regions of interest are."""
    green = cv2.GaussianBlur(enhanced[:, :, 1].astype(np.float32), (0, 0), 3)
    return green <= np.quantile(green, share)
