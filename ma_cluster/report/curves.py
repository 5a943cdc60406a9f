"""The curves of all rows as PNG: precision against recall, and FROC."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ma_cluster.evaluation.froc import RATES
from ma_cluster.evaluation.scoring import precision_recall
from ma_cluster.evaluation.tally import Tally

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"hgn_1x": "#000000", "hgn_half": "#E69F00", "hgn": "#56B4E9", "cls": "#CC79A7", "prn": "#009E73"}
"""Okabe and Ito's palette, told apart by the colour-blind; a network's arithmetic row is dashed."""
_POINTS = 400


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
