"""The PRN over a region of interest in shared computation: overlapping patches share their feature maps.

Past the lattice's stride no layer skips a position: where the network halves its map, each of the four maps of every
other row and column goes on through the layers that follow, and their answers are woven together again. So the trunk's
last map is known at every lattice point, each value as the strided network has it (Giusti et al., ICIP 2013). On a CPU
the four go one after the other, so that later layers hold small maps. A patch's answer is the mean over its own
positions of that map. Departure from `patchwise`, the reference: the trunk sees the photograph around a patch, where a
patch alone is padded with zeros; it must have learnt to.
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

from ma_cluster.config import Recipe
from ma_cluster.images.reading import MID_GREY
from ma_cluster.machine import TileMap
from ma_cluster.networks import fold, normalise, probability
from ma_cluster.refinement.patchwise import Patchwise, interpolate, lattice_nodes, refine
from ma_cluster.refinement.resnet import STRIDE, Prn

_CORE_PX = 512  # largest side of a tile's core: larger ones share more and take more memory


class DensePrn(nn.Module):
    """Tiles, values about -1..1, -> logits of the patches that begin at every `stride_px`-th pixel. Inference only.

    A tile has `halo_px` of context on each side, as far as the trunk sees, so answers do not depend on where tiles lie.
    Context is dropped block by block, as soon as no later block sees it. Sides of tiles are multiples of 16.

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
        self.halo_px, self._crops = _contexts(self.trunk)
        self._splits = _unstride(self.trunk, stride_px)
        fold(self.trunk)
        weight, bias = model.classify.weight.detach(), model.classify.bias.detach()
        self.register_buffer("weight", (weight[1] - weight[0])[None, :, None, None])  # of the difference of logits
        self.register_buffer("bias", (bias[1] - bias[0])[None])

    def forward(self, x: Float[Tensor, "n 3 th tw"]) -> Float[Tensor, "n mh mw"]:
        scores = self.scores(x)
        side = self.patch_px // STRIDE  # classification commutes with the mean, and one channel is cheap to pool
        mean = scores.new_full((1, 1, side, side), 1 / side**2)
        return F.conv2d(scores, mean, dilation=STRIDE // self.stride_px)[:, 0]

    def scores(self, x: Float[Tensor, "n c h w"], block: int = 0) -> Float[Tensor, "n 1 mh mw"]:
        """The difference of logits at each position of the last map, `stride_px` apart, from the input of a block."""
        for number in range(block, len(self.trunk)):
            x = self.trunk[number](_shrink(x, self._crops[number]))
            if number in self._splits:
                phases = _phases(x)
                del x  # they take its place in memory
                at_a_time = len(phases) if phases.is_cuda else len(phases) // 4  # small maps stay in a CPU's cache
                return _woven(torch.cat([self.scores(some, number + 1) for some in phases.split(at_a_time)]))
        return F.conv2d(_shrink(x, self._crops[-1]), self.weight, self.bias)


def refine_dense(
    model: DensePrn, enhanced: UInt8[ndarray, "h w 3"], roi: Bool[ndarray, "h w"], tile_map: TileMap = map
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

    cores = list(_cores(nodes, _CORE_PX // stride, STRIDE // stride))
    for core, values in zip(cores, tile_map(look, cores), strict=True):  # in order, as cores may overlap
        within = lattice[core]
        within[:] = values[: within.shape[0], : within.shape[1]]
    return interpolate(lattice * nodes, roi.shape, stride) * roi


def as_run(network: nn.Module, recipe: Recipe) -> DensePrn | Patchwise:
    """A folded PRN as a recipe runs it."""
    stride_px = recipe.detector.prn_stride_px
    if not recipe.detector.prn_dense:
        return Patchwise(network, recipe.prn.cut_px, stride_px)
    assert isinstance(network, Prn)
    return DensePrn(network, recipe.prn.patch_px, stride_px)


def refine_any(
    prn: DensePrn | Patchwise, enhanced: UInt8[ndarray, "h w 3"], roi: Bool[ndarray, "h w"], tile_map: TileMap = map
) -> Float32[ndarray, "h w"]:
    """Probability that each ROI pixel is a lesion, 0 elsewhere, in the way that the PRN is run."""
    if isinstance(prn, DensePrn):
        return refine_dense(prn, enhanced, roi, tile_map)
    return refine(prn, enhanced, roi, tile_map)


@torch.inference_mode()
def _probability(model: DensePrn, tile: UInt8[ndarray, "th tw 3"]) -> Float32[ndarray, "mh mw"]:
    device = next(model.parameters()).device
    logits = model(normalise(torch.from_numpy(tile).permute(2, 0, 1)[None].to(device)))[0].float()
    return probability(logits).cpu().numpy()


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


def _contexts(trunk: nn.Sequential) -> tuple[int, list[int]]:
    """How far the trunk sees, pixels, rounded up to whole 16s; and what later blocks do not see of it: the positions
    that each side can do without before each block and after the last.

    In whole 16s, too, so that every phase of a map has as many positions, and the same first one.
    """
    reaches, spacings = [], [1]  # pixels that a block sees to each side; those between neighbours in its input
    for block in trunk:
        convolutions = _convolutions(block)
        reaches.append(max(conv.kernel_size[0] // 2 for conv in convolutions) * spacings[-1])
        spacings.append(spacings[-1] * max(conv.stride[0] for conv in convolutions))
    halo_px = left = -(-sum(reaches) // STRIDE) * STRIDE
    crops = []
    for number, spacing in enumerate(spacings):
        spare_px = (left - sum(reaches[number:])) // STRIDE * STRIDE
        crops.append(spare_px // spacing)
        left -= spare_px
    return halo_px, crops


def _unstride(trunk: nn.Sequential, stride_px: int) -> frozenset[int]:
    """Let no block skip positions past a stride of `stride_px`, and say after which ones the map has four phases."""
    splits, stride = set(), 1
    for number, block in enumerate(trunk):
        strided = [conv for conv in _convolutions(block) if conv.stride != (1, 1)]
        stride *= 2 if strided else 1
        if strided and stride > stride_px:
            splits.add(number)
            for conv in strided:
                conv.stride = (1, 1)
    return frozenset(splits)


def _convolutions(block: nn.Module) -> list[nn.Conv2d]:
    return [module for module in block.modules() if isinstance(module, nn.Conv2d)]


def _phases(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "4*n c hs ws"]:
    """Every other row and column, from the first and from the second on."""
    parts = [x[:, :, row::2, col::2] for row in (0, 1) for col in (0, 1)]
    return torch.cat(parts).contiguous(memory_format=torch.channels_last)


def _woven(phases: Float[Tensor, "m c h w"]) -> Float[Tensor, "n c 2*h 2*w"]:
    """The mirror of `_phases`."""
    four, channels, height, width = phases.shape
    apart = phases.reshape(2, 2, four // 4, channels, height, width)
    return apart.permute(2, 3, 4, 0, 5, 1).reshape(four // 4, channels, 2 * height, 2 * width)


def _shrink(x: Float[Tensor, "n c h w"], crop: int) -> Float[Tensor, "n c hs ws"]:
    return x[:, :, crop : x.shape[2] - crop, crop : x.shape[3] - crop]
