"""A finished evaluation -> what people read of it: table.json, table.md, the curves of all rows, sheets of examples."""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from ma_cluster.bundle import Bundle
from ma_cluster.config import digest
from ma_cluster.evaluation.examples import sheets
from ma_cluster.evaluation.figures import (
    COVERAGE,
    FEWEST,
    RESAMPLES,
    SEED,
    called_figures,
    healthy_figures,
    table_figures,
)
from ma_cluster.evaluation.pooling import PHOTOGRAPHS, encode_photographs
from ma_cluster.evaluation.scoring import RATES, precision_recall
from ma_cluster.evaluation.tally import DETECT, ROWS, Tally, network_of, rows_given
from ma_cluster.storage.store import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER = {
    "hgn_1x": (0.3374, 0.3618, 0.2970, 0.4626),
    "hgn_half": (0.3411, 0.4001, 0.4380, 0.3682),
    "hgn_geometric": (0.3622, 0.3866, 0.5115, 0.3108),
    "hgn_arithmetic": (0.3701, 0.4156, 0.4741, 0.3701),
    "cls_geometric": (0.3895, 0.4153, 0.5402, 0.3374),
    "cls_arithmetic": (0.3905, 0.4368, 0.4973, 0.3895),
    "prn_arithmetic": (0.3978, 0.4323, 0.5405, 0.3602),
    "prn_geometric": (0.4196, 0.3848, 0.6113, 0.2807),
}
"""AUC PR, F1, precision and recall of the paper's Table 2, on IDRiD's 27 test photographs."""
CONVENTIONS = {
    "called": "A pixel is called where p >= threshold. Pixels are counted on each photograph's own grid and pooled "
    + "over all photographs, those without lesions too.",
    "precision": "1 where nothing is called.",
    "auc_pr_33": "Trapezoid of precision against recall at thresholds 0, 1/32, ..., 1, as in the IDRiD challenge and "
    + "the paper; recall is 1 at threshold 0; no point is added at either end. Coarse: a "
    + "map whose scores lie between two thresholds is flattered.",
    "average_precision": "Sum over all thresholds of (recall step) x precision, as in scikit-learn; never to be "
    + "compared with auc_pr_33.",
    "ci": f"Percentile interval ({COVERAGE:.0%}) of the average precision over {RESAMPLES} resamples (seed {SEED}) of "
    + "the photographs, or of their groups where a manifest names several, from counts in some 2000 score bins. "
    + "Differences are of the same resamples, so paired.",
    "claim": "Of 'better beats than': holds where the whole interval of the difference is above 0, does not where it "
    + f"is below, else, or with fewer than {FEWEST} photographs or groups, cannot be told.",
    "threshold": "f1, precision and recall are at the best-F1 threshold of the bundle's validation where it has one, "
    + "else of these photographs (threshold_from says which); at_half is at 0.5, best at the best of these.",
    "froc": "Share of the reference lesions found with at most so many false ones a photograph. Lesions are "
    + "8-connected; one overlapping pixel finds a lesion; a called component without overlap is false, however small. "
    + "Thresholds from the highest down to where the rate is first passed. A component that covers much finds much.",
    "detect": "Pixels by the map that `detect` outlines; in froc each outline as a whole, by its score.",
    "found": "Reference lesions that what `detect` reports overlaps; beside them what it reports that overlaps none.",
    "false_on": "Shares of the false pixels of all its outlines; rim is within 8 px (1x grid) of a reference lesion; "
    + "vessels are found roughly; other lesions and the disc where the data set outlines them.",
    "healthy": "Lesions that `detect` reports, at the detector's own fusion, threshold and smallest area.",
}
BOOTSTRAP = {"resamples": RESAMPLES, "seed": SEED, "coverage": COVERAGE}
_COLUMNS = ["row", "AUC PR (33)", "average precision", "F1", "precision", "recall", "FROC mean"]
_PAPER_COLUMNS = ["paper: AUC PR", "F1", "precision", "recall"]
COLOURS = {
    "hgn_1x": "#000000",
    "hgn_half": "#E69F00",
    "hgn": "#56B4E9",
    "cls": "#CC79A7",
    "prn": "#009E73",
    "detect": "#D55E00",
}
"""Okabe and Ito's palette, told apart by the colour-blind; a network's arithmetic row is dashed."""
_POINTS = 400


def table(tally: Tally, bundle: Bundle, split: str) -> dict[str, Any]:
    """The content of table.json.

    Raises:
        UsageError: no photograph has a lesion.
    """
    validated: Mapping[str, Any] = bundle.validation.get("rows", {})
    thresholds = {row: float(figures["threshold"]) for row, figures in validated.items()}
    if validated:
        thresholds[DETECT] = bundle.recipe.detector.threshold
    pooled = [photograph for photograph in tally.photographs if photograph.pixels]
    detector, given = bundle.recipe.detector, rows_given(bundle.weights)
    return {
        **apart(table_figures(tally, thresholds)),
        "left_out": {row: f"the bundle has no {network_of(row)}" for row in ROWS if row not in given},
        "images": len(pooled),
        "lesions": next(iter(tally.rows.values())).lesions.lesions,
        "called": called_figures(tally),
        "healthy": healthy_figures(tally),
        "split": split,
        "bundle": bundle.digest,
        "detector": {"network": bundle.stage, "fusion": detector.fusion, "threshold": detector.threshold},
        "data": digest(sorted(photograph.digest for photograph in pooled)),
        "bootstrap": BOOTSTRAP,
        "conventions": CONVENTIONS,
        **made(),
    }


def apart(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures with what `detect` does beside the rows of the paper, not among them."""
    rows = dict(figures["rows"])
    return {**figures, "detect": rows.pop(DETECT, None), "rows": rows}


def all_rows(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of the paper and, where it was counted, what `detect` does, by name."""
    return values["rows"] | ({DETECT: values["detect"]} if values.get("detect") else {})


def made() -> dict[str, Any]:
    """With what an evaluation was made, and when."""
    packages = ("ma_cluster", "torch", "numpy", "opencv-python-headless", "ray")
    return {
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_evaluation(out: Store, values: Mapping[str, Any], tally: Tally) -> None:
    """Every file of an evaluation; table.json last.

    Raises:
        StoreError: the destination cannot be written.
    """
    out.put("pr.png", draw_pr(tally, values))
    out.put("froc.png", draw_froc(tally, values))
    for name, jpeg in sheets(tally.examples).items():
        out.put(f"examples/{name}.jpg", jpeg)
    out.put(PHOTOGRAPHS, encode_photographs(tally.photographs))
    out.put("table.md", ("\n".join(markdown(values)) + "\n").encode())
    out.put("table.json", (json.dumps(values, indent=2) + "\n").encode())


def markdown(values: Mapping[str, Any]) -> Iterable[str]:
    """The lines of table.md."""
    yield f"# {values['images']} photographs ({values['split']}), {values['lesions']} microaneurysms"
    yield ""
    yield f"Model `{values['bundle'][:12]}`, data `{values['data'][:12]}`, {values['date']}."
    yield "Conventions: see `table.json`."
    yield ""
    yield from rows_markdown(values)
    yield ""
    yield from differences_markdown(values)
    yield ""
    yield from called_markdown(values)
    yield from healthy_markdown(values)


def rows_markdown(values: Mapping[str, Any]) -> Iterable[str]:
    """The table of the rows, the paper's figures beside."""
    columns = [*_COLUMNS, *_PAPER_COLUMNS]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for name in (*ROWS, DETECT):
        if name in all_rows(values) or name in values["left_out"]:
            paper = [f"{value:.3f}" for value in PAPER[name]] if name in PAPER else [""] * len(_PAPER_COLUMNS)
            cells = [name, *_own_cells(values, name), *paper]
            yield f"| {' | '.join(cells)} |"
    sources = {row["threshold_from"] for row in all_rows(values).values()}
    yield ""
    yield "Average precision with its 95 % interval over photographs, or groups that are named. F1, precision and"
    yield f"recall at the best threshold of {' or '.join(sorted(sources))}."
    yield "The paper's figures are of IDRiD's 27 test photographs; its thresholds are not stated."


def _own_cells(values: Mapping[str, Any], name: str) -> list[str]:
    """What was measured of a row, or why nothing was."""
    if name in values["left_out"]:
        return [values["left_out"][name], *[""] * (len(_COLUMNS) - 2)]
    row = all_rows(values)[name]
    interval = f"{row['average_precision']:.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f})"
    rest = [row["f1"], row["precision"], row["recall"], row["froc"]["mean"]]
    return [f"{row['auc_pr_33']:.3f}", interval, *(f"{value:.3f}" for value in rest)]


def differences_markdown(values: Mapping[str, Any]) -> Iterable[str]:
    """What these photographs say of the paper's claims."""
    yield "| claim | difference in average precision | 95 % interval | |"
    yield "|---|---|---|---|"
    for d in values["differences"]:
        interval = f"{d['ci_low']:+.3f} to {d['ci_high']:+.3f}"
        yield f"| {d['better']} beats {d['than']} | {d['difference']:+.3f} | {interval} | {d['claim']} |"


def called_markdown(values: Mapping[str, Any]) -> Iterable[str]:
    """What is called on the annotated photographs, and what the false pixels lie on."""
    called = values["called"]
    places = sorted(called["false_on"].items(), key=lambda place: -place[1])
    shares = ", ".join(f"{place.replace('_', ' ')} {share:.0%}" for place, share in places if share >= 0.005)
    found, false = called["found"], called["false_per_image"]
    yield f"What is called finds {found:.0%} of the lesions, with {false:.1f} false calls a photograph."
    yield f"The false pixels of all outlines lie on: {shares}."
    yield ""


def healthy_markdown(values: Mapping[str, Any]) -> Iterable[str]:
    """False lesions on photographs without any."""
    healthy = values["healthy"]
    if healthy is None:
        yield "No photographs without lesions were given."
        return
    yield (
        f"On {healthy['images']} photographs without lesions the model calls {healthy['lesions_per_image']:.1f} each "
        f"(median {healthy['median']:g}, at most {healthy['most']}); {healthy['images_without']} have none."
    )


def draw_pr(tally: Tally, table: Mapping[str, Any]) -> bytes:
    """Precision against recall over all thresholds; a dot at each row's operating threshold."""
    figure, axes = _canvas("recall (pixels)", "precision (pixels)")
    for name, row in all_rows(table).items():
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
    for name, row in all_rows(table).items():
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
