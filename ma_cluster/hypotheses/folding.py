"""Batch norms put into the convolutions before them: for inference, one pass through memory less each."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batch_norms(network: nn.Module) -> None:
    """Change a network in eval mode in place; its answers stay the same to rounding, it cannot be trained any more."""
    for module in network.modules():
        if isinstance(module, nn.Sequential):
            conv, norm = module[0], module[1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                module[0], module[1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
