"""FRRN type A: Pohlen, Hermans, Mathias, Leibe, "Full-Resolution Residual Networks for Semantic Segmentation in Street
Scenes" (CVPR 2017, arXiv 1611.08323), Table 1 (a), the hypothesis network of Sarhan et al.

    stage                               pooling stream y    residual stream z
    stem    conv 5x5, BN, ReLU          /1   48
            3 x RU(48)                  /1   48
    split   conv 1x1, BN                                    /1  32
    down    maxpool, 3 x FRRU(96)       /2   96             /1  32
            maxpool, 4 x FRRU(192)      /4  192             /1  32
            maxpool, 2 x FRRU(384)      /8  384             /1  32
            maxpool, 2 x FRRU(384)      /16 384             /1  32
    up      upsample, 2 x FRRU(192)     /8  192             /1  32
            upsample, 2 x FRRU(192)     /4  192             /1  32
            upsample, 2 x FRRU(96)      /2   96             /1  32
    merge   upsample, concat            /1  128 = 96 + 32
            3 x RU(48)                  /1   48
            conv 1x1                    /1  classes

Departures: `width` scales every channel count, rounded to multiples of 8, which convolution kernels want (1 is the
published network; 17,745,970 parameters at two classes). z is never updated at full size: what a unit adds is constant
over its pooling window, so the maximum over the window grows by just that, max(z + c) = max(z) + c, and each scale
keeps z pooled and the sum of what was added. Full size is read once and written once, instead of 17 times each.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ma_cluster.config import HgnConfig
from ma_cluster.networks import Join

STRIDE = 16
"""Overall stride of the pooling stream: input sides are multiples of it."""


def _conv_bn(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


def _conv_bn_relu(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return _conv_bn(inputs, outputs, kernel).append(nn.ReLU(inplace=True))


class ResidualUnit(nn.Module):
    """x + BN(conv3(ReLU(BN(conv3(x))))); nothing after the sum. A 1x1 projection on the skip where channels change."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = _conv_bn_relu(inputs, outputs, 3)
        self.second = _conv_bn(outputs, outputs, 3)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Float[Tensor, "n c h w"] | tuple[Tensor, Tensor]) -> Float[Tensor, "n d h w"]:
        return self.second(self.first(x)).add_(self.skip(x))


class FullResolutionResidualUnit(nn.Module):
    """y' = f(y, pool(z)), and conv1(y'), which z gains at each pixel of the window that was pooled."""

    def __init__(self, inputs: int, outputs: int, residual: int) -> None:
        super().__init__()
        self.join = Join()
        self.first = _conv_bn_relu(inputs + residual, outputs, 3)
        self.second = _conv_bn_relu(outputs, outputs, 3)
        self.back = nn.Conv2d(outputs, residual, 1)

    def forward(
        self, y: Float[Tensor, "n c hs ws"], pooled: Float[Tensor, "n r hs ws"]
    ) -> tuple[Float[Tensor, "n d hs ws"], Float[Tensor, "n r hs ws"]]:
        y = self.second(self.first(self.join(y, pooled)))
        return y, self.back(y)


class Stage(nn.ModuleList):
    """`units` FRRUs of one scale in a row, y' of one the y of the next; and what z gained from all of them."""

    def __init__(self, inputs: int, outputs: int, residual: int, units: int) -> None:
        sizes = [inputs] + [outputs] * (units - 1)
        super().__init__([FullResolutionResidualUnit(size, outputs, residual) for size in sizes])

    def forward(
        self, y: Float[Tensor, "n c hs ws"], pooled: Float[Tensor, "n r hs ws"]
    ) -> tuple[Float[Tensor, "n d hs ws"], Float[Tensor, "n r hs ws"]]:
        first, *others = self
        y, gained = first(y, pooled)
        for unit in others:
            y, more = unit(y, pooled + gained)
            gained = gained + more
        return y, gained


class Frrn(nn.Module):
    """FRRN-A. `forward` maps enhanced patches, values about -1..1, sides multiples of 16, to logits of each class."""

    def __init__(self, width: float = 1.0, classes: int = 2) -> None:
        super().__init__()
        base, residual = _channels(48, width), _channels(32, width)
        self.stem = nn.Sequential(_conv_bn_relu(3, base, 5))
        self.stem_units = nn.Sequential(*[ResidualUnit(base, base) for _ in range(3)])
        self.split = _conv_bn(base, residual, 1)
        channels = base
        self.down = nn.ModuleList()
        for outputs, units in ((96, 3), (192, 4), (384, 2), (384, 2)):
            self.down.append(Stage(channels, _channels(outputs, width), residual, units))
            channels = _channels(outputs, width)
        self.up = nn.ModuleList()
        for outputs, units in ((192, 2), (192, 2), (96, 2)):
            self.up.append(Stage(channels, _channels(outputs, width), residual, units))
            channels = _channels(outputs, width)
        self.join = Join()
        first = ResidualUnit(channels + residual, base)
        self.merge_units = nn.Sequential(first, ResidualUnit(base, base), ResidualUnit(base, base))
        self.head = nn.Conv2d(base, classes, 1)
        self.apply(_he_uniform)

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n k h w"]:
        y = self.stem_units(self.stem(x))
        z = self.split(y)
        y, gained = self._pooling_stream(y, z)
        z = _spread2(gained).add_(z)
        return self.head(self.merge_units(self.join(_upsample2(y), z)))

    def _pooling_stream(
        self, y: Float[Tensor, "n c h w"], z: Float[Tensor, "n r h w"]
    ) -> tuple[Float[Tensor, "n d hs ws"], Float[Tensor, "n r hs ws"]]:
        """y after the way down and up, at half the size, and all that z gained, there too."""
        pooled, passed = z, []
        for stage in self.down:
            pooled = F.max_pool2d(pooled, 2)
            y, gained = stage(F.max_pool2d(y, 2), pooled)
            pooled = pooled + gained
            passed.append((pooled, gained))
        passed.pop()  # the way up turns at the last scale
        for stage in self.up:
            pooled, before = passed.pop()
            coarser = _spread2(gained)
            y, gained = stage(_upsample2(y), pooled + coarser)
            gained = before + coarser + gained
        return y, gained


def _channels(published: int, width: float) -> int:
    return max(8, 8 * round(published * width / 8))


def _upsample2(y: Tensor) -> Tensor:
    return F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)


def _spread2(gained: Tensor) -> Tensor:
    """The same at each of the 2 x 2 pixels that were pooled."""
    return F.interpolate(gained, scale_factor=2, mode="nearest")


def _he_uniform(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build_hgn(config: HgnConfig, kinds: int = 1) -> Frrn:
    """The network of a recipe, freshly initialised: an output for the background, and one for each kind of lesion."""
    return Frrn(config.width, classes=1 + kinds)


def kind_logits(logits: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k h w"]:
    """Logits of c classes, the background first -> of each of the k = c - 1 kinds against the background."""
    return logits[:, 1:] - logits[:, :1]


def kinds_in(weights: Mapping[str, Tensor]) -> int:
    """How many kinds of lesion a network of these weights tells from the background; 1 where its head is missing."""
    return len(weights["head.bias"]) - 1 if "head.bias" in weights else 1


def of_kinds(weights: Mapping[str, Tensor], kinds: int) -> dict[str, Tensor]:
    """The weights of a network of fewer kinds -> those of one of so many, to whose other outputs nothing leads yet."""
    missing = {key: 1 + kinds - len(value) for key, value in weights.items() if key.startswith("head.")}
    return {
        key: torch.cat([value, value.new_zeros(missing[key], *value.shape[1:])]) if missing.get(key, 0) > 0 else value
        for key, value in weights.items()
    }
