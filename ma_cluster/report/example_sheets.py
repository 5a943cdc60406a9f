"""Examples -> one contact sheet of each kind, as JPEG: a legend, then pictures row by row with scores beneath."""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ma_cluster.evaluation.examples import OUTLINE_RGB, TILE_PX, Example, Kind

COLUMNS = 8
_CAPTION_PX = 20
_GAP_PX = 6
_HEAD_PX = 56
_JPEG_QUALITY = 88
_TITLES = {
    Kind.TRUE_POSITIVE: "Found microaneurysms, the surest first",
    Kind.FALSE_POSITIVE: "Called but not annotated, the surest first",
    Kind.FALSE_NEGATIVE: "Missed microaneurysms, the faintest first",
}
_LEGEND = {Kind.TRUE_POSITIVE: "found", Kind.FALSE_POSITIVE: "false", Kind.FALSE_NEGATIVE: "missed"}


def sheets(examples: Iterable[Example]) -> dict[str, bytes]:
    """A JPEG by the name of each kind, also where there are no examples of it."""
    listed = list(examples)
    return {kind.value: _sheet(kind, [example for example in listed if example.kind is kind]) for kind in Kind}


def _sheet(kind: Kind, examples: list[Example]) -> bytes:
    rows = max(1, -(-len(examples) // COLUMNS))
    columns = COLUMNS if len(examples) > COLUMNS else max(4, len(examples))
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
