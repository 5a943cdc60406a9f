"""The patch refinement network: ResNet-50 (He, Zhang, Ren, Sun, CVPR 2016, arXiv 1512.03385, Table 1) on small patches.

    stage    output stride    blocks (1x1, 3x3, 1x1)
    stem     /2               conv 7x7, 64
    conv2    /2               3 x (64, 64, 256)
    conv3    /4               4 x (128, 128, 512)
    conv4    /8               6 x (256, 256, 1024)
    conv5    /16              3 x (512, 512, 2048)
    head                      global average pool = embedding (2048), linear -> 2 classes

Departures: the stem's max-pool is omitted, so the overall stride is 16, not 32 (Sarhan et al.: "one downsampling step
omitted"; which one is our inference); the stride of a stage is on its first 3x3 convolution, as in common
implementations; `width` scales every channel count, in multiples of 8.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from ma_cluster.config import PrnConfig

STRIDE = 16
_EXPANSION = 4


class Bottleneck(nn.Module):
    """ReLU(skip(x) + BN(conv1(ReLU(BN(conv3(ReLU(BN(conv1(x)))))))))."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        outputs = channels * _EXPANSION
        self.reduce = _conv_bn_relu(inputs, channels, 1, 1)
        self.spatial = _conv_bn_relu(channels, channels, 3, stride)
        self.expand = _conv_bn(channels, outputs, 1, 1)
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else _conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d hs ws"]:
        return self.expand(self.spatial(self.reduce(x))).add_(self.skip(x)).relu_()


class Prn(nn.Module):
    """Patches, values about -1..1, -> (embedding after a ReLU and a mean: never negative; logits of two classes)."""

    def __init__(self, width: float = 1.0, classes: int = 2, context: int = 0) -> None:
        """`context`: positions of the last map, on each side, that only the convolutions use."""
        super().__init__()
        self.context = context
        channels = max(8, 8 * round(64 * width / 8))
        self.stem = nn.Sequential(_conv_bn_relu(3, channels, 7, 2))
        stages: list[nn.Module] = []
        inputs = channels
        for number, (blocks, stride) in enumerate(((3, 1), (4, 2), (6, 2), (3, 2))):
            outputs = channels * 2**number
            for block in range(blocks):
                stages.append(Bottleneck(inputs, outputs, stride if block == 0 else 1))
                inputs = outputs * _EXPANSION
        self.stages = nn.Sequential(*stages)
        self.classify = nn.Linear(inputs, classes)
        self.apply(_he_normal)

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n k"]]:
        last = self.stages(self.stem(x))
        inner = last[:, :, self.context : last.shape[2] - self.context, self.context : last.shape[3] - self.context]
        embedding = inner.mean(dim=(2, 3))
        return embedding, self.classify(embedding)


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


def _conv_bn_relu(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return _conv_bn(inputs, outputs, kernel, stride).append(nn.ReLU(inplace=True))


def _he_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def build_prn(config: PrnConfig) -> Prn:
    """The network of a recipe, freshly initialised."""
    return Prn(config.width, context=config.context_px // STRIDE)
