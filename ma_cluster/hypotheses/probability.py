"""A hypothesis network over a whole photograph: enhanced grid -> probability map, tile by tile within the FOV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from numpy import ndarray
from torch import nn

from ma_cluster.hypotheses.step import hgn_probability
from ma_cluster.images.contrast import MID_GREY
from ma_cluster.images.patches import Tiling, Window
from ma_cluster.networks.tile_executor import ONE_AT_A_TIME, TileExecutor


def probability_map(
    model: nn.Module,
    enhanced: UInt8[ndarray, "h w 3"],
    fov: Bool[ndarray, "h w"],
    tiling: Tiling,
    executor: TileExecutor = ONE_AT_A_TIME,
) -> Float32[ndarray, "h w"]:
    """Lesion probability of each pixel, 0 outside the FOV. Only tiles that meet the FOV are computed.

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

    def answer(batch: Sequence[Window]) -> Iterable[Float32[ndarray, "_ _"]]:
        tiles = torch.from_numpy(np.stack([tiling.crop(padded, window) for window in batch])).permute(0, 3, 1, 2)
        return hgn_probability(model, tiles).numpy()

    alike = (tuple(same) for _, same in groupby(windows, key=lambda window: window.shape))
    batches = (same[start : start + executor.tiles] for same in alike for start in range(0, len(same), executor.tiles))
    return tiling.stitch(windows, [tile for tiles in executor.tile_map(answer, batches) for tile in tiles]) * fov
