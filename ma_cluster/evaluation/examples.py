"""Pictures of single lesions: what was found, invented and missed on a photograph (the paper's Figure 2).

Outlines are blue where a called lesion is right, yellow where it is false, white where a lesion was missed, each with a
dark rim: told apart in lightness too, so by those who are colour-blind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8
from numpy import ndarray

from ma_cluster.evaluation.scoring import label
from ma_cluster.images.contrast import Prepared
from ma_cluster.images.patches import crop

TILE_PX = 176
PER_SHEET = 40
_FOV_SHARE = 0.035
"""Side of the picture over the diameter of the field of view: some six microaneurysms."""
_RIM_RGB = (20, 20, 20)


class Kind(StrEnum):
    """What became of a lesion at the operating threshold."""

    TRUE_POSITIVE = "true_positives"
    FALSE_POSITIVE = "false_positives"
    FALSE_NEGATIVE = "false_negatives"


OUTLINE_RGB = {
    Kind.TRUE_POSITIVE: (86, 180, 233),
    Kind.FALSE_POSITIVE: (240, 228, 66),
    Kind.FALSE_NEGATIVE: (255, 255, 255),
}
"""Sky blue and yellow of Okabe and Ito's palette, and white."""


@dataclass(frozen=True, slots=True)
class Example:
    """The surroundings of a lesion; `score` is the largest fused probability within it."""

    kind: Kind
    photograph: int
    score: float
    picture: UInt8[ndarray, "s s 3"]


@dataclass(frozen=True, slots=True)
class Judged:
    """A photograph with what was called and what is to be found, on its own grid."""

    prepared: Prepared
    called: Bool[ndarray, "h w"]
    labels: Int32[ndarray, "h w"]
    """Components of the reference mask."""
    probability: Float32[ndarray, "h w"]


def find_examples(judged: Judged, photograph: int) -> list[Example]:
    """The pictures of a photograph, at most a sheet of each kind."""
    called = label(judged.called)
    both = (called > 0) & (judged.labels > 0)
    right, found = np.unique(called[both]), np.unique(judged.labels[both])
    numbered = {
        Kind.TRUE_POSITIVE: called * np.isin(called, right),
        Kind.FALSE_POSITIVE: called * ~np.isin(called, right),
        Kind.FALSE_NEGATIVE: judged.labels * ~np.isin(judged.labels, found),
    }
    masks = {kind: labels > 0 for kind, labels in numbered.items()}
    examples = []
    for kind, labels in numbered.items():
        lesions = list(_lesions(labels, judged.probability))
        lesions.sort(key=lambda lesion: lesion[0], reverse=kind is not Kind.FALSE_NEGATIVE)
        examples += [
            Example(kind, photograph, score, _picture(judged.prepared, masks, centre))
            for score, centre in lesions[:PER_SHEET]
        ]
    return examples


def worst_first(examples: Iterable[Example]) -> list[Example]:
    """At most a sheet of each kind: false ones from the surest down, missed ones from the faintest up.

    True ones stand from the surest down.
    """
    ordered = sorted(examples, key=lambda e: (e.score if e.kind is Kind.FALSE_NEGATIVE else -e.score, e.photograph))
    kept = [[example for example in ordered if example.kind is kind][:PER_SHEET] for kind in Kind]
    return [example for sheet in kept for example in sheet]


def _lesions(
    labels: Int32[ndarray, "h w"], probability: Float32[ndarray, "h w"]
) -> Iterator[tuple[float, tuple[int, int]]]:
    """Largest probability and centre (row, col) of each numbered component."""
    rows, cols = np.nonzero(labels)
    numbers, lesion = np.unique(labels[rows, cols], return_inverse=True)
    scores = np.zeros(len(numbers), np.float32)
    np.maximum.at(scores, lesion, probability[rows, cols])
    counts = np.bincount(lesion, minlength=len(numbers))
    centres = [np.bincount(lesion, axis, len(numbers)) / counts for axis in (rows, cols)]
    for score, row, col in zip(scores.tolist(), *(axis.astype(int).tolist() for axis in centres), strict=True):
        yield score, (row, col)


def _picture(
    prepared: Prepared, masks: dict[Kind, Bool[ndarray, "h w"]], centre: tuple[int, int]
) -> UInt8[ndarray, "s s 3"]:
    side = max(16, round(_FOV_SHARE * prepared.fov.diameter_px))
    tile = (TILE_PX, TILE_PX)
    picture = cv2.resize(crop(prepared.pixels, *centre, side, 0), tile, interpolation=cv2.INTER_CUBIC)
    outlines = []
    for kind, mask in masks.items():
        shown = cv2.resize(crop(mask.astype(np.uint8), *centre, side, 0), tile, interpolation=cv2.INTER_NEAREST)
        grown = cv2.dilate(shown, np.ones((7, 7), np.uint8))
        contours, _ = cv2.findContours(grown, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        outlines.append((contours, OUTLINE_RGB[kind]))
    for contours, _ in outlines:
        cv2.drawContours(picture, contours, -1, _RIM_RGB, 4, cv2.LINE_AA)
    for contours, colour in outlines:
        cv2.drawContours(picture, contours, -1, colour, 2, cv2.LINE_AA)
    return picture
