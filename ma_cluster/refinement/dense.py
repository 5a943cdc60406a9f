"""The PRN over a region of interest in shared computation: overlapping patches share their feature maps.

Every convolution past the lattice's stride is dilated instead of strided, so one pass gives the trunk's last map at
every lattice point, each value as the strided network has it (Giusti et al., ICIP 2013; "à trous": Chen et al., ICLR
2015). A patch's answer is the mean over its own positions of that map. Departure from `patchwise`, the reference: the
trunk sees the photograph around a patch, where a patch alone is padded with zeros; it must have learnt to.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from numpy import ndarray
from torch import Tensor, nn

from ma_cluster.hypotheses.dedication import Spread
from ma_cluster.hypotheses.fitting import normalise
from ma_cluster.hypotheses.folding import fold
from ma_cluster.images.contrast import MID_GREY
from ma_cluster.refinement.patchwise import interpolate, lattice_nodes
from ma_cluster.refinement.resnet import STRIDE, Prn

_CORE_PX, _CORE_NODES = 512, 128  # largest side of a tile's core: larger share more and take more memory


class DensePrn(nn.Module):
    """Tiles, values about -1..1, -> logits of the patches that begin at every `stride_px`-th pixel. Inference only.

    A tile has `halo_px` of context on each side, as far as the trunk sees, so answers do not depend on where tiles lie.
    Context is dropped block by block, as soon as no later block sees it.

    A patch takes the positions 16 pixels apart from its first on. Patch 32, stride 8:

        pixel   0   8  16  24  32  40
        value   0   1   2   3   4   5
        patch   a   b   a   b              the next begins at pixel 16 and takes values 2 and 4
    """

    weight: Float[Tensor, "1 d 1 1"]
    bias: Float[Tensor, "1"]

    def __init__(self, model: Prn, patch_px: int, stride_px: int) -> None:
        """Copy a trained network.

        Raises:
            ValueError: the stride does not divide the network's, or the patch is no multiple of it.
        """
        super().__init__()
        if stride_px < 1 or STRIDE % stride_px or patch_px < STRIDE or patch_px % STRIDE:
            raise ValueError(
                f"patch_px {patch_px} must be a multiple of {STRIDE} and stride_px {stride_px} a divisor of it; "
                "other strides need the patchwise PRN"
            )
        self.patch_px, self.stride_px = patch_px, stride_px
        self.trunk = copy.deepcopy(nn.Sequential(model.stem, *model.stages)).eval()
        spacings, reaches = _dilate(self.trunk, stride_px)
        self.halo_px = -(-sum(reaches) // STRIDE) * STRIDE
        self._crops = _crops(spacings, reaches, self.halo_px)
        fold(self.trunk)
        weight, bias = model.classify.weight.detach(), model.classify.bias.detach()
        self.register_buffer("weight", (weight[1] - weight[0])[None, :, None, None])  # of the difference of logits
        self.register_buffer("bias", (bias[1] - bias[0])[None])

    def forward(self, x: Float[Tensor, "n 3 th tw"]) -> Float[Tensor, "n mh mw"]:
        *before, last = self._crops
        for block, crop in zip(self.trunk, before, strict=True):
            x = block(_shrink(x, crop))
        scores = F.conv2d(_shrink(x, last), self.weight, self.bias)
        side = self.patch_px // STRIDE  # classification commutes with the mean, and one channel is cheap to pool
        mean = scores.new_full((1, 1, side, side), 1 / side**2)
        return F.conv2d(scores, mean, dilation=STRIDE // self.stride_px)[:, 0]


def refine_dense(
    model: DensePrn, enhanced: UInt8[ndarray, "h w 3"], roi: Bool[ndarray, "h w"], spread: Spread = map
) -> Float32[ndarray, "h w"]:
    """Probability that each ROI pixel is a lesion, 0 elsewhere; between lattice points interpolated bilinearly.

    Mid-grey lies beyond the grid. Only tiles that hold a needed lattice point are computed.
    """
    stride = model.stride_px
    nodes = lattice_nodes(roi, stride)
    lattice = np.zeros(nodes.shape, dtype=np.float32)
    margin = model.patch_px // 2 + model.halo_px
    pads = (margin, margin + 2 * STRIDE)  # the lattice's last points, and the last core, may lie beyond the grid
    padded = np.pad(enhanced, (pads, pads, (0, 0)), constant_values=MID_GREY)

    def look(core: tuple[slice, slice]) -> Float32[ndarray, "mh mw"]:
        return _probability(model, padded[_tile(core[0], model), _tile(core[1], model)])

    cores = list(_cores(nodes, min(_CORE_PX, _CORE_NODES * stride) // stride, STRIDE // stride))
    for core, values in zip(cores, spread(look, cores), strict=True):  # in order, as cores may overlap
        within = lattice[core]
        within[:] = values[: within.shape[0], : within.shape[1]]
    return interpolate(lattice * nodes, roi.shape, stride) * roi


@torch.inference_mode()
def _probability(model: DensePrn, tile: UInt8[ndarray, "th tw 3"]) -> Float32[ndarray, "mh mw"]:
    device = next(model.parameters()).device
    logits = model(normalise(torch.from_numpy(tile).permute(2, 0, 1)[None].to(device)))[0].float()
    return torch.sigmoid(logits).cpu().numpy()


def _cores(nodes: Bool[ndarray, "lh lw"], side: int, multiple: int) -> Iterator[tuple[slice, slice]]:
    """Rectangles that hold every node: the squares of a grid, each drawn tight, its sides whole multiples."""
    for row in range(0, nodes.shape[0], side):
        for col in range(0, nodes.shape[1], side):
            inside = nodes[row : row + side, col : col + side]
            if inside.any():
                rows, cols = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
                yield _tight(rows + row, multiple), _tight(cols + col, multiple)


def _tight(needed: Int64[ndarray, "n"], multiple: int) -> slice:
    """From the first of ascending numbers to past the last, its length rounded up to a multiple."""
    first, length = int(needed[0]), int(needed[-1] - needed[0]) + 1
    return slice(first, first + -(-length // multiple) * multiple)


def _tile(core: slice, model: DensePrn) -> slice:
    """The pixels, of the padded photograph, that the nodes of a core need along one axis.

    A node's patch begins, padded, `halo_px` past the node's own number of pixels, and its last position lies 16 pixels
    before the patch's end.
    """
    context = model.patch_px - STRIDE + 2 * model.halo_px
    return slice(core.start * model.stride_px, core.stop * model.stride_px + context)


def _dilate(trunk: nn.Sequential, stride_px: int) -> tuple[list[int], list[int]]:
    """Let strides end at `stride_px` in all; kernels on a map that stays denser than it was skip what is new.

        stride 4:   conv4, 3x3 stride 2 on /4, then 3x3 on /8   ->   3x3 stride 1 on /4, then 3x3 dilated by 2 on /4

    Returns:
        Pixels of the tile between neighbours in each block's input and in the last map; and how many pixels to each
        side an output of each block sees of its input.
    """
    spacings, reaches = [], []
    before = 1  # pixels between neighbours in the block's input, in the network as it was
    for block in trunk:
        convolutions = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
        spacings.append(min(before, stride_px))
        reaches.append(max(conv.kernel_size[0] // 2 for conv in convolutions) * before)
        step = max(conv.stride[0] for conv in convolutions)
        apart = before // spacings[-1]
        for conv in convolutions:
            conv.stride = (min(before * conv.stride[0], stride_px) // spacings[-1],) * 2
            conv.dilation = (apart, apart)
            conv.padding = (conv.kernel_size[0] // 2 * apart,) * 2
        before *= step
    return [*spacings, min(before, stride_px)], reaches


def _crops(spacings: list[int], reaches: list[int], halo_px: int) -> list[int]:
    """Values that each side can do without before each block and after the last: what later blocks do not see.

    In whole steps of the last map, so that strides keep their phase.
    """
    crops = []
    for number, spacing in enumerate(spacings):
        spare_px = (halo_px - sum(reaches[number:])) // spacings[-1] * spacings[-1]
        crops.append(spare_px // spacing)
        halo_px -= spare_px
    return crops


def _shrink(x: Float[Tensor, "n c h w"], crop: int) -> Float[Tensor, "n c hs ws"]:
    return x[:, :, crop : x.shape[2] - crop, crop : x.shape[3] - crop]
