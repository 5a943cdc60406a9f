"""A hypothesis network over a whole photograph: enhanced grid -> probability map, tile by tile within the FOV."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from numpy import ndarray
from torch import nn

from ma_cluster.hypotheses.fitting import hgn_probability
from ma_cluster.images.contrast import MID_GREY
from ma_cluster.images.patches import Tiling


def probability_map(
    model: nn.Module,
    enhanced: UInt8[ndarray, "h w 3"],
    fov: Bool[ndarray, "h w"],
    tiling: Tiling,
    batch_tiles: int = 1,
) -> Float32[ndarray, "h w"]:
    """Lesion probability of each pixel, 0 outside the FOV. Only tiles that meet the FOV are computed.

    Args:
        model: in eval mode.
        enhanced: the photograph on the network's grid.
        fov: its field of view.
        tiling: of the same shape.
        batch_tiles: tiles in one forward pass; does not change the answer. On a CPU one is fastest: it stays in cache.
    """
    windows = sorted(tiling.covering(fov), key=lambda window: window.shape)  # those of one shape make a batch
    padded = tiling.pad(enhanced, fill=MID_GREY)
    answers: list[Float32[ndarray, "_ _"]] = []
    for _, alike in groupby(windows, key=lambda window: window.shape):
        tiles = [tiling.crop(padded, window) for window in alike]
        for start in range(0, len(tiles), batch_tiles):
            batch = torch.from_numpy(np.stack(tiles[start : start + batch_tiles])).permute(0, 3, 1, 2)
            answers.extend(hgn_probability(model, batch).numpy())
    return tiling.stitch(windows, answers) * fov
