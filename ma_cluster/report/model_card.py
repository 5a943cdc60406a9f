"""A bundle and its evaluations -> the model's card, README.md in the bundle's folder, with pictures beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ma_cluster.bundle import Bundle, load_bundle
from ma_cluster.config import JUDGE
from ma_cluster.errors import UsageError
from ma_cluster.evaluation.examples import Kind
from ma_cluster.report.evaluation_report import differences_markdown, healthy_markdown, rows_markdown

INTENDED_USE = """## Intended use

Research on the screening of diabetic retinopathy: to outline likely microaneurysms in colour fundus photographs, for
counting, or to sort an archive. It outlines nothing but microaneurysms. It is not a medical device: nothing it says
replaces the judgement of a clinician, and an empty answer does not mean a healthy eye."""
LIMITS = """## Limits

- Photographs of cameras that it was not trained on are brought to its scale, but colours, compression and disease may
  differ from all it has seen; evaluate it on annotated photographs of your own.
- Where one annotator sees a microaneurysm another sees none: some of what counts as false is a lesion, some of what
  counts as missed is none. Figures at pixel level also weigh where an outline is drawn.
- A lesion a few pixels across is lost in photographs whose field of view is under about a thousand pixels.
- Scores of pixels and lesions rank them; they are no probabilities of disease. An image score is one for photographs
  like those that calibrated it: elsewhere `ma-cluster evaluate --grades` says what it is worth."""
_CAPTIONS = {
    Kind.FALSE_POSITIVE: "Called but not annotated, the surest first",
    Kind.FALSE_NEGATIVE: "Missed, the faintest first",
    Kind.TRUE_POSITIVE: "Found, the surest first",
}


def write_card(folder: Path, table: Mapping[str, Any], pictures: Path | None) -> Path:
    """Write README.md into a bundle's folder, and copy the pictures beside it.

    Args:
        folder: of the bundle.
        table: table.json of an evaluation of it.
        pictures: folder of another evaluation of it, on photographs that may be published.

    Returns:
        The card's path.

    Raises:
        BundleError: the folder holds no bundle.
        UsageError: an evaluation is of another model, or `pictures` is none.
    """
    bundle = load_bundle(folder)
    if pictures is not None and not (pictures / "table.json").is_file():
        raise UsageError(f"{pictures} has no table.json; give the --out of `ma-cluster evaluate`")
    published = None if pictures is None else json.loads((pictures / "table.json").read_text())
    for values in (table, published):
        if values is not None and values["bundle"] != bundle.digest:
            raise UsageError("the evaluation is of another model than the bundle's; run `ma-cluster evaluate` again")
    if pictures is not None:
        for kind in _CAPTIONS:
            (folder / f"{kind.value}.jpg").write_bytes((pictures / "examples" / f"{kind.value}.jpg").read_bytes())
    card = folder / "README.md"
    card.write_text("\n".join(model_card(bundle, table, published)) + "\n")
    return card


def model_card(bundle: Bundle, table: Mapping[str, Any], published: Mapping[str, Any] | None = None) -> Iterator[str]:
    """The lines of a card.

    Args:
        bundle: the model.
        table: its evaluation.
        published: the evaluation whose pictures lie beside the card.
    """
    yield f"# {bundle.recipe.name}: a model that finds microaneurysms"
    yield ""
    yield f"Digest `{bundle.digest}`. Evaluated {table['date']}. Written by `ma-cluster card`; do not edit."
    yield ""
    yield INTENDED_USE
    yield ""
    yield from _model(bundle)
    yield ""
    yield from _figures(table)
    yield ""
    yield from _failures(table, published)
    yield ""
    yield LIMITS


def _model(bundle: Bundle) -> Iterator[str]:
    recipe = bundle.recipe
    detector = recipe.detector
    yield "## Model and data"
    yield ""
    yield (
        f"Two FRRN-A of {recipe.hgn_1x.width:.3g} and {recipe.hgn_half.width:.3g} times the published width propose "
        f"lesions at full scale (a field of view of {recipe.image.fov_diameter_px:.0f} pixels) and at half of it."
    )
    if bundle.stage == "prn":
        yield (
            f"A ResNet-50 of {recipe.prn.width:.3g} times the published width, trained with triplet loss, refines them "
            f"on patches of {recipe.prn.patch_px} pixels at {recipe.prn.scale}."
        )
    yield f"Maps are joined by their {detector.fusion} mean; a lesion begins at {detector.threshold:.3f}."
    idle = [
        name
        for name, weight in (("the network at full scale", detector.weight_1x), ("the refinement", detector.weight_prn))
        if weight == 0
    ]
    if idle:
        yield f"On the validation photographs it did best without {' and without '.join(idle)}: not run."
    if JUDGE in bundle.weights:
        yield f"A judge of whole candidates says how sure each is; it is called from {detector.least_score:.3f}."
    yield ""
    yield bundle.attribution or "Nothing is recorded about the data it was trained on."
    chosen = bundle.validation.get("photographs", [])
    if chosen:
        yield ""
        yield (
            f"Regions of interest, fusion and thresholds were chosen on {len(chosen)} validation photographs "
            f"({chosen[0]} to {chosen[-1]}), which trained nothing."
        )
    yield ""
    yield from _grading(bundle)


def _grading(bundle: Bundle) -> Iterator[str]:
    """What the photograph's own answer is."""
    grading, figures = bundle.recipe.grading, bundle.validation.get("grading")
    if not grading.features:
        yield "It gives no image score: a photograph is referred where a lesion is called."
        return
    yield (
        f"The image score is a logistic regression on {len(grading.features)} measures of the 0.5x network's maps and "
        f"candidates; a photograph is referred from {grading.refer_at:.3f}."
    )
    if figures is not None:
        yield (
            f"It was fitted on {figures['training']} graded photographs, calibrated on {figures['validation']} others, "
            f"where it tells none from any retinopathy with an area under the ROC curve of {figures['area']:.3f}, and "
            f"refers {figures['sensitivity']:.0%} of grade 2 and up and {1 - figures['specificity']:.0%} of none."
        )


def _figures(table: Mapping[str, Any]) -> Iterator[str]:
    yield "## Figures"
    yield ""
    yield (
        f"On {table['images']} photographs of the {table['split']} split with {table['lesions']} microaneurysms "
        f"(data `{table['data'][:12]}`):"
    )
    yield ""
    yield from rows_markdown(table)
    if table["split"] == "validation":
        yield ""
        yield "Thresholds and fusion were chosen on this split, so its figures flatter the model a little."
    yield ""
    yield "The paper's claims on these photographs (paired bootstrap over photographs, or groups that are named):"
    yield ""
    yield from differences_markdown(table)


def _failures(table: Mapping[str, Any], published: Mapping[str, Any] | None) -> Iterator[str]:
    row = table["detect"]
    yield "## Where it fails"
    yield ""
    if row is not None:
        froc = row["froc"]
        yield f"With one false lesion a photograph it finds {froc['1']:.0%} of the lesions, with eight {froc['8']:.0%}."
    yield from healthy_markdown(table)
    if published is None:
        return
    yield ""
    yield (
        f"The pictures are from an evaluation on {published['images']} photographs that may be published "
        f"(data `{published['data'][:12]}`), with {published['lesions']} microaneurysms, outlined blue where found, "
        "yellow where false, white where missed:"
    )
    for kind, caption in _CAPTIONS.items():
        yield ""
        yield f"![{caption}]({kind.value}.jpg)"
        yield ""
        yield f"*{caption}.*"
