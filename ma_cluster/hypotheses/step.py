"""The loss of a hypothesis network on a mini-batch. Knows nothing of ranks, epochs or checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor, nn

from ma_cluster.config import HgnConfig
from ma_cluster.hypotheses.frrn import Frrn
from ma_cluster.hypotheses.loss import kind_logits, soft_dice, weighted_cross_entropy
from ma_cluster.networks.optimising import Losses
from ma_cluster.networks.reduction import Reduce, local
from ma_cluster.networks.tensors import normalise, probability


@dataclass(frozen=True, slots=True)
class HgnBatch:
    """A mini-batch: enhanced RGB patches and the masks of each kind of lesion."""

    patches: UInt8[Tensor, "n 3 h w"]
    truth: Bool[Tensor, "n k h w"]


def build_hgn(config: HgnConfig, kinds: int = 1) -> Frrn:
    """The network of a recipe, freshly initialised; of one kind of lesion, as a model has it, or more to be trained."""
    return Frrn(config.width, classes=1 + kinds)


def of_first_kind(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a network of any number of kinds -> those of the same network of the first kind alone."""
    return {key: value[:2].clone() if key.startswith("head.") else value for key, value in weights.items()}


def of_kinds(weights: Mapping[str, Tensor], kinds: int) -> dict[str, Tensor]:
    """The weights of a network of fewer kinds -> those of one of so many, to whose other outputs nothing leads yet."""
    missing = {key: 1 + kinds - len(value) for key, value in weights.items() if key.startswith("head.")}
    return {
        key: torch.cat([value, value.new_zeros(missing[key], *value.shape[1:])]) if missing.get(key, 0) > 0 else value
        for key, value in weights.items()
    }


def hgn_losses(
    model: nn.Module, batch: HgnBatch, config: HgnConfig, reduce: Reduce = local, dtype: torch.dtype = torch.bfloat16
) -> Losses:
    """Forward in autocast, losses in float32.

    Args:
        model: is put into training mode.
        batch: the mini-batch, or this worker's part of it.
        config: of the network.
        reduce: makes the sums of a part those of the whole mini-batch.
        dtype: of the convolutions.
    """
    model.train()
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = model(normalise(batch.patches.to(device)))
    logit, truth = kind_logits(logits.float()), batch.truth.to(device)
    weight = {"MA": 1.0, "HE": config.haemorrhage_weight, "EX": config.exudate_weight, "SE": config.exudate_weight}
    weights = logit.new_tensor([weight[kind] for kind in config.kinds])
    positive = logit.new_tensor([config.lesion_weight, *[config.other_lesion_weight] * (len(config.kinds) - 1)])
    cross_entropy = (weights * weighted_cross_entropy(logit, truth, positive, reduce)).sum()
    dice = (weights * soft_dice(logit, truth, reduce)).sum()
    total = config.cross_entropy_weight * cross_entropy + config.dice_weight * dice
    return Losses({"cross_entropy": cross_entropy, "dice": dice}, total)


@torch.inference_mode()
def hgn_probability(model: nn.Module, patches: UInt8[Tensor, "n 3 h w"]) -> Tensor:
    """Lesion probability (n h w, float32, on the CPU) of patches; the model is in eval mode."""
    device = next(model.parameters()).device
    logits = model(normalise(patches.to(device))).float()
    return probability(logits[:, 1] - logits[:, 0]).cpu()
