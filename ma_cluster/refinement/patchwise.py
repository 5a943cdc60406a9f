"""The PRN over a region of interest, patch by patch: the paper's exact reading, the reference for faster ones."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from numpy import ndarray
from torch import Tensor, nn

from ma_cluster.images.reading import MID_GREY
from ma_cluster.machine import TileMap
from ma_cluster.networks import normalise, probability

BATCH = 32
"""Patches in one forward pass, whose feature maps then stay in a CPU's cache: 512 take a tenth longer."""


@dataclass(frozen=True, slots=True)
class Patchwise:
    """A network, and the patches that it is shown."""

    model: nn.Module
    patch_px: int
    """Side, with any context."""
    stride_px: int
    """From one patch to the next, across and down."""


def refine(
    prn: Patchwise, enhanced: UInt8[ndarray, "h w 3"], roi: Bool[ndarray, "h w"], tile_map: TileMap = map
) -> Float32[ndarray, "h w"]:
    """Probability that each ROI pixel is a lesion, 0 elsewhere.

    The network sees the patch around every `stride_px`-th pixel of every `stride_px`-th row; between them the answer is
    interpolated bilinearly. Stride 1 looks at every ROI pixel and interpolates nothing.

        stride 2, ROI pixels 3 and 4:   lattice 0 . 2 . 4 . 6     3 = (2 + 4) / 2, so 2 and 4 are computed, 6 is not
    """
    patch_px, stride_px = prn.patch_px, prn.stride_px
    nodes = lattice_nodes(roi, stride_px)
    rows, cols = np.nonzero(nodes)
    lattice = np.zeros(nodes.shape, dtype=np.float32)
    half = patch_px // 2
    after = half + stride_px  # the lattice's last points may lie beyond the grid
    padded = np.pad(enhanced, ((half, after), (half, after), (0, 0)), constant_values=MID_GREY)
    views = np.lib.stride_tricks.sliding_window_view(padded, (patch_px, patch_px), axis=(0, 1))  # row col 3 s s

    def look(part: slice) -> Float32[ndarray, "b"]:
        patches = torch.from_numpy(views[rows[part] * stride_px, cols[part] * stride_px])
        patches = patches.contiguous(memory_format=torch.channels_last)
        return prn_probability(prn.model, patches).numpy()

    parts = [slice(start, start + BATCH) for start in range(0, len(rows), BATCH)]
    for part, values in zip(parts, tile_map(look, parts), strict=True):
        lattice[rows[part], cols[part]] = values
    return interpolate(lattice, roi.shape, stride_px) * roi


def lattice_nodes(roi: Bool[ndarray, "h w"], stride_px: int) -> Bool[ndarray, "lh lw"]:
    """The lattice points whose value some ROI pixel's interpolation needs."""
    height, width = (-(-(side - 1) // stride_px) + 1 for side in roi.shape)
    if stride_px == 1:
        return roi
    nodes = np.zeros((height, width), dtype=bool)
    rows, cols = np.nonzero(roi)
    low_row, low_col = rows // stride_px, cols // stride_px
    high_row, high_col = -(-rows // stride_px), -(-cols // stride_px)
    for row in (low_row, high_row):
        for col in (low_col, high_col):
            nodes[row, col] = True
    return nodes


def interpolate(lattice: Float32[ndarray, "lh lw"], shape: tuple[int, int], stride_px: int) -> Float32[ndarray, "h w"]:
    """Values at multiples of `stride_px` -> every pixel of `shape`, bilinear."""
    if stride_px == 1:
        return lattice
    down = np.array([[1 / stride_px, 0, 0], [0, 1 / stride_px, 0]])
    return cv2.warpAffine(lattice, down, shape[::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


@torch.inference_mode()
def prn_probability(model: nn.Module, patches: UInt8[Tensor, "n 3 s s"]) -> Float32[Tensor, "n"]:
    """Probability that the centre pixel of each patch is a lesion; the model is in eval mode."""
    device = next(model.parameters()).device
    _, logits = model(normalise(patches.to(device)))
    return probability((logits[:, 1] - logits[:, 0]).float()).cpu()
