"""What is said and shown of a photograph: its lesions, mask and overlay, and its own answer.

fused probability map -> components above the threshold, measured on the photograph's grid -> lesions, 1-bit mask
maps of the 0.5x network -> features -> `image_score`, calibrated -> triage: does it show retinopathy, and what is
                                        to be done with it? The fit: evaluation/calibration.py.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8
from numpy import ndarray
from PIL import Image

from ma_cluster.config import DetectorConfig, GradingConfig, OperatingPoint
from ma_cluster.errors import BundleError, Status, Triage
from ma_cluster.images.fundus import Fov
from ma_cluster.images.quality import Quality
from ma_cluster.network_config import KINDS

_LEAST = 1e-6  # of a probability before its logarithm
_SURE = 0.85  # probability from which a candidate counts
OUTLINE_RGB = (64, 255, 64)  # absent from a retina, and visible to most of those who are colour-blind
JPEG_QUALITY = 90


@dataclass(frozen=True, slots=True)
class Lesion:
    """One microaneurysm. Positions and sizes in pixels of the upright photograph."""

    id: int
    """1, 2, ... from the surest (largest score) down."""
    row: float
    col: float
    """Centroid; pixel centres are at integers."""
    bbox: tuple[int, int, int, int]
    """top, left, bottom, right; bottom and right lie just outside."""
    area_px: int
    diameter_px: float
    """Of the disc of the same area."""
    score: float
    """How sure it is, 0..1: what the model's judge of whole candidates says; `score_max` of a model without one."""
    score_mean: float
    score_max: float
    """Mean and largest fused probability within the lesion, 0..1."""
    fov_distance_px: float
    """From the centre of the field of view to the centroid."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What is said of a photograph that could be scored."""

    lesions: tuple[Lesion, ...]
    image_score: float | None
    """Probability that the photograph shows retinopathy; None of a model without a grading."""
    triage: Triage
    operating_point: OperatingPoint = "default"
    """Which of the places that are outlined were called."""


@dataclass(frozen=True, slots=True)
class Detection:
    """What is known of one photograph. `mask` and the lesions are on the grid of the upright photograph."""

    lesions: tuple[Lesion, ...]
    image_score: float | None
    """Calibrated probability that the photograph shows retinopathy; None of a model without a grading."""
    triage: Triage
    mask: Bool[ndarray, "h w"]
    fov: Fov
    quality: Quality
    seconds: dict[str, float] = field(compare=False)
    """Wall time of the stages prepare (where `detect` did it), hgn, prn and lesions."""
    operating_point: OperatingPoint = "default"

    @property
    def findings(self) -> Findings:
        """What is said of the photograph."""
        return Findings(self.lesions, self.image_score, self.triage, self.operating_point)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the photograph, pixels."""
        return self.mask.shape[0], self.mask.shape[1]


def to_values(findings: Findings, fov: Fov, shape: tuple[int, int], quality: Quality) -> dict[str, Any]:
    """What is said of a scored photograph in JSON, one file or answer for each; `shape` is its height and width."""
    measures = asdict(quality)
    return {
        "status": Status.SCORED,
        "operating_point": findings.operating_point,
        "triage": findings.triage,
        "image_score": findings.image_score,
        "gradable": measures.pop("gradable"),
        "quality": measures.pop("score"),
        "flags": measures.pop("flags"),
        "detail": quality.detail,
        "measures": measures,
        "height": shape[0],
        "width": shape[1],
        "fov": asdict(fov),
        "lesions": [asdict(lesion) for lesion in findings.lesions],
    }


def find_lesions(
    probability: Float32[ndarray, "h w"],
    judged: Float32[ndarray, "h w"] | None,
    smallest_px: float,
    fov: Fov,
    config: DetectorConfig,
) -> tuple[tuple[Lesion, ...], Bool[ndarray, "h w"]]:
    """Lesions and their mask.

    Components (8-connected) are formed on the photograph's grid, so mask and table agree to the pixel. Those that are
    too small, and those whose score is below `least_score`, are dropped from both.

    Args:
        probability: the fused map on the photograph's grid.
        judged: what the model's judge says of the candidates, on that grid; None of a model without one.
        smallest_px: least area of a lesion.
        fov: of the photograph.
        config: threshold and least score.
    """
    above = (probability >= config.threshold).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8)
    keep = [label for label in range(1, count) if stats[label, cv2.CC_STAT_AREA] >= smallest_px]
    lesions = []
    for label in keep:
        left, top, width, height = (int(value) for value in stats[label, :4])
        box = slice(top, top + height), slice(left, left + width)
        component = labels[box] == label
        lesion = _measure(component, probability[box], (top, left), fov)
        if judged is not None:
            lesion = replace(lesion, score=float(judged[box][component].max()))
        if lesion.score >= config.least_score:
            lesions.append(replace(lesion, id=label))
    lesions.sort(key=lambda lesion: (-lesion.score, lesion.row, lesion.col))
    kept = np.zeros(count, dtype=bool)
    kept[[lesion.id for lesion in lesions]] = True
    return tuple(replace(lesion, id=number) for number, lesion in enumerate(lesions, 1)), kept[labels]


def _measure(
    component: Bool[ndarray, "bh bw"], scores: Float32[ndarray, "bh bw"], corner: tuple[int, int], fov: Fov
) -> Lesion:
    """One component, cut out with its bounding box whose top left pixel is `corner`."""
    top, left = corner
    rows, cols = np.nonzero(component)
    row, col = top + rows.mean(), left + cols.mean()
    inside = scores[component]
    return Lesion(
        id=0,
        row=float(row),
        col=float(col),
        bbox=(top, left, top + component.shape[0], left + component.shape[1]),
        area_px=len(rows),
        diameter_px=float(2 * np.sqrt(len(rows) / np.pi)),
        score=float(inside.max()),
        score_mean=float(inside.mean()),
        score_max=float(inside.max()),
        fov_distance_px=float(np.hypot(row - fov.row, col - fov.col)),
    )


def draw_overlay(pixels: UInt8[ndarray, "h w 3"], mask: Bool[ndarray, "h w"]) -> UInt8[ndarray, "h w 3"]:
    """A copy of the photograph with a thin contour a few pixels outside each lesion, which stays visible."""
    thickness = max(1, round(min(mask.shape) / 1000))
    gap = 2 * thickness + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * gap + 1, 2 * gap + 1))
    grown = cv2.dilate(mask.astype(np.uint8), kernel)
    contours, _ = cv2.findContours(grown, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(pixels.copy(), contours, -1, OUTLINE_RGB, thickness, cv2.LINE_AA)


def encode_overlay(pixels: UInt8[ndarray, "h w 3"], mask: Bool[ndarray, "h w"]) -> bytes:
    """`draw_overlay` as a JPEG."""
    out = io.BytesIO()
    Image.fromarray(draw_overlay(pixels, mask)).save(out, format="JPEG", quality=JPEG_QUALITY)
    return out.getvalue()


def encode_mask(mask: Bool[ndarray, "h w"]) -> bytes:
    """The mask as a 1-bit PNG, white where there is a lesion."""
    out = io.BytesIO()
    Image.fromarray(mask).save(out, format="PNG")
    return out.getvalue()


def photograph_features(
    maps: Float32[ndarray, "k h w"], fov: Bool[ndarray, "h w"], judged: Float32[ndarray, "n"] | None = None
) -> dict[str, float]:
    """What is measured on a photograph, by name.

    Args:
        maps: probability of each of the first k of KINDS against the background, on the 0.5x grid.
        fov: its field of view, which is not empty.
        judged: the judge's probability of each candidate, which tells more than the maps' peaks; None without a judge.
    """
    found = {}
    for kind, probability in zip(KINDS, maps, strict=False):
        inside = probability[fov]
        found[f"{kind}_mean"] = math.log(max(_LEAST, float(inside.mean(dtype=np.float64))))
        if judged is None:
            sure = cv2.connectedComponents((probability >= 0.5).astype(np.uint8), connectivity=8)[0] - 1
            found[f"{kind}_largest"] = _logit(float(inside.max()))
            found[f"{kind}_count"] = math.log1p(sure)
    if judged is not None:
        surest = np.sort(judged)[::-1][:3] if len(judged) else np.zeros(1, np.float32)
        found["judged_surest"] = _logit(float(surest.mean()))
        found["judged_sum"] = math.log1p(float(judged.sum()))
        found["judged_sure"] = math.log1p(int((judged > _SURE).sum()))
    return found


def check_grading(config: GradingConfig, kinds: int, judged: bool) -> None:
    """That a network of so many kinds, and a judge where there is one, give what the photograph's answer follows from.

    Raises:
        BundleError: naming what it does not give.
    """
    said = np.zeros(1, np.float32) if judged else None
    known = photograph_features(np.zeros((kinds, 1, 1), np.float32), np.ones((1, 1), bool), said)
    missing = [name for name in config.features if name not in known]
    if missing:
        raise BundleError(
            f"the model's grading is of {', '.join(missing)}, which its 0.5x network and judge do not give: pack "
            "those that it was fitted with, or fit another (`ma-cluster bundle --grades`)"
        )


def image_score(features: Mapping[str, float], config: GradingConfig) -> float:
    """The calibrated probability of retinopathy, 0..1, of a photograph with these features."""
    return 1 / (1 + math.exp(-max(-50.0, min(50.0, log_odds(features, config)))))


def log_odds(features: Mapping[str, float], config: GradingConfig) -> float:
    """The logarithm of the odds of retinopathy."""
    terms = zip(config.features, config.mean, config.scale, config.weights, strict=True)
    return config.bias + sum(weight * (features[name] - mean) / scale for name, mean, scale, weight in terms)


def triage(lesions: int, score: float | None, refer_at: float, *, gradable: bool) -> Triage:
    """What is to be done with a photograph.

    As screening programmes do: signs that are seen refer a photograph, however poor it is; it is ungradable where none
    are seen that it might be hiding.

    Args:
        lesions: how many are called; they decide where there is no score.
        score: of the photograph; None of a model without a grading.
        refer_at: the score from which it is referred.
        gradable: whether a lack of signs would mean anything.
    """
    signs = lesions > 0 if score is None else score >= refer_at
    if signs:
        return Triage.REFER
    return Triage.NONE if gradable else Triage.UNGRADABLE


def _logit(probability: float) -> float:
    kept = min(max(probability, _LEAST), 1 - _LEAST)
    return math.log(kept / (1 - kept))
