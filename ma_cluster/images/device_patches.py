"""Patches cut and augmented where the network is trained: photographs lie in a GPU's memory, 4 bytes a pixel.

`cut` on a CPU takes milliseconds a patch, and a GPU trains on a thousand in a second. The numbers of the patches
(`Cuts`) are the same, and so are the patches, but for rounding and the noise, which is of the same size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped, UInt8
from numpy import ndarray
from torch import Tensor

from ma_cluster.images.annotated import SYMMETRIES, Annotated, Cuts, planes, turn
from ma_cluster.images.reading import MID_GREY

_TAPS = 4  # on each side of a blurred pixel: four of the widest standard deviations
_FILL = MID_GREY * 0x010101  # mid-grey and no lesion


class DevicePatches:
    """Photographs of a data set on a device, one after the other.

    A pixel is a word, marks << 24 | B << 16 | G << 8 | R, the marks the bits of `Annotated.kinds`.
    """

    def __init__(self, photographs: Sequence[Annotated], device: torch.device) -> None:
        sizes = [photograph.fov.shape for photograph in photographs]
        self._heights, self._widths = (torch.tensor([size[axis] for size in sizes], device=device) for axis in (0, 1))
        pixels = self._heights * self._widths
        self._starts = pixels.cumsum(0) - pixels
        self._words = torch.empty(int(pixels.sum()), dtype=torch.int32, device=device)
        for start, photograph in zip(self._starts.tolist(), photographs, strict=True):
            words = np.dstack([photograph.enhanced, planes(photograph)]).view(np.int32).reshape(-1)
            self._words[start : start + len(words)] = torch.from_numpy(words).to(device)

    @staticmethod
    def bytes_of(photographs: Sequence[Annotated]) -> int:
        """Memory that they take."""
        return sum(4 * photograph.fov.size for photograph in photographs)

    @torch.no_grad()
    def cut(self, cuts: Cuts, size: int) -> tuple[UInt8[Tensor, "n s s 3"], UInt8[Tensor, "n s s"]]:
        """What `annotated.cut` returns, on the device."""
        device = self._words.device
        images = _sent(cuts.centres[:, 0].astype(np.int64), device)
        rows, cols = self._places(cuts, size)
        marks = (self._at(images, rows.round().long(), cols.round().long()) >> 24 & 255).to(torch.uint8)
        light = self._bilinear(images, rows, cols)
        light = (light - MID_GREY) * self._number(cuts.gains) + MID_GREY
        if cuts.changes is not None:
            changes = cuts.changes
            if changes.blurs.any():
                light = _blurred(light, _sent(changes.blurs.astype(np.float32), device))
            if changes.noises.any():
                generator = torch.Generator(device).manual_seed(int(changes.seeds[0]))
                noise = torch.randn(light.shape, generator=generator, device=device)
                light = light + self._number(changes.noises[:, None]) * noise
            light = light + self._number(changes.offsets)
        return light.round().clamp(0, 255).to(torch.uint8), marks

    def _number(self, values: Float[ndarray, "n c"]) -> Float[Tensor, "n 1 1 c"]:
        """Of each patch, or of each of its channels."""
        return _sent(values.astype(np.float32), self._words.device)[:, None, None]

    def _places(self, cuts: Cuts, size: int) -> tuple[Float[Tensor, "n s s"], Float[Tensor, "n s s"]]:
        """Row and column of the photograph at each pixel of the patches: turned back, and so much nearer together.

        (row, col) = centre + (cos / zoom) (i, j) + (sin / zoom) (j, -i), with i and j from the patch's own centre.
        """
        device, changes, count = self._words.device, cuts.changes, len(cuts)
        degrees, zooms = (np.zeros(count), np.ones(count)) if changes is None else (changes.degrees, changes.zooms)
        angles, symmetries = np.deg2rad(degrees), _sent(cuts.symmetries.astype(np.int64), device)
        straight, across = (self._number((of(angles) / zooms)[:, None])[..., 0] for of in (np.cos, np.sin))
        row, col = (self._number(cuts.centres[:, axis, None].astype(float))[..., 0] for axis in (1, 2))
        i, j = _turns(size, device)[symmetries].unbind(dim=1)
        return row + straight * i + across * j, col + straight * j - across * i

    def _at(
        self, images: Int64[Tensor, "n"], rows: Int64[Tensor, "n s s"], cols: Int64[Tensor, "n s s"]
    ) -> Int64[Tensor, "n s s"]:
        """Words of photographs, mid-grey beyond their edges."""
        heights, widths, starts = (part[images][:, None, None] for part in (self._heights, self._widths, self._starts))
        inside = (rows >= 0) & (rows < heights) & (cols >= 0) & (cols < widths)
        words = self._words[torch.where(inside, starts + rows * widths + cols, 0)].long()
        return torch.where(inside, words, _FILL)

    def _bilinear(
        self, images: Int64[Tensor, "n"], rows: Float[Tensor, "n s s"], cols: Float[Tensor, "n s s"]
    ) -> Float[Tensor, "n s s 3"]:
        """Channels between pixels, rounded to whole grey levels as OpenCV has them."""
        top, left = rows.floor(), cols.floor()
        down, across = rows - top, cols - left
        light = rows.new_zeros(*rows.shape, 3)
        for row, of_row in ((0, 1 - down), (1, down)):
            for col, of_col in ((0, 1 - across), (1, across)):
                words = self._at(images, top.long() + row, left.long() + col)
                channels = torch.stack([words >> shift & 255 for shift in (0, 8, 16)], dim=-1)
                light += (of_row * of_col)[..., None] * channels
        return light.round()


def _sent(values: Shaped[ndarray, "..."], device: torch.device) -> Shaped[Tensor, "..."]:
    """On the device, without waiting for all that it was told before: threads that cut would wait for the training."""
    return torch.from_numpy(values).to(device, non_blocking=True)


@lru_cache(maxsize=4)
def _turns(size: int, device: torch.device) -> Float[Tensor, "8 2 s s"]:
    """Row and column from the centre, before each symmetry, of what lies at each pixel after it."""
    indices = np.moveaxis(np.indices((size, size)) - size // 2, 0, 2)
    turned = np.stack([turn(indices, symmetry) for symmetry in range(SYMMETRIES)])
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(turned, 3, 1))).to(device, torch.float32)


def _blurred(light: Float[Tensor, "n s s 3"], sigmas: Float[Tensor, "n"]) -> Float[Tensor, "n s s 3"]:
    """Each patch by a Gaussian of its own; one of 0 leaves it as it is."""
    count, size = light.shape[:2]
    offsets = torch.arange(-_TAPS, _TAPS + 1, device=light.device, dtype=torch.float32)
    kernels = torch.exp(-0.5 * (offsets / sigmas.clamp(min=1e-3)[:, None]) ** 2)
    kernels = (kernels / kernels.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)
    channels = F.pad(light.permute(0, 3, 1, 2), (_TAPS,) * 4, mode="reflect").flatten(0, 1)[None]
    channels = F.conv2d(channels, kernels[:, None, :, None], groups=3 * count)
    channels = F.conv2d(channels, kernels[:, None, None, :], groups=3 * count)
    return channels.reshape(count, 3, size, size).permute(0, 2, 3, 1)
