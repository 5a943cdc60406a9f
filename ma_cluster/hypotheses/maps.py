"""Probability maps of whole photographs: of one network, of several scales and stages fused, and what they propose.

enhanced grid -> tiles within the FOV -> probability maps, one for each kind of lesion
maps of several scales and stages -> one        (Sarhan et al., section 2.4 and Figure 1)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from queue import LifoQueue

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt8
from numpy import ndarray
from torch import Tensor, nn

from ma_cluster.config import DetectorConfig, Fusion
from ma_cluster.hypotheses.frrn import kind_logits
from ma_cluster.images.patches import Tiling, Window
from ma_cluster.images.reading import MID_GREY
from ma_cluster.networks import ONE_AT_A_TIME, TileExecutor, normalise, probability

Map = Float32[ndarray, "ch cw"]
_ROUNDING = 1e-5  # far more than means of a few float32 probabilities are off by


@dataclass(frozen=True, slots=True)
class Maps:
    """The probability maps before fusion, on the canonical 1x grid. The PRN's are None in a bundle without one."""

    hgn_1x: Map
    hgn_half: Map
    prn_1x: Map | None
    prn_half: Map | None
    image_score: float | None = None
    """Of the photograph, from all that the 0.5x network tells apart; None of a model without a grading."""
    judged: Float32[ndarray, "hh hw"] | None = None
    """What the judge of candidates says, on the 0.5x grid; None of a model without one."""

    def stack(self) -> list[Map]:
        """The maps that are there, in order."""
        return [m for m in (self.hgn_1x, self.hgn_half, self.prn_1x, self.prn_half) if m is not None]

    def fused(self, config: DetectorConfig) -> Map:
        """The map that decides: the detector's mean, with its weights, of the maps that are there."""
        stack = self.stack()
        return fuse(stack, config.fusion, map_weights(config, len(stack)))


def map_weights(config: DetectorConfig, maps: int) -> list[float]:
    """The weights of the first so many maps of `Maps.stack`."""
    hypotheses = [config.weight_1x, 1.0]
    return [*hypotheses, *(config.weight_prn * weight for weight in hypotheses)][:maps]


def probability_maps(
    model: nn.Module,
    enhanced: UInt8[ndarray, "h w 3"],
    fov: Bool[ndarray, "h w"],
    tiling: Tiling,
    executor: TileExecutor = ONE_AT_A_TIME,
) -> Float32[ndarray, "k h w"]:
    """Probability of each kind of lesion against the background, 0 outside the FOV; microaneurysms are the first.

    Only tiles that meet the FOV are computed; where none does there is one map of zeros.

    Args:
        model: in eval mode.
        enhanced: the photograph on the network's grid.
        fov: its field of view.
        tiling: of the same shape.
        executor: tiles in a forward pass, and passes at a time; neither changes the answer.
    """
    # those of one shape make a batch; the largest first, as smaller ones fit into the memory that they leave
    windows = sorted(tiling.covering(fov), key=lambda window: window.shape, reverse=True)
    padded = tiling.pad(enhanced, fill=MID_GREY)

    def answer(batch: Sequence[Window]) -> Iterable[Float32[ndarray, "k _ _"]]:
        tiles = torch.from_numpy(np.stack([tiling.crop(padded, window) for window in batch])).permute(0, 3, 1, 2)
        return hgn_probability(model, tiles).numpy()

    alike = (tuple(same) for _, same in groupby(windows, key=lambda window: window.shape))
    batches = (same[start : start + executor.tiles] for same in alike for start in range(0, len(same), executor.tiles))
    if windows and next(model.parameters()).is_cuda:
        maps = _on_gpu(model, padded, list(batches), executor.dtype)[..., : fov.shape[0], : fov.shape[1]]
    else:
        maps = tiling.stitch(windows, [tile for tiles in executor.tile_map(answer, batches) for tile in tiles])
    return maps.reshape(-1, *fov.shape) * fov


def _on_gpu(
    model: nn.Module, padded: UInt8[ndarray, "ph pw 3"], batches: Sequence[Sequence[Window]], dtype: torch.dtype
) -> Float32[ndarray, "k ph pw"]:
    """The maps of a photograph that goes to the GPU once, whole, and comes back once.

    Each photograph in flight has its thread, and of those two at a time have a stream and pinned memory: while one's
    pixels are copied the other's networks run. More would take more memory and gain nothing.
    """
    device = next(model.parameters()).device
    with torch.inference_mode(), _one_of_two_streams(device) as stream, torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.default_stream(device))  # weights that a training has just changed
        pinned = torch.empty(padded.shape, dtype=torch.uint8, pin_memory=True)
        pinned.numpy()[:] = padded
        image = pinned.to(device, non_blocking=True)
        maps: Tensor | None = None
        for batch in batches:
            tiles = torch.stack([Tiling.crop(image, window) for window in batch]).permute(0, 3, 1, 2)
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                logits = model(normalise(tiles))
            answers = probability(kind_logits(logits.float()))
            if maps is None:
                maps = answers.new_zeros(answers.shape[1], *padded.shape[:2])
            for window, tile in zip(batch, answers, strict=True):
                Tiling.keep(maps, window, tile)
        assert maps is not None
        there = torch.empty(maps.shape, pin_memory=True).copy_(maps, non_blocking=True)
        stream.synchronize()
    return there.numpy()


@contextmanager
def _one_of_two_streams(device: torch.device) -> Iterator[torch.cuda.Stream]:
    free = _streams(device)
    stream = free.get()
    try:
        yield stream
    finally:
        free.put(stream)


@cache
def _streams(device: torch.device) -> LifoQueue[torch.cuda.Stream]:
    free: LifoQueue[torch.cuda.Stream] = LifoQueue()
    for _ in range(2):
        free.put(torch.cuda.Stream(device))
    return free


@torch.inference_mode()
def hgn_probability(model: nn.Module, patches: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n k h w"]:
    """Probability of each kind against the background (float32, on the CPU) of patches; the model is in eval mode."""
    device = next(model.parameters()).device
    return probability(kind_logits(model(normalise(patches.to(device))).float())).cpu()


def upsample_half(probability: Float32[ndarray, "hh hw"], shape: tuple[int, int]) -> Float32[ndarray, "h w"]:
    """The 0.5x map on the 1x grid of `shape`, bilinear, pixel centres aligned as `Grid` has them."""
    return cv2.resize(probability, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)


def fuse(
    maps: Sequence[Float32[ndarray, "h w"]], how: Fusion, weights: Sequence[float] | None = None
) -> Float32[ndarray, "h w"]:
    """Pixelwise mean: (w1 p1 + .. + wk pk) / W, or (p1^w1 .. pk^wk)^(1/W), which is 0 where any map is.

    W is w1 + .. + wk.

    Args:
        maps: of one shape, 0..1.
        how: which mean.
        weights: of each map, 1 where None. A map of weight 0 has no say.
    """
    used = [(m, np.float32(w)) for m, w in zip(maps, weights or [1.0] * len(maps), strict=True) if w > 0]
    arithmetic = how == "arithmetic"
    terms = (m if w == 1 else m * w if arithmetic else np.power(m, w) for m, w in used)
    total = next(terms).copy()
    for term in terms:
        np.add(total, term, out=total) if arithmetic else np.multiply(total, term, out=total)
    whole = np.float32(sum(w for _, w in used))
    return total / whole if arithmetic else np.power(total, 1 / whole)


def scale_odds(probability: Float32[ndarray, "h w"], factor: float) -> Float32[ndarray, "h w"]:
    """The probability whose odds p / (1 - p) are `factor` times as large; 0 and 1 stay, and so does the order."""
    return probability * np.float32(factor) / (1 + np.float32(factor - 1) * probability)


def can_reach(
    threshold: float,
    maps: Sequence[Float32[ndarray, "h w"]],
    regions: Sequence[Bool[ndarray, "h w"]],
    fusion: tuple[Fusion, Sequence[float]],
) -> Bool[ndarray, "h w"]:
    """Pixels whose fused probability may yet be `threshold` or more, before the maps of the regions are known.

    Such a map is 0 outside its region and at best 1 inside, and neither mean falls where a map rises. So they are

        arithmetic:  p1 + p2 + [in region 1] + [in region 2] >= 4 threshold
        geometric:   p1 p2 >= threshold^4, within both regions

    for equal weights. `fusion` is which mean, and the weights of the maps and then of the regions' maps.
    """
    best = fuse([*maps, *(region.astype(np.float32) for region in regions)], *fusion)
    return best >= threshold - _ROUNDING


def halved(mask: Bool[ndarray, "h w"]) -> Bool[ndarray, "hh hw"]:
    """Pixels at 0.5x of whose four one is set."""
    return mask[::2, ::2] | mask[1::2, ::2] | mask[::2, 1::2] | mask[1::2, 1::2]


def grown(mask: Bool[ndarray, "h w"], by_px: int) -> Bool[ndarray, "h w"]:
    """Pixels of a mask, and those that lie no further off, in rows and columns."""
    side = 2 * by_px + 1
    return cv2.dilate(mask.astype(np.uint8), np.ones((side, side), np.uint8)) > 0
