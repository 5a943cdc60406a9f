"""Every number of the system: frozen dataclasses, and the recipes that fill them.

A field's docstring gives meaning, unit and source. Sources follow the specification's tags: [T] stated in the text of
Sarhan et al. (MICCAI 2019, arXiv 1904.12732), [S] a secondary source, [C] public code of a cited method, [I] inferred,
[U] not recoverable, so the value is ours.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ma_cluster.errors import UsageError
from ma_cluster.image_config import LIMITS, require
from ma_cluster.image_config import ImageConfig as ImageConfig
from ma_cluster.image_config import KnownField as KnownField
from ma_cluster.network_config import HGN_TRAINING, PRN_TRAINING
from ma_cluster.network_config import GradingConfig as GradingConfig
from ma_cluster.network_config import HgnConfig as HgnConfig
from ma_cluster.network_config import Negatives as Negatives
from ma_cluster.network_config import PrnConfig as PrnConfig
from ma_cluster.network_config import Scale as Scale

Fusion = Literal["geometric", "arithmetic"]
OperatingPoint = Literal["default", "sensitive"]
_UNKNOWN_FIELD = KnownField()
NETWORKS = ("hgn_1x", "hgn_half", "prn", "cls")
"""The networks of a model, by name; `cls` is the refinement trained without triplets."""
JUDGE = "judge"
"""The name of the weights that judge candidates as a whole."""
RESULT_VERSION = 8
"""Of the code from bytes to outcome. Raise it with a change after which the same photograph, weights and numbers may
give another outcome: decoding, the field of view, contrast, tiling, fusion, the lesion table, a number in the code, the
default of a number that decides; also where a plan is cut otherwise. Not for speed, messages or new columns. A run
begun at one version does not go on at another."""


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """What whoever asks for a score may say of it. All of it decides the answer."""

    operating_point: OperatingPoint = "default"
    """Which of the places that are outlined are called: the sure ones, or all."""
    field: KnownField = _UNKNOWN_FIELD
    """Of each photograph of which nothing else says it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorConfig:
    """How the trained stages are joined on one photograph. Part of a bundle: it decides the result."""

    tile_px: int = 512
    """Side of the tiles the HGNs run on, pixels."""
    halo_px: int = 64
    """Context discarded on each inner side of a tile, pixels."""
    flips_1x: int = 1
    """Flips (none, left-right, both, up-down) under which the 1x network looks at a tile, its logits averaged [U]."""
    flips_half: int = 1
    """The same for the 0.5x network: each costs a quarter of one at 1x [U]."""
    roi_threshold_1x: float = 0.1
    """HGN probability at 1x above which the PRN looks at a pixel; the bundle's is from validation [U]."""
    roi_threshold_half: float = 0.1
    """The same for the 0.5x map, after upsampling [U]."""
    roi_recall: float = 0.95
    """Share of the validation's lesion pixels that each region of interest keeps: it sets the two thresholds [U]."""
    prn_stride_px: int = 1
    """Step of the PRN over the region of interest, pixels of its grid; between steps it is interpolated."""
    prn_odds: float = 1.0
    """Factor on the odds p / (1 - p) of the PRN, which has learnt from as many lesions as healthy places, and those
    hard ones; the bundle's is from validation [U]."""
    prn_dense: bool = False
    """Whether patches share their feature maps, which then see the photograph around a patch, and not zeros: many times
    faster over wide regions, for networks trained with that context. The other, exact way is the paper's [T]."""
    fusion: Fusion = "geometric"
    """Mean of the maps: the paper's best row is the geometric one [T]."""
    weight_1x: float = 1.0
    """Weight of the 1x network's map and of the PRN's in its region; those of the 0.5x network weigh 1 [I]. At 0 the 1x
    network is not run; the bundle's is from validation."""
    weight_prn: float = 1.0
    """Weight of the PRN's maps beside those of the hypothesis networks [I]. At 0 the PRN is not run; the bundle's is
    from validation."""
    threshold: float = 0.5
    """Fused probability from which a pixel belongs to a lesion; the bundle's is from validation [U]."""
    least_score: float = 0.0
    """Score that a lesion must reach, or it is not called: the `default` operating point, the bundle's from healthy
    validation photographs [U]. `sensitive` calls every place that is outlined."""
    healthy_calls: float = 0.5
    """False calls that a healthy photograph may have on average: it sets `least_score` [U]."""
    min_area_px: int = 20
    """Smaller components are dropped, pixels of the canonical 1x grid [U]."""

    def __post_init__(self) -> None:
        require(self.tile_px % 16 == 0 and self.halo_px % 16 == 0, "tile_px and halo_px must be multiples of 16")
        require(self.tile_px > 2 * self.halo_px, "detector.tile_px must be more than twice halo_px")
        require({self.flips_1x, self.flips_half} <= {1, 2, 3, 4}, "detector.flips_1x and flips_half lie in 1 to 4")
        require(0 < self.threshold < 1, "detector.threshold must lie in (0, 1)")
        require(min(self.weight_1x, self.weight_prn) >= 0, "detector.weight_1x and weight_prn must not be negative")
        require(0 <= self.least_score < 1, "detector.least_score must lie in [0, 1)")
        require(self.healthy_calls >= 0, "detector.healthy_calls must not be negative")
        require(self.fusion in ("geometric", "arithmetic"), "detector.fusion is geometric or arithmetic")
        require(0 < self.roi_recall <= 1, "detector.roi_recall must lie in (0, 1]")
        require(self.prn_stride_px >= 1, "detector.prn_stride_px must be at least 1")
        require(self.prn_odds > 0, "detector.prn_odds must be positive")
        divides = 16 % self.prn_stride_px == 0
        require(divides or not self.prn_dense, "detector.prn_dense needs a prn_stride_px of 1, 2, 4, 8 or 16")


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitConfig:
    """Which photographs train and which validate, by name. IDRiD's neighbours may be one patient's: blocks [U]."""

    validation: tuple[str, ...] = tuple(f"IDRiD_{n:02d}" for n in range(45, 55))
    """Ten photographs with lesions, as many as in the paper [T]; which ones is ours [U]."""
    validation_healthy: tuple[str, ...] = (
        *(f"IDRiD_NAR_{n:03d}" for n in range(51, 61)),
        *("IDRiD_grading_00?", "IDRiD_grading_01?", "IDRiD_grading_020"),
        *("IDRiD_grading_33[1-9]", "IDRiD_grading_3[4-9]?", "IDRiD_grading_4??"),
    )
    """Graded photographs that validate, as shell patterns [U]; of IDRiD's grading set 001-020 and from 331 on."""

    @classmethod
    def fold(cls, number: int) -> SplitConfig:
        """The split that leaves fold 1 to 5 of IDRiD's 54 photographs out: blocks of 11, the last, which is the default
        split's, of 10."""
        first = 11 * (number - 1) + 1
        return cls(validation=tuple(f"IDRiD_{n:02d}" for n in range(first, min(first + 11, 55))))


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A whole model and how it is trained."""

    name: str
    image: ImageConfig = field(default_factory=ImageConfig)
    hgn_1x: HgnConfig = field(default_factory=HgnConfig)
    hgn_half: HgnConfig = field(default_factory=HgnConfig)
    prn: PrnConfig = field(default_factory=PrnConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    grading: GradingConfig = field(default_factory=GradingConfig)
    split: SplitConfig = field(default_factory=SplitConfig)


def paper() -> Recipe:
    """The paper at full size, for GPUs.

    Overlapping patches share their feature maps, without which a photograph takes 10^15 operations; so the refinement
    is trained with the context that it then sees. `prn_dense` off runs the same networks patch by patch, the reference.
    """
    return Recipe(name="paper", prn=PrnConfig(context_px=32), detector=DetectorConfig(prn_dense=True))


def lite() -> Recipe:
    """The same two stages and the same code, thin enough to train and run on two CPU cores."""
    hgn = HgnConfig(
        width=1 / 6,
        batch_patches=8,
        kinds=("MA", "HE", "EX", "SE"),
        per_lesion=True,
        haemorrhage_share=0.1,
        healthy_share=0.08,
        hard_share=0.1,
        steps=2500,
        learning_rate=2e-3,
        warmup_steps=100,
        weight_decay=1e-2,
        weight_average=0.998,
        haemorrhage_weight=0.1,
        exudate_weight=0.05,
        lesion_weight=5.0,
        cross_entropy_weight=4.0,
        colour_jitter=0.15,
        any_rotation=True,
        zoom=1.25,
        contrast_low=0.7,
        contrast_high=1.35,
        offset=8.0,
        blur_share=0.2,
        noise_share=0.3,
    )
    prn = PrnConfig(
        width=1 / 4,
        patch_px=64,  # the 0.5x network has seen the surroundings; this one looks closely
        triplets=16,
        steps=2500,
        learning_rate=1.5e-3,
        warmup_steps=50,
        weight_decay=1e-2,
        refresh_steps=250,
        per_lesion=True,
        negative_margin_px=6,
        healthy_per_image=800,
        colour_jitter=0.1,
    )
    # each pixel of a region costs a ResNet-50 on its patch: every eighth pixel of every eighth row is looked at
    detector = DetectorConfig(tile_px=1024, halo_px=80, flips_half=2, prn_stride_px=8)
    return Recipe(name="lite", hgn_1x=hgn, hgn_half=hgn, prn=prn, detector=detector)


def tiny() -> Recipe:
    """Seconds on a CPU; for tests only."""
    hgn = HgnConfig(width=1 / 16, patch_px=64, batch_patches=4, steps=4, learning_rate=1e-3, lesion_weight=5.0)
    prn = PrnConfig(width=1 / 16, scale="0.5x", patch_px=32, triplets=4, steps=4, learning_rate=1e-3)
    return Recipe(
        name="tiny",
        image=ImageConfig(fov_diameter_px=512.0),
        hgn_1x=hgn,
        hgn_half=hgn,
        prn=dataclasses.replace(prn, refresh_steps=2, healthy_per_image=64),
        detector=DetectorConfig(tile_px=320, halo_px=32, prn_stride_px=4, prn_dense=True),
    )


RECIPES = {"paper": paper, "lite": lite, "tiny": tiny}
IDLE: dict[str, frozenset[str]] = {
    "image": LIMITS,
    "hgn_1x": HGN_TRAINING,
    "hgn_half": HGN_TRAINING,
    "prn": PRN_TRAINING,
    "detector": frozenset({"roi_recall", "healthy_calls"}),  # they set the thresholds, which decide
    "grading": frozenset({"refer_sensitivity"}),  # it sets `refer_at`, which decides
}
"""The sections of a recipe that decide a result, and their fields that do not: they train, or limit what is accepted.
A field that is not named here decides."""


def deciding(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The numbers of a recipe that decide a result, by section.

    Those at their default are left out, so that a field which a later version adds leaves earlier digests as they are,
    and so is the grading of a model that has none.
    """
    found = {}
    for name, idle in IDLE.items():
        section = getattr(recipe, name)
        values = {field.name: (getattr(section, field.name), field.default) for field in fields(section)}
        found[name] = {key: value for key, (value, default) in values.items() if key not in idle and value != default}
    return {name: values for name, values in found.items() if values or name != "grading"}


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """The inverse of `to_dict` for a Recipe.

    Raises:
        UsageError: a field is unknown, missing or out of range.
    """
    kinds: dict[str, Any] = {field.name: field.default_factory for field in fields(Recipe) if field.name != "name"}
    try:
        if not isinstance(values["name"], str) or values.keys() - kinds.keys() - {"name"}:
            raise TypeError(f"it needs a name, and has the sections {', '.join(kinds)} only")
        known = {"grading": {}} | values  # bundles of before have none
        sections = {name: kind(**_checked(known[name], kind(), name)) for name, kind in kinds.items()}
        return Recipe(name=values["name"], **sections)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"this is not a recipe that this version understands: {error}") from error


def _checked(values: dict[str, Any], default: Any, section: str) -> dict[str, Any]:
    """A section's values, of the types that its fields are; JSON has lists for tuples and may write 1.0 as 1."""
    numbers = {field.name for field in fields(default) if field.type == "tuple[float, ...]"}
    checked = {}
    for name, value in values.items():
        wanted = type(getattr(default, name))
        read = {float: (float, int), tuple: (list,)}.get(wanted, (wanted,))
        if type(value) not in read or (wanted is float and not math.isfinite(value)):
            raise TypeError(f"{section}.{name} is no {wanted.__name__}")
        right, kind = (_is_number, "numbers") if name in numbers else (_is_name, "names")
        if wanted is tuple and not all(map(right, value)):
            raise TypeError(f"{section}.{name} holds more than {kind}")
        checked[name] = tuple(value) if wanted is tuple else value
    return checked


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def digest(value: Any) -> str:
    """sha256 (hex) of a JSON-able value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
