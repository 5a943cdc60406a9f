"""What the refinement network trains on, and its loss: embedding triplets + cross entropy (Sarhan et al., section 2.3).

Anchors and positives are drawn uniformly, negatives from the ledger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32, Int64, UInt8
from numpy import ndarray
from torch import Tensor, nn

from ma_cluster.config import PrnConfig
from ma_cluster.errors import UsageError
from ma_cluster.images.annotated import Annotated, Cuts, Marks, cut, draw_cuts, lesion_free, plain_cuts
from ma_cluster.images.patches import LesionPool, RegionPool
from ma_cluster.networks import Losses, Patches, Reduce, channels_first, local, normalise, reduced_mean

_VALIDATION_LESIONS, _VALIDATION_HEALTHY = 200, 1000  # patches of a photograph


class TripletCuts:
    """Triplets as a pure function of (seed, step, ids of the negatives). Keeps no pixels."""

    def __init__(self, photographs: Sequence[Annotated | Marks], config: PrnConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._lesions = LesionPool([photograph.lesion for photograph in photographs])
        wanted = {"regions": (True,), "photographs": (False,), "both": (True, False)}[config.negatives]
        self._sources = np.flatnonzero([photograph.lesion.any() in wanted for photograph in photographs])
        if len(self._sources) == 0:
            raise UsageError(f"no training photograph to draw negatives from '{config.negatives}' of; check --healthy")
        regions = [lesion_free(photographs[int(number)], config.negative_margin_px) for number in self._sources]
        self._healthy = RegionPool(regions, config.healthy_per_image, seed)

    @property
    def healthy(self) -> int:
        """Size of the healthy pool; its ids are 0 .. healthy - 1."""
        return len(self._healthy)

    def of_step(self, step: int, negatives: Int64[ndarray, "n"]) -> Cuts:
        """Anchors, then positives, then the negatives whose ids are given."""
        config, rng = self._config, np.random.default_rng([self._seed, step])
        anchor, positive = (self._lesions.draw(config.triplets, rng, per_lesion=config.per_lesion) for _ in range(2))
        lesions = (self._lesions.centres(anchor), self._lesions.centres(positive))
        return draw_cuts(np.concatenate([*lesions, self._negatives(negatives)]), rng, config.colour_jitter)

    def plain(self, ids: Int64[ndarray, "n"]) -> Cuts:
        """Healthy patches of the pool without augmentation, for scoring them again."""
        return plain_cuts(self._negatives(ids))

    def _negatives(self, ids: Int64[ndarray, "n"]) -> Int32[ndarray, "n 3"]:
        centres = self._healthy.centres(ids)
        centres[:, 0] = self._sources[centres[:, 0]]
        return centres


def validation_patches(
    photograph: Annotated, config: PrnConfig, seed: int
) -> tuple[UInt8[ndarray, "n s s 3"], Bool[ndarray, "n"]]:
    """Patches that say how good a network is, the same each time: of lesions, evenly spread, and of healthy places.

    Returns:
        The patches, and whether the centre of each is a lesion.
    """
    lesions = LesionPool([photograph.lesion])
    healthy = RegionPool([lesion_free(photograph, config.negative_margin_px)], _VALIDATION_HEALTHY, seed)
    ids = np.linspace(0, len(lesions), min(len(lesions), _VALIDATION_LESIONS), endpoint=False).astype(np.int64)
    centres = np.concatenate([lesions.centres(ids), healthy.centres(np.arange(_VALIDATION_HEALTHY))])
    return cut([photograph], plain_cuts(centres), config.cut_px)[0], np.arange(len(centres)) < len(ids)


@dataclass(frozen=True, slots=True)
class TripletBatch:
    """Enhanced RGB patches: anchors and positives centred on lesion pixels, negatives on healthy ones."""

    anchor: UInt8[Tensor, "n 3 s s"]
    positive: UInt8[Tensor, "n 3 s s"]
    negative: UInt8[Tensor, "n 3 s s"]


def triplet_batch(anchor: Patches, positive: Patches, negative: Patches) -> TripletBatch:
    """Patches as they are cut, in the layout that the network takes."""
    return TripletBatch(channels_first(anchor), channels_first(positive), channels_first(negative))


def prn_losses(model: nn.Module, batch: TripletBatch, config: PrnConfig, reduce: Reduce = local) -> Losses:
    """The three branches share weights: one forward pass over all 3 n patches.

    Without the triplet term (`triplet_weight` 0, the `cls` ablation) the positives are not computed.

    Args:
        model: is put into training mode.
        batch: the mini-batch, or this worker's part of it.
        config: of the network.
        reduce: makes the sums of a part those of the whole mini-batch.
    """
    model.train()
    device = next(model.parameters()).device
    parts = [batch.anchor, batch.negative] + ([batch.positive] if config.triplet_weight else [])
    with torch.autocast(device.type, torch.bfloat16):
        embeddings, logits = model(normalise(torch.cat(parts).to(device)))
    embedding, logit = embeddings.float().chunk(len(parts)), logits.float().chunk(len(parts))
    cross_entropy, negatives = classification_loss(logit[0], logit[1], reduce)
    if not config.triplet_weight:
        return Losses({"cross_entropy": cross_entropy, "triplet": torch.zeros(())}, cross_entropy, negatives)
    triplet = triplet_loss(embedding[0], embedding[2], embedding[1], config.margin, reduce)
    total = cross_entropy + config.triplet_weight * triplet
    return Losses({"cross_entropy": cross_entropy, "triplet": triplet}, total, negatives)


def triplet_loss(
    anchor: Float[Tensor, "n d"],
    positive: Float[Tensor, "n d"],
    negative: Float[Tensor, "n d"],
    margin: float,
    reduce: Reduce = local,
) -> Float[Tensor, ""]:
    """(1/n) sum max(0, d(a, p) - d(a, n) + margin), d(u, v) = 1 - cos(u, v) (FaceNet, Schroff et al. 2015).

    The mean is over all triplets, also those that already hold their margin.
    """
    near = 1 - F.cosine_similarity(anchor, positive, dim=1)
    far = 1 - F.cosine_similarity(anchor, negative, dim=1)
    return reduced_mean(F.relu(near - far + margin), reduce)


def classification_loss(
    anchor: Float[Tensor, "m 2"], negative: Float[Tensor, "n 2"], reduce: Reduce = local
) -> tuple[Float[Tensor, ""], Float[Tensor, "n"]]:
    """Cross entropy of anchors (class 1) and negatives (class 0), and each negative's own: what the ledger keeps."""
    positives = F.cross_entropy(
        anchor, torch.ones(len(anchor), dtype=torch.long, device=anchor.device), reduction="none"
    )
    negatives = F.cross_entropy(
        negative, torch.zeros(len(negative), dtype=torch.long, device=negative.device), reduction="none"
    )
    return (reduced_mean(positives, reduce) + reduced_mean(negatives, reduce)) / 2, negatives.detach()
