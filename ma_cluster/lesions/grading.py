"""The photograph's own answer: does it show retinopathy, and what is to be done with it?

maps of the 0.5x network -> features -> `image_score`, calibrated -> triage. The fit: evaluation/calibration.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float32
from numpy import ndarray

from ma_cluster.config import GradingConfig
from ma_cluster.errors import BundleError, Status, Triage
from ma_cluster.images.fundus import Fov
from ma_cluster.images.quality import Quality
from ma_cluster.lesions.table import Lesion
from ma_cluster.network_config import KINDS

_LEAST = 1e-6  # of a probability before its logarithm


@dataclass(frozen=True, slots=True)
class Findings:
    """What is said of a photograph that could be scored."""

    lesions: tuple[Lesion, ...]
    image_score: float | None
    """Probability that the photograph shows retinopathy; None of a model without a grading."""
    triage: Triage


def to_values(findings: Findings, fov: Fov, shape: tuple[int, int], quality: Quality) -> dict[str, Any]:
    """What is said of a scored photograph in JSON, one file or answer for each; `shape` is its height and width."""
    measures = asdict(quality)
    return {
        "status": Status.SCORED,
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


def photograph_features(maps: Float32[ndarray, "k h w"], fov: Bool[ndarray, "h w"]) -> dict[str, float]:
    """What is measured on a photograph, by name.

    Args:
        maps: probability of each of the first k of KINDS against the background, on the 0.5x grid.
        fov: its field of view, which is not empty.
    """
    found = {}
    for kind, probability in zip(KINDS, maps, strict=False):
        inside = probability[fov]
        sure = cv2.connectedComponents((probability >= 0.5).astype(np.uint8), connectivity=8)[0] - 1
        found[f"{kind}_largest"] = _logit(float(inside.max()))
        found[f"{kind}_mean"] = math.log(max(_LEAST, float(inside.mean(dtype=np.float64))))
        found[f"{kind}_count"] = math.log1p(sure)
    return found


def check_grading(config: GradingConfig, kinds: int) -> None:
    """That a network of so many kinds gives what the photograph's answer follows from.

    Raises:
        BundleError: naming what it does not give.
    """
    known = photograph_features(np.zeros((kinds, 1, 1), np.float32), np.ones((1, 1), bool))
    missing = [name for name in config.features if name not in known]
    if missing:
        raise BundleError(
            f"the model's grading is of {', '.join(missing)}, which its 0.5x network does not give: pack the network "
            "that it was fitted with, or fit another (`ma-cluster bundle --grades`)"
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
