"""What both stages share: how a network is trained, and how it is asked.

trained    losses of a mini-batch, their sums over workers -> optimiser, learning rate by step, descent, average
asked      patches -> normalised -> network, folded (the same answers, faster), under flips, tile by tile -> probability
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Float32, UInt8
from numpy import ndarray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ma_cluster.config import HgnConfig, PrnConfig
from ma_cluster.errors import UsageError
from ma_cluster.machine import TileMap, dedicate

log = logging.getLogger(__name__)
_GPU_TILES = 8  # the largest feature maps of the paper's network on tiles of 512 are then 0.4 GB each; never timed
FLIPS: tuple[tuple[int, ...], ...] = ((), (3,), (2, 3), (2,))
"""Axes of n c h w that are flipped: none, left-right, both, up-down."""
Patches = UInt8[ndarray, "n s s 3"] | UInt8[Tensor, "n s s 3"]
"""As they are cut, on the host or on a device."""
Precision = Literal["float32", "bfloat16"]
Reduce = Callable[[Tensor], Tensor]
"""Sums (k) of this part of a mini-batch -> sums of the whole mini-batch, where several workers share one."""


def channels_first(patches: Patches) -> UInt8[Tensor, "n 3 s s"]:
    """Patches as they are cut, in the layout that the network takes."""
    return torch.as_tensor(patches).permute(0, 3, 1, 2)


def normalise(patches: UInt8[Tensor, "n 3 h w"]) -> Tensor:
    """0..255 -> about -1..1, mid-grey (no local contrast, outside the FOV) -> 0. Every network's input."""
    return (patches.float() - 128.0) / 128.0


def probability(logit: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Sigmoid of a difference of logits; NaN also where that is infinite, or an overflow would pass as certainty."""
    return torch.where(logit.isfinite(), torch.sigmoid(logit), torch.nan)


def local(sums: Float[Tensor, "k"]) -> Float[Tensor, "k"]:
    """The reduce of a single worker: its part is the whole."""
    return sums


def reduced_mean(values: Float[Tensor, "..."], reduce: Reduce) -> Float[Tensor, ""]:
    """Mean over the whole mini-batch, however it is shared out."""
    total, count = reduce(torch.stack([values.sum(), values.new_tensor(values.numel())]))
    return total / count


@dataclass(frozen=True, slots=True)
class Losses:
    """The first half of a step: a mini-batch's loss."""

    terms: dict[str, Float[Tensor, ""]]
    total: Float[Tensor, ""]
    """Weighted sum of the terms; carries the gradient."""
    negatives: Float32[Tensor, "n"] | None = None
    """Cross entropy of each negative of this worker's part, where the ledger is to hear of them."""

    def values(self) -> dict[str, Float[Tensor, ""]]:
        """The terms and their sum without their gradients, still on the device: to ask for a number is to wait."""
        return {name: term.detach() for name, term in (self.terms | {"total": self.total}).items()}


def build_optimizer(model: nn.Module, config: HgnConfig | PrnConfig) -> torch.optim.AdamW:
    """Adam with decoupled weight decay on kernels only; biases and batch-norm scales are free."""
    kernels = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=kernels[0].is_cuda or None)


def learning_rate(step: int, config: HgnConfig | PrnConfig, spent: float = 0.0) -> float:
    """Rate at a step: linear from 0 over the warm-up, then a half cosine that ends at 0 after `config.steps`, or where
    all of a run's time is `spent` (0..1).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, max(progress, spent))))


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, total: Float[Tensor, ""], rate: float) -> None:
    """The second half of any network's step: gradient, clipped to norm 1, and the optimiser at a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


class WeightAverage:
    """The exponential moving average of a network's weights and running statistics, as a network of its own."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """With a decay of 0 it is the network itself."""
        self.network = copy.deepcopy(model) if decay else model
        self._decay = decay
        ours, theirs = self.network.state_dict(), model.state_dict()
        pairs = [(ours[name], theirs[name]) for name in ours]
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counts = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the step of this number; at first it follows closely, or it would keep the first weights for long."""
        if not self._decay:
            return
        ours, theirs = map(list, zip(*self._averaged, strict=True))
        torch._foreach_lerp_(ours, theirs, 1 - min(self._decay, (1 + step) / (10 + step)))
        for own, other in self._counts:
            own.copy_(other)


@dataclass(frozen=True, slots=True)
class TileExecutor:
    """How the tiles of a photograph go through a network."""

    tiles: int = 1
    """In one forward pass. On a CPU one is fastest: it stays in cache."""
    tile_map: TileMap = map
    """Asks for the forward passes, on a CPU; a GPU is asked for one after the other."""
    dtype: torch.dtype = torch.float32
    """Of the convolutions on a GPU."""


ONE_AT_A_TIME = TileExecutor()


def tile_executor(device: str, threads: int | None, precision: Precision) -> TileExecutor:
    """Of a detector, whose arguments these are.

    Raises:
        UsageError: torch finds no such device, or bfloat16 is asked of a CPU.
    """
    if checked_device(device).type == "cpu":
        if precision != "float32":
            raise UsageError(f"precision {precision} is for GPUs; a CPU's convolutions are float32")
        return TileExecutor(tile_map=map if threads is None else dedicate(threads))
    if threads is not None:
        dedicate(threads)
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    return TileExecutor(tiles=_GPU_TILES, dtype=torch.float32 if precision == "float32" else torch.bfloat16)


def checked_device(name: str) -> torch.device:
    """The CPU, or a GPU that is there.

    Raises:
        UsageError: it is neither.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"torch knows no device {name}; they are cpu, cuda, cuda:1, ...") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"torch finds no device {name} here; leave it out to run on the CPU")
    return device


class FlipAugmented(nn.Module):
    """The mean of a network's logits over the first `count` of `FLIPS`; each costs as much as the first."""

    def __init__(self, network: nn.Module, count: int) -> None:
        super().__init__()
        self.network = network
        self.flips = FLIPS[:count]

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n k h w"]:
        answers = [self.network(x.flip(axes)).flip(axes) if axes else self.network(x) for axes in self.flips]
        return torch.stack(answers).mean(dim=0) if len(answers) > 1 else answers[0]


class Join(nn.Module):
    """The channels of y, then those of z. `apart` leaves joining to the convolution that follows, if that can do it."""

    apart = False

    def forward(
        self, y: Float[Tensor, "n c h w"], z: Float[Tensor, "n r h w"]
    ) -> Float[Tensor, "n d h w"] | tuple[Float[Tensor, "n c h w"], Float[Tensor, "n r h w"]]:
        return (y, z) if self.apart else torch.cat([y, z], dim=1)


def fold(network: nn.Module, private: type[OneDnnConv2d] | None = None) -> None:
    """Change a network in eval mode in place; it cannot be trained any more.

    Batch norms go into the convolutions before them. On a CPU with oneDNN the convolutions become its own, which take
    the ReLU that follows along, and the joining of streams before; torch's take longer, most of all over 8 channels and
    with kernels of 1 x 1. oneDNN's operators are private to torch: where a version of it has no such ones, the
    convolutions stay torch's own.

    Args:
        network: whose convolutions are followed by batch norms in sequences.
        private: what takes the place of convolutions on a CPU; by default `OneDnnConv2d`.
    """
    private = OneDnnConv2d if private is None else private
    for sequence in _beginning_with(network, nn.Conv2d, nn.BatchNorm2d):
        sequence[0], sequence[1] = fuse_conv_bn_eval(sequence[0], sequence[1]), nn.Identity()
    if next(network.parameters()).device.type != "cpu" or not _does_as_torch_does(private):  # type: ignore[arg-type]
        return
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Conv2d:
                setattr(module, name, private.of(child))
            if isinstance(child, Join):
                child.apart = True
    for sequence in _beginning_with(network, private, nn.Identity, nn.ReLU):
        sequence[0].after, sequence[2] = "relu", nn.Identity()


def _beginning_with(network: nn.Module, *kinds: type[nn.Module]) -> list[Any]:
    """The sequences whose first modules are of these kinds."""
    sequences = [module for module in network.modules() if isinstance(module, nn.Sequential)]
    return [found for found in sequences if [*map(type, found)][: len(kinds)] == [*kinds]]


class OneDnnConv2d(nn.Conv2d):
    """A convolution by oneDNN, with what comes `after` it in the same pass: none or relu. Inference only."""

    after = "none"
    operators: ClassVar[Any] = torch.ops.mkldnn

    @classmethod
    def of(cls, conv: nn.Conv2d) -> OneDnnConv2d:
        """With the geometry and the weights of a convolution."""
        ours = cls.__new__(cls)
        ours.__dict__ = conv.__dict__
        return ours

    def forward(self, x: Float[Tensor, "n c h w"] | tuple[Tensor, Tensor]) -> Float[Tensor, "n d hs ws"]:
        """Of parts, the sum of what each gives: copying them together would take a fifth as long again."""
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        convolve = self.operators._convolution_pointwise
        if isinstance(x, Tensor):
            whole: Tensor = convolve(x, self.weight, self.bias, *geometry, self.after, [], "")
            return whole
        first, second = self.weight.split([part.shape[1] for part in x], dim=1)
        total: Tensor = convolve(x[0], first, None, *geometry, "none", [], "")
        after = None if self.after == "none" else self.after
        self.operators._convolution_pointwise_.binary(
            total, x[1], second, self.bias, *geometry, "add", 1.0, after, [], None
        )
        return total


@cache
def _does_as_torch_does(private: type[OneDnnConv2d]) -> bool:
    """Whether the private operators are there and give what torch's convolution gives; tried once in a process, and
    the log says so where not.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    torchs = nn.Conv2d(16, 8, 3, padding=1)
    plain, rectified = private.of(copy.copy(torchs)), private.of(copy.copy(torchs))
    rectified.after = "relu"
    with torch.inference_mode():
        nn.init.constant_(torchs.weight, 0.01).add_(torch.linspace(-0.1, 0.1, 9).reshape(3, 3))
        x = torch.linspace(-9, 9, 16 * 6 * 5).sin_().reshape(1, 16, 6, 5).contiguous(memory_format=torch.channels_last)
        wanted = torchs(x)
        try:
            found = [plain(x), rectified(x), rectified((x[:, :12], x[:, 12:]))]
        except (AttributeError, TypeError, RuntimeError) as error:  # gone, or of other arguments
            log.warning("torch %s: %s; networks run on public operators, more slowly", torch.__version__, error)
            return False
    right = [wanted, wanted.relu(), wanted.relu()]
    if all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(found, right, strict=True)):
        return True
    log.warning("torch %s: private operators of oneDNN differ; networks run on public ones, slower", torch.__version__)
    return False
