"""Pictures of single lesions: what was found, invented and missed on a photograph (the paper's Figure 2), and sheets.

Outlines are blue where a called lesion is right, yellow where it is false, white where a lesion was missed, each with a
dark rim: told apart in lightness too, so by those who are colour-blind. On a sheet stand a legend, then the pictures
row by row with their scores beneath.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8
from numpy import ndarray
from PIL import Image, ImageDraw, ImageFont

from ma_cluster.evaluation.scoring import label
from ma_cluster.images.patches import crop
from ma_cluster.images.reading import Prepared

TILE_PX = 176
PER_SHEET = 40
_FOV_SHARE = 0.035
"""Side of the picture over the diameter of the field of view: some six microaneurysms."""
_RIM_RGB = (20, 20, 20)
_SHEET_COLUMNS = 8
_CAPTION_PX = 20
_GAP_PX = 6
_HEAD_PX = 56
_JPEG_QUALITY = 88


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
_TITLES = {
    Kind.TRUE_POSITIVE: "Found microaneurysms, the surest first",
    Kind.FALSE_POSITIVE: "Called but not annotated, the surest first",
    Kind.FALSE_NEGATIVE: "Missed microaneurysms, the faintest first",
}
_LEGEND = {Kind.TRUE_POSITIVE: "found", Kind.FALSE_POSITIVE: "false", Kind.FALSE_NEGATIVE: "missed"}


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


def sheets(examples: Iterable[Example]) -> dict[str, bytes]:
    """A JPEG by the name of each kind, also where there are no examples of it."""
    listed = list(examples)
    return {kind.value: _sheet(kind, [example for example in listed if example.kind is kind]) for kind in Kind}


def _sheet(kind: Kind, examples: list[Example]) -> bytes:
    rows = max(1, -(-len(examples) // _SHEET_COLUMNS))
    columns = _SHEET_COLUMNS if len(examples) > _SHEET_COLUMNS else max(4, len(examples))
    across, down = TILE_PX + _GAP_PX, TILE_PX + _CAPTION_PX + _GAP_PX
    sheet = Image.new("RGB", (columns * across + _GAP_PX, _HEAD_PX + rows * down), (32, 32, 32))
    draw = ImageDraw.Draw(sheet)
    _head(draw, kind, len(examples))
    caption = ImageFont.load_default(size=13)
    for place, example in enumerate(examples):
        left, top = _GAP_PX + place % columns * across, _HEAD_PX + place // columns * down
        sheet.paste(Image.fromarray(np.ascontiguousarray(example.picture)), (left, top))
        text = f"p {example.score:.3f}   photograph {example.photograph}"
        draw.text((left + 2, top + TILE_PX + 2), text, fill=(220, 220, 220), font=caption)
    out = io.BytesIO()
    sheet.save(out, format="JPEG", quality=_JPEG_QUALITY)
    return out.getvalue()


def _head(draw: ImageDraw.ImageDraw, kind: Kind, count: int) -> None:
    """Title, and what each outline means."""
    title = _TITLES[kind] if count else f"{_TITLES[kind].partition(',')[0]}: none"
    draw.text((_GAP_PX + 2, 6), title, fill=(255, 255, 255), font=ImageFont.load_default(size=18))
    left, small = _GAP_PX + 2, ImageFont.load_default(size=13)
    for each, colour in OUTLINE_RGB.items():
        draw.rectangle((left, 36, left + 12, 48), outline=colour, width=2)
        draw.text((left + 18, 34), _LEGEND[each], fill=(220, 220, 220), font=small)
        left += 100
