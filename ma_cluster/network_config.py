"""The numbers of the two kinds of network, of their training, and of the photograph's own answer that follows from one.

A part of config.py, which hands them out.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from ma_cluster.image_config import require

KINDS = ("MA", "HE", "EX", "SE")
"""Lesions that IDRiD outlines: microaneurysms, haemorrhages, hard and soft exudates."""
Scale = Literal["1x", "0.5x"]
Negatives = Literal["regions", "photographs", "both"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HgnConfig:
    """One hypothesis network (FRRN type A) and its training. The two scales share these numbers and train apart [T]."""

    width: float = 1.0
    """Channels over those of FRRN-A as published; 1 is the paper's network [T]."""
    patch_px: int = 256
    """Side of a training patch, pixels, the same at both scales [S]."""
    batch_patches: int = 10
    """Patches in a mini-batch [T]."""
    lesion_share: float = 0.5
    """Share of a mini-batch centred on a lesion pixel; the rest is centred anywhere in the FOV [U]."""
    suspect_share: float = 0.5
    """Share of the rest that is centred where the 0.5x network of an earlier training suspects a lesion and none is
    annotated, where training is given such a network [U]."""
    haemorrhage_share: float = 0.0
    """Share of a mini-batch centred on a haemorrhage, where any is annotated [U]."""
    healthy_share: float = 0.0
    """Share centred anywhere on photographs without lesions; at 0 these are among those of `anywhere`, and where there
    are none so is the share [U]."""
    hard_share: float = 0.0
    """Share centred where photographs without lesions are taken for one: selective sampling, by the loss ledger [U]."""
    hard_photographs: int = 24
    """Photographs without lesions that are searched for such places at the end of each epoch, in turn [U]."""
    hard_probability: float = 0.2
    """A microaneurysm's probability above which connected pixels are such a place [U]."""
    hard_area_px: int = 4
    """Fewest such pixels, of the network's grid [U]."""
    per_lesion: bool = False
    """Draw lesion centres per lesion, not per pixel: large lesions then weigh no more than small ones [U]."""
    steps: int = 20_000
    """Optimiser steps in all; the paper's epoch is 1000 mini-batches [T], its number of epochs unknown [U]."""
    learning_rate: float = 1e-4
    """Peak rate of the optimiser [U]; sweep 1e-3, 3e-4, 1e-4."""
    warmup_steps: int = 0
    """Steps of linear warm-up, after which the rate follows a cosine to zero [U]."""
    weight_decay: float = 0.0
    """Decoupled weight decay; at 0 AdamW is the paper's Adam [T]."""
    weight_average: float = 0.0
    """Decay, for each step, of the exponential moving average of the weights, which is then what validates and ships;
    0: the weights themselves [U]. In the first steps it is (1 + step) / (10 + step), where that is less."""
    kinds: tuple[str, ...] = ("MA",)
    """Lesions told apart, each an output beside the background's, of KINDS and in their order: the others teach what a
    microaneurysm is not, and tell whether the photograph shows retinopathy [U]."""
    haemorrhage_weight: float = 0.3
    """Weight of the haemorrhages' loss; the microaneurysms' is 1 [U]."""
    exudate_weight: float = 0.15
    """Weight of the loss of hard exudates, and of soft ones [U]."""
    lesion_weight: float = 10.0
    """Cross-entropy weight of a microaneurysm's pixel, a background pixel weighs 1 [U]."""
    other_lesion_weight: float = 2.0
    """The same of the other kinds' pixels [U]."""
    cross_entropy_weight: float = 1.0
    """Weight of the cross entropy beside the soft Dice term, 1:1 [I]."""
    dice_weight: float = 1.0
    """Weight of the soft Dice term [I]."""
    colour_jitter: float = 0.0
    """Largest relative change of each channel's gain in augmentation [U]; flips and quarter turns are always on."""
    any_rotation: bool = False
    """Rotate patches by any angle [U]."""
    zoom: float = 1.0
    """Patches are magnified by 1 / zoom to zoom, log-uniform [U]."""
    contrast_low: float = 1.0
    """Least factor on all channels' distance from mid-grey [U]."""
    contrast_high: float = 1.0
    """Largest such factor [U]."""
    offset: float = 0.0
    """Largest shift of each channel, grey levels of 255 [U]."""
    blur_share: float = 0.0
    """Share of patches that are blurred, by a Gaussian of 0.3 to 1 px [U]."""
    noise_share: float = 0.0
    """Share of patches with Gaussian noise of 1 to 6 grey levels [U]."""

    def __post_init__(self) -> None:
        require(0 < self.width <= 4, "hgn.width must lie in (0, 4]")
        require(self.patch_px % 16 == 0, "hgn.patch_px must be a multiple of 16, the network's overall stride")
        for name in ("lesion_share", "suspect_share", "haemorrhage_share", "healthy_share", "hard_share"):
            require(0 <= getattr(self, name) <= 1, f"hgn.{name} must lie in [0, 1]")
        shares = self.lesion_share + self.haemorrhage_share + self.healthy_share + self.hard_share
        require(shares <= 1 + 1e-9, "the shares of an HGN's mini-batch add up to more than 1")
        require(0 <= self.weight_average < 1, "hgn.weight_average must lie in [0, 1)")
        require(self.kinds == KINDS[: max(1, len(self.kinds))], f"hgn.kinds are the first of {', '.join(KINDS)}")
        require("HE" in self.kinds or not self.haemorrhage_share, "hgn.haemorrhage_share needs HE among hgn.kinds")
        require(self.zoom >= 1, "hgn.zoom must be at least 1")
        require(0 < self.contrast_low <= self.contrast_high, "hgn.contrast_low must lie in (0, contrast_high]")
        require(self.steps > self.warmup_steps >= 0, "hgn.warmup_steps must be below hgn.steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class PrnConfig:
    """The patch refinement network (ResNet-50, triplet loss) and its training."""

    width: float = 1.0
    """Channels over those of ResNet-50; 1 is the paper's network [T]."""
    scale: Scale = "1x"
    """Grid the patches are cut from; the paper's is 1x [I]."""
    patch_px: int = 128
    """Side of a patch on that grid, pixels [U]."""
    context_px: int = 0
    """What the network sees beyond the patch on each side, pixels. Its convolutions use it, the embedding is the mean
    over the patch alone: without it a patch is padded with zeros, and shared computation (`prn_dense`) has none [U]."""
    triplets: int = 32
    """Triplets (anchor, positive, negative) in a mini-batch [U]."""
    steps: int = 20_000
    """Optimiser steps in all; an epoch is 1000 mini-batches [U]."""
    learning_rate: float = 1e-4
    """Peak rate of the optimiser [U]."""
    warmup_steps: int = 0
    """Steps of linear warm-up before the cosine [U]."""
    weight_decay: float = 0.0
    """Decoupled weight decay [U]."""
    margin: float = 0.2
    """Margin of the triplet loss on d = 1 - cos(u, v) [U]; below 1, since both vectors follow a ReLU."""
    triplet_weight: float = 1.0
    """Weight of the triplet term beside the cross entropy, 1:1 [U]; 0 trains the `cls` ablation [T]."""
    colour_jitter: float = 0.0
    """As for the HGN [U]."""
    weight_average: float = 0.0
    """As for the HGN [U]."""
    refresh_steps: int = 1000
    """Steps between two refreshes of the healthy pool's losses: each epoch [U]."""
    refresh_share: float = 0.1
    """Share of the healthy pool that a refresh scores again [U]."""
    per_lesion: bool = False
    """As for the HGN: draw anchors and positives per lesion, not per pixel [U]."""
    negatives: Negatives = "regions"
    """Where healthy patches come from: lesion-free `regions` of photographs with lesions, `photographs` without any
    (the paper's [T]), or `both`. Photographs of another camera or size than those with lesions teach the network to
    tell cameras: with IDRiD's healthy ones, at 0.30 of the scale, `both` lost what `regions` learnt."""
    negative_margin_px: int = 16
    """Healthy centres keep this distance from every annotated microaneurysm, pixels of the PRN's grid [U]."""
    proposal_probability: float = 0.03
    """Probability from which a place that the 0.5x hypothesis network proposes is a candidate for a healthy patch,
    where training is given such a network [U]."""
    healthy_per_image: int = 75_000
    """Healthy candidate centres for each training photograph: 6 million over 80 [I]."""

    def __post_init__(self) -> None:
        require(0 < self.width <= 4, "prn.width must lie in (0, 4]")
        require(self.patch_px % 16 == 0, "prn.patch_px must be a multiple of 16, the network's overall stride")
        require(self.context_px % 16 == 0, "prn.context_px must be a multiple of 16")
        require(self.scale in ("1x", "0.5x"), "prn.scale is 1x or 0.5x")
        require(0 < self.margin < 1, "prn.margin must lie in (0, 1)")
        require(self.negatives in ("regions", "photographs", "both"), "prn.negatives is regions, photographs or both")
        require(self.triplet_weight >= 0, "prn.triplet_weight must not be negative")

    @property
    def cut_px(self) -> int:
        """Side of what the network is shown: the patch and its context, pixels."""
        return self.patch_px + 2 * self.context_px


@dataclass(frozen=True, kw_only=True, slots=True)
class GradingConfig:
    """How the photograph's answer follows from the maps of the 0.5x network: a logistic regression, from graded
    photographs. Without features there is no image score, and a called lesion is what refers a photograph.
    """

    features: tuple[str, ...] = ()
    """Names of what is measured on the maps; see lesions/findings.py [U]."""
    mean: tuple[float, ...] = ()
    """Of each feature over the photographs that trained."""
    scale: tuple[float, ...] = ()
    """Standard deviation of each."""
    weights: tuple[float, ...] = ()
    """Log odds of retinopathy for one standard deviation of each."""
    bias: float = 0.0
    """Log odds where each feature is at its mean."""
    refer_at: float = 0.5
    """Image score from which a photograph is referred; the bundle's is from validation [U]."""
    refer_sensitivity: float = 0.95
    """Share of the validation's photographs of grade 2 and up that are referred at least: it sets `refer_at` [U]."""

    def __post_init__(self) -> None:
        sizes = {len(part) for part in (self.features, self.mean, self.scale, self.weights)}
        require(len(sizes) == 1, "grading has a mean, a scale and a weight for each of its features")
        require(all(scale > 0 for scale in self.scale), "grading.scale must be positive")
        require(0 <= self.refer_at <= 1, "grading.refer_at must lie in [0, 1]")
        require(0 < self.refer_sensitivity <= 1, "grading.refer_sensitivity must lie in (0, 1]")


HGN_TRAINING = frozenset(field.name for field in fields(HgnConfig)) - {"width"}
"""Fields that train the network, and decide nothing of what it says once trained."""
PRN_TRAINING = frozenset({
    "triplets", "steps", "learning_rate", "warmup_steps", "weight_decay", "margin", "triplet_weight",
    "colour_jitter", "refresh_steps", "refresh_share", "per_lesion", "negatives", "negative_margin_px",
    "proposal_probability", "healthy_per_image", "weight_average",
})  # fmt: skip
