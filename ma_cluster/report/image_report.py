"""A finished evaluation against grades -> what people read of it: images.json and images.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ma_cluster.bundle import Bundle
from ma_cluster.config import digest
from ma_cluster.evaluation.figures import COVERAGE, RESAMPLES, SEED
from ma_cluster.evaluation.image_figures import GradedAnswer, image_figures
from ma_cluster.report.evaluation_report import BOOTSTRAP, made
from ma_cluster.storage.store import Store

CONVENTIONS = {
    "grades": "0 none, 1 mild, 2 moderate and so on; 'with' counts the photographs that are to be called. A photograph "
    + "that could not be scored is in no figure; 'unscored' counts them by reason.",
    "sensitivity": "Of calling what has the bundle's frozen image score, refer_at, or more; so is specificity.",
    "sensitivity_at_specificity": "The largest of one rate over the thresholds at which the other is so much or more; "
    + "nothing is interpolated. These thresholds are chosen on the same photographs, which flatters.",
    "area": "Share of pairs, one with and one without, whose scores are in order; ties count a half.",
    "ci": f"Percentile interval ({COVERAGE:.0%}) over {RESAMPLES} resamples (seed {SEED}) of the photographs, or of "
    + "groups of them, as patients, that the grades name.",
    "calibration": "Brier score, and by fifths of the photographs, the least scores first, the mean score beside the "
    + "share of them that has retinopathy.",
    "subgroups": "By every other column of the grades: up to ten values as they are, of more numbers the thirds; "
    + "columns of more texts are left out.",
}


def images_table(answers: Sequence[GradedAnswer], bundle: Bundle, split: str) -> dict[str, Any]:
    """The content of images.json.

    Raises:
        UsageError: no photograph with, or none without retinopathy could be scored.
    """
    return image_figures(answers, bundle.recipe.grading.refer_at) | {
        "split": split,
        "bundle": bundle.digest,
        "data": digest(sorted(answer.digest for answer in answers)),
        "bootstrap": BOOTSTRAP,
        "conventions": CONVENTIONS,
        **made(),
    }


def write_images(out: Store, values: Mapping[str, Any]) -> None:
    """images.md and images.json; raises StoreError where the destination cannot be written."""
    out.put("images.md", ("\n".join(images_markdown(values)) + "\n").encode())
    out.put("images.json", (json.dumps(values, indent=2) + "\n").encode())


def images_markdown(values: Mapping[str, Any]) -> Iterable[str]:
    """The lines of images.md."""
    yield f"# The photographs' own answers: {values['images']} graded ({values['split']})"
    yield ""
    yield f"Model `{values['bundle'][:12]}`, data `{values['data'][:12]}`, {values['date']}. A photograph is referred"
    yield f"from an image score of {values['refer_at']:.3f} (frozen). 95 % intervals over photographs, or groups of"
    yield "them; conventions: see `images.json`."
    if values["split"] == "test":
        yield ""
        yield "All photographs of the table were asked. Those that trained or calibrated the model, if any, flatter it."
    yield ""
    yield from _comparisons_markdown(values["comparisons"])
    for rate, given in (("sensitivity", "specificity"), ("specificity", "sensitivity")):
        yield ""
        yield from _beside_markdown(values["comparisons"], rate, given)
    yield ""
    yield "| grade | photographs | refer | none | ungradable |"
    yield "|---|---|---|---|---|"
    for grade, count in values["grades"].items():
        todo = values["triage"][grade]
        yield f"| {grade} | {count} | {todo['refer']} | {todo['none']} | {todo['ungradable']} |"
    if values["unscored"]:
        yield ""
        yield f"Not scored: {', '.join(f'{reason} {count}' for reason, count in values['unscored'].items())}."
    for column, groups in values["subgroups"].items():
        yield ""
        yield f"## By {_cell(column)}"
        yield ""
        named = {f"{_cell(value)}, {name}": each for value, of in groups.items() for name, each in of.items()}
        yield from _comparisons_markdown(named)


def _comparisons_markdown(comparisons: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    yield "| | with | without | area under ROC | sensitivity | specificity |"
    yield "|---|---|---|---|---|---|"
    for name, each in comparisons.items():
        figures = [_with_interval(each.get(figure)) for figure in ("area", "sensitivity", "specificity")]
        yield f"| {name.replace('_', ' ')} | {each['with']} | {each['without']} | {' | '.join(figures)} |"


def _beside_markdown(comparisons: Mapping[str, Mapping[str, Any]], rate: str, given: str) -> Iterable[str]:
    known = {name: each[f"{rate}_at_{given}"] for name, each in comparisons.items() if "area" in each}
    levels: Mapping[str, Any] = next(iter(known.values()), {})
    yield f"| {rate} at a {given} of | {' | '.join(levels)} |"
    yield "|---" * (len(levels) + 1) + "|"
    for name, each in known.items():
        yield f"| {name.replace('_', ' ')} | {' | '.join(_with_interval(figure) for figure in each.values())} |"


def _with_interval(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return "too few"
    return f"{figure['value']:.3f} ({figure['ci_low']:.3f} to {figure['ci_high']:.3f})"


def _cell(text: str) -> str:
    """Somebody else's text as a cell of a table."""
    return "".join(c if c.isprintable() else " " for c in text).replace("|", "/")
