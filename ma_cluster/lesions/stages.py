"""The networks of a recipe, by their names in a bundle."""

from __future__ import annotations

from torch import nn

from ma_cluster.config import Recipe
from ma_cluster.hypotheses.step import build_hgn
from ma_cluster.refinement.step import build_prn


def build_network(name: str, recipe: Recipe) -> nn.Module:
    """`hgn_1x`, `hgn_half`, `prn` or `cls`, freshly initialised."""
    if name in ("prn", "cls"):
        return build_prn(recipe.prn)
    return build_hgn(recipe.hgn_1x if name == "hgn_1x" else recipe.hgn_half)
