"""What a hypothesis network trains on, and its loss: weighted cross entropy + soft Dice (Sarhan et al., section 2.2).

Mini-batches are a pure function of (seed, step, ids of hard places). The loss is of each kind of lesion apart, on its
logit against the background's: with one kind that is the softmax of two classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int32, Int64, UInt8
from numpy import ndarray
from torch import Tensor, nn

from ma_cluster.config import HgnConfig
from ma_cluster.hypotheses.frrn import kind_logits
from ma_cluster.images.annotated import UNKNOWN, Annotated, Cuts, Marks, changed, draw_cuts, lesion_free, plain_cuts
from ma_cluster.images.patches import LesionPool, RegionPool
from ma_cluster.networks import Losses, Patches, Reduce, channels_first, local, normalise

_PLACES_PER_IMAGE = 10**6
_SURELY_NONE = -50.0  # a logit whose probability, and loss where there is no lesion, vanish in float32
_HEALTHY_PLACES = 20_000  # of a photograph without lesions: each has a loss in the ledger


@dataclass(frozen=True, slots=True)
class HgnBatch:
    """A mini-batch: enhanced RGB patches and the masks of each kind of lesion."""

    patches: UInt8[Tensor, "n 3 h w"]
    truth: Bool[Tensor, "n k h w"]
    unknown: Bool[Tensor, "n k h w"] | None = None
    """Where nobody looked for the kind: there it costs nothing, whatever is said. None: all are known everywhere."""


def hgn_batch(patches: Patches, lesions: UInt8[ndarray, "n s s"] | UInt8[Tensor, "n s s"], kinds: int) -> HgnBatch:
    """Patches as they are cut, in the layout that the network takes; lesions hold the bits of `Annotated.kinds`."""
    marks = torch.as_tensor(lesions)[:, None]
    bits = torch.arange(kinds, dtype=torch.uint8, device=marks.device)[:, None, None]
    unknown = (marks >> bits + UNKNOWN & 1).bool()
    unknown[:, 0] = False  # the bit of the last kind
    return HgnBatch(channels_first(patches), (marks >> bits & 1).bool(), unknown)


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
    if batch.unknown is not None:
        logit = logit.masked_fill(batch.unknown.to(device), _SURELY_NONE)
    weight = {"MA": 1.0, "HE": config.haemorrhage_weight, "EX": config.exudate_weight, "SE": config.exudate_weight}
    positives = [config.lesion_weight, *[config.other_lesion_weight] * (len(config.kinds) - 1)]
    of_kinds = torch.tensor([[weight[kind] for kind in config.kinds], positives])
    weights, positive = of_kinds.to(device, non_blocking=True)  # a GPU is not waited for
    cross_entropy = (weights * weighted_cross_entropy(logit, truth, positive, reduce)).sum()
    dice = (weights * soft_dice(logit, truth, reduce)).sum()
    total = config.cross_entropy_weight * cross_entropy + config.dice_weight * dice
    return Losses({"cross_entropy": cross_entropy, "dice": dice}, total)


def weighted_cross_entropy(
    logit: Float[Tensor, "n k h w"],
    truth: Bool[Tensor, "n k h w"],
    positive_weight: Float[Tensor, "k"],
    reduce: Reduce = local,
) -> Float[Tensor, "k"]:
    """Mean over all pixels of w CE; a background pixel weighs 1. Not renormalised by the weights' sum."""
    per_pixel = F.binary_cross_entropy_with_logits(
        logit, truth.to(logit.dtype), pos_weight=positive_weight[:, None, None], reduction="none"
    )
    sums = per_pixel.sum(dim=(0, 2, 3))
    pooled = reduce(torch.cat([sums, sums.new_full((1,), per_pixel[:, 0].numel())]))
    return pooled[:-1] / pooled[-1]


def soft_dice(
    logit: Float[Tensor, "n k h w"], truth: Bool[Tensor, "n k h w"], reduce: Reduce = local
) -> Float[Tensor, "k"]:
    """1 - 2 sum(p g) / (sum p^2 + sum g^2 + 1e-5), over the whole mini-batch (V-Net, 2016)."""
    p, g = torch.sigmoid(logit), truth.to(logit.dtype)
    sums = [part.sum(dim=(0, 2, 3)) for part in (p * g, p.square(), g.square())]
    both, found, true = reduce(torch.cat(sums)).chunk(3)
    return 1 - 2 * both / (found + true + 1e-5)


class HgnCuts:
    """Shares of each mini-batch near lesions, haemorrhages, on photographs without lesions and on their hard places; a
    share of the rest near places falsely proposed as lesions, where such are known (rims of lesions among them), and
    all others anywhere in the field of view. Keeps no pixels."""

    def __init__(self, photographs: Sequence[Annotated | Marks], config: HgnConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._lesions = LesionPool([photograph.lesion for photograph in photographs])
        asked = photographs if config.haemorrhage_share else ()
        self._haemorrhages = LesionPool([_haemorrhages(photograph, config) for photograph in asked])
        apart = config.healthy_share + config.hard_share > 0
        without = [number for number, photograph in enumerate(photographs) if apart and not photograph.lesion.any()]
        self.without_lesions = np.array(without, np.int64)
        """Numbers of the photographs whose places have shares of their own."""
        others = np.setdiff1d(np.arange(len(photographs)), self.without_lesions)
        self._healthy = _Places(photographs, self.without_lesions, _HEALTHY_PLACES, seed)
        self._anywhere = _Places(photographs, others, _PLACES_PER_IMAGE, seed)
        self._suspects: RegionPool | None = None
        if any(photograph.proposed is not None for photograph in photographs):
            falsely = [lesion_free(photograph, margin_px=0) for photograph in photographs]
            self._suspects = RegionPool(falsely, _PLACES_PER_IMAGE, seed)

    @property
    def hard_pool(self) -> int:
        """Places whose losses the ledger is to keep; 0 where none are drawn by them."""
        return len(self._healthy) if self._config.hard_share else 0

    def hard(self, step: int) -> int:
        """Number of hard places in a mini-batch."""
        return apportioned(self._config.hard_share, self._config.batch_patches, step) if self.hard_pool else 0

    def hard_losses(
        self, index: int, probability: Float32[ndarray, "h w"]
    ) -> tuple[Int64[ndarray, "p"], Float32[ndarray, "p"]]:
        """What the ledger is to keep of the places of a photograph, the one at `index` of `without_lesions`.

        Each falsely found component gives its highest probability to the place nearest to its centre; the other places,
        which the network takes for none, have 0.
        """
        ids = np.arange(index * _HEALTHY_PLACES, (index + 1) * _HEALTHY_PLACES)
        places, losses = self._healthy.centres(ids)[:, 1:], np.zeros(len(ids), np.float32)
        found = (probability > self._config.hard_probability).astype(np.uint8)
        _, labels, stats, centres = cv2.connectedComponentsWithStats(found, connectivity=8)
        for label in np.flatnonzero(stats[:, cv2.CC_STAT_AREA] >= self._config.hard_area_px):
            if label:
                nearest = np.abs(places - centres[label, ::-1]).max(axis=1).argmin()
                left, top, width, height = stats[label, : cv2.CC_STAT_AREA]
                box = np.s_[top : top + height, left : left + width]
                losses[nearest] = max(losses[nearest], probability[box][labels[box] == label].max())
        return ids, losses

    def plain(self, ids: Int64[ndarray, "n"]) -> Cuts:
        """Patches around places of the ledger without augmentation."""
        return plain_cuts(self._healthy.centres(ids))

    def of_step(self, step: int, hard: Int64[ndarray, "n"] | None = None) -> Cuts:
        """The patches of a mini-batch; `hard` are the ids of its hard places, `self.hard(step)` of them."""
        config, rng = self._config, np.random.default_rng([self._seed, step])

        def count(share: float) -> int:
            return apportioned(share, config.batch_patches, step)

        near = count(config.lesion_share)
        drawn = [self._lesions.centres(self._lesions.draw(near, rng, per_lesion=config.per_lesion))]
        if len(self._haemorrhages):
            ids = self._haemorrhages.draw(count(config.haemorrhage_share), rng, per_lesion=config.per_lesion)
            drawn.append(self._haemorrhages.centres(ids))
        if len(self._healthy):
            drawn.append(self._healthy.draw(count(config.healthy_share), rng))
        if hard is not None:
            drawn.append(self._healthy.centres(hard))
        if self._suspects is not None:
            suspects = round((config.batch_patches - sum(map(len, drawn))) * config.suspect_share)
            drawn.append(self._suspects.centres(rng.integers(len(self._suspects), size=suspects)))
        drawn.append(self._anywhere.draw(config.batch_patches - sum(map(len, drawn)), rng))
        centres = np.concatenate(drawn)
        # the network must not learn that lesions lie in the middle: shift by up to a quarter of the patch
        reach = config.patch_px // 4
        centres[:, 1:] += rng.integers(-reach, reach + 1, size=(len(centres), 2), dtype=np.int32)
        return changed(draw_cuts(centres, rng, config.colour_jitter), rng, config)


class _Places:
    """Places anywhere in the field of view of some photographs, by their ids."""

    def __init__(
        self, photographs: Sequence[Annotated | Marks], numbers: Int64[ndarray, "i"], per_image: int, seed: int
    ) -> None:
        self._numbers = numbers
        fovs = [photographs[int(number)].fov for number in numbers]
        self._pool = RegionPool(fovs, per_image, seed) if fovs else None

    def __len__(self) -> int:
        return 0 if self._pool is None else len(self._pool)

    def centres(self, ids: Int64[ndarray, "n"]) -> Int32[ndarray, "n 3"]:
        """(image, row, col) of ids, the image among all photographs."""
        assert self._pool is not None
        centres = self._pool.centres(ids)
        centres[:, 0] = self._numbers[centres[:, 0]]
        return centres

    def draw(self, count: int, rng: np.random.Generator) -> Int32[ndarray, "count 3"]:
        """Centres of as many, uniform."""
        return self.centres(rng.integers(len(self), size=count))


def apportioned(share: float, rows: int, step: int) -> int:
    """How many rows of a mini-batch are a share's: so many that after any number of steps none is a row off.

    share 0.2, 8 rows:    1 2 1 2 2 | 1 2 1 2 2 ...
    """
    done = [int(share * rows * steps + 1e-6) for steps in (step, step + 1)]
    return done[1] - done[0]


def _haemorrhages(photograph: Annotated | Marks, config: HgnConfig) -> Bool[ndarray, "h w"]:
    if photograph.kinds is None:
        return np.zeros_like(photograph.lesion)
    return (photograph.kinds >> config.kinds.index("HE") & 1).astype(bool)
