"""A finished evaluation as pictures: the curves of all rows as PNG, and a sheet of each kind of example as JPEG.

On a sheet stand a legend, then the pictures row by row with their scores beneath.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ma_cluster.evaluation.examples import OUTLINE_RGB, TILE_PX, Example, Kind
from ma_cluster.evaluation.scoring import RATES, precision_recall
from ma_cluster.evaluation.tally import Tally

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"hgn_1x": "#000000", "hgn_half": "#E69F00", "hgn": "#56B4E9", "cls": "#CC79A7", "prn": "#009E73"}
"""Okabe and Ito's palette, told apart by the colour-blind; a network's arithmetic row is dashed."""
_POINTS = 400
_SHEET_COLUMNS = 8
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


def draw_pr(tally: Tally, table: Mapping[str, Any]) -> bytes:
    """Precision against recall over all thresholds; a dot at each row's operating threshold."""
    figure, axes = _canvas("recall (pixels)", "precision (pixels)")
    for name, row in table["rows"].items():
        precision, recall = precision_recall(tally.rows[name].pixels)
        kept = np.unique(np.searchsorted(recall, np.linspace(0, recall[-1], _POINTS)))
        colour, line = _style(name)
        text = f"{name}  {row['average_precision']:.3f}"
        (curve,) = axes.plot(recall[kept], precision[kept], color=colour, linestyle=line, label=text)
        curve.set_drawstyle("steps-pre")  # as the average precision adds them up
        axes.plot(row["recall"], row["precision"], "o", color=colour, markersize=4)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.legend(title="average precision", frameon=False, fontsize=8, title_fontsize=8)
    return _png(figure)


def draw_froc(tally: Tally, table: Mapping[str, Any]) -> bytes:
    """Share of the lesions found against false ones a photograph, on a logarithmic axis."""
    figure, axes = _canvas("false lesions a photograph", "sensitivity (lesions)")
    for name, row in table["rows"].items():
        lesions = tally.rows[name].lesions
        colour, line = _style(name)
        text = f"{name}  {row['froc']['mean']:.3f}"
        rates = np.maximum(lesions.false_per_photograph[::-1], RATES[0] / 4)  # 0 has no place on the axis
        (curve,) = axes.plot(rates, lesions.sensitivity[::-1], color=colour, linestyle=line, label=text)
        curve.set_drawstyle("steps-post")
    axes.set_xscale("log", base=2)
    axes.set_xlim(RATES[0] / 2, 4 * RATES[-1])
    axes.set_xticks(RATES, [f"{rate:g}" if rate >= 1 else f"1/{1 / rate:g}" for rate in RATES])
    axes.set_ylim(0, 1)
    axes.legend(title="mean at the seven rates", frameon=False, fontsize=8, title_fontsize=8, loc="upper left")
    return _png(figure)


def _canvas(across: str, up: str) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _style(row: str) -> tuple[str, str]:
    return COLOURS.get(row) or COLOURS[row.partition("_")[0]], "--" if row.endswith("_arithmetic") else "-"


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


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
