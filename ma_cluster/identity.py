"""What a result is known by: the numbers of a recipe that decide it, and the version of the code.

A bundle's digest is that of its weights and `deciding(recipe)`; a run is known by its source, its bundle's digest and
the digest of what else decides an outcome (archive/outcomes.py).
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ma_cluster.config import Recipe
from ma_cluster.hgn_config import TRAINING as HGN_TRAINING
from ma_cluster.image_config import LIMITS

RESULT_VERSION = 4
"""Of the code from bytes to outcome. Raise it with a change after which the same photograph, weights and numbers may
give another outcome: decoding, the field of view, contrast, tiling, fusion, the lesion table, a number in the code, the
default of a number that decides; also where a plan is cut otherwise. Not for speed, messages or new columns. A run
begun at one version does not go on at another."""

_PRN_TRAINING = frozenset({
    "triplets", "steps", "learning_rate", "warmup_steps", "weight_decay", "margin", "triplet_weight",
    "colour_jitter", "refresh_steps", "refresh_share", "per_lesion", "negatives", "negative_margin_px",
    "proposal_probability", "healthy_per_image", "weight_average",
})  # fmt: skip
IDLE: dict[str, frozenset[str]] = {
    "image": LIMITS,
    "hgn_1x": HGN_TRAINING,
    "hgn_half": HGN_TRAINING,
    "prn": _PRN_TRAINING,
    "detector": frozenset({"roi_recall"}),  # it sets the two thresholds, which decide
}
"""The sections of a recipe that decide a result, and their fields that do not: they train, or limit what is accepted.
A field that is not named here decides."""


def deciding(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The numbers of a recipe that decide a result, by section.

    Those at their default are left out, so that a field which a later version adds leaves earlier digests as they are.
    """
    found = {}
    for name, idle in IDLE.items():
        section = getattr(recipe, name)
        values = {field.name: (getattr(section, field.name), field.default) for field in fields(section)}
        found[name] = {key: value for key, (value, default) in values.items() if key not in idle and value != default}
    return found
