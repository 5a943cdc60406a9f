"""What a result is known by: every number that decides moves the digest, and nothing else does."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest

from ma_cluster.archive.outcomes import config_digest
from ma_cluster.bundle import load_bundle
from ma_cluster.config import Recipe, digest, lite, paper, recipe_from_dict, tiny
from ma_cluster.identity import IDLE, deciding

PLAIN = Recipe(name="plain")  # every number at its default
DEFAULTS = {
    "image": {
        "fov_diameter_px": 3410.0, "scale_tolerance": 0.03, "contrast_gain": 4.0, "sigma_ratio": 1 / 30,
        "min_side_px": 256, "fov_search_px": 512, "fov_kernel_px": 5, "fov_dark_percentile": 1.0,
        "fov_bright_percentile": 95.0, "fov_max_surround": 60.0, "fov_contrast_share": 0.15, "fov_min_contrast": 8.0,
        "fov_cut_px": 2, "fov_min_arc_px": 40, "fov_outlier_px": 2.0, "fov_outlier_share": 0.02,
        "fov_min_arc_share": 0.5, "fov_core": 0.9, "fov_min_inside": 0.95, "fov_min_disc": 0.5,
        "fov_min_photograph": 0.03, "fov_min_texture": 2.0, "fov_rim_px": 1.5,
    },
    "hgn_1x": {"width": 1.0},
    "prn": {"width": 1.0, "scale": "1x", "patch_px": 128, "context_px": 0},
    "detector": {
        "tile_px": 512, "halo_px": 64, "flips_1x": 1, "flips_half": 1, "roi_threshold_1x": 0.1,
        "roi_threshold_half": 0.1, "prn_stride_px": 1, "prn_odds": 1.0, "prn_dense": False, "fusion": "geometric",
        "threshold": 0.5, "min_area_px": 20,
    },
}  # fmt: skip


@pytest.mark.parametrize("section", DEFAULTS)
def test_a_default_that_decides_stays_or_results_get_another_version(section: str) -> None:
    """Digests leave defaults out: who changes one raises RESULT_VERSION, and then the value here."""
    config = getattr(PLAIN, section)
    assert {name: getattr(config, name) for name in DEFAULTS[section]} == DEFAULTS[section]


@pytest.mark.parametrize("section", IDLE)
def test_every_field_but_those_that_train_or_limit_moves_the_digest(section: str) -> None:
    recipe, config = PLAIN, getattr(PLAIN, section)
    other: dict[type, object] = {bool: True, int: 48, float: 0.045}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        words = {"geometric": "arithmetic", "1x": "0.5x", "regions": "both"}
        changed = object.__new__(type(config))  # whatever its own checks say of the value
        for each in dataclasses.fields(config):
            object.__setattr__(changed, each.name, getattr(config, each.name))
        object.__setattr__(changed, field.name, words.get(value, other.get(type(value), "else")))
        moved = deciding(replace(recipe, **{section: changed})) != deciding(recipe)
        assert moved == (field.name not in IDLE[section]), field.name


def test_fields_that_do_not_decide_are_fields() -> None:
    for section, idle in IDLE.items():
        assert idle <= {field.name for field in dataclasses.fields(getattr(paper(), section))}


def test_training_and_limits_of_operation_do_not_keep_a_run_from_going_on() -> None:
    recipe = lite()
    for other in (
        replace(recipe, name="mine", split=replace(recipe.split, validation=("one",))),
        replace(recipe, prn=replace(recipe.prn, learning_rate=1.0, steps=9000)),
        replace(recipe, image=replace(recipe.image, max_pixels=2 * recipe.image.max_pixels, max_bytes=2**30)),
    ):
        assert config_digest(other, "here") == config_digest(recipe, "here")


def test_where_the_field_of_view_begins_is_another_configuration() -> None:
    recipe = lite()
    other = replace(recipe, image=replace(recipe.image, fov_contrast_share=0.2))
    assert config_digest(other, "here") != config_digest(recipe, "here") != config_digest(recipe, "elsewhere")


def test_a_recipe_from_before_a_field_has_the_digest_of_one_that_says_its_default(tmp_path: Path) -> None:
    before = load_bundle("lite").recipe
    values = json.loads(json.dumps(dataclasses.asdict(before)))
    values["image"].pop("fov_rim_px")
    assert digest(deciding(recipe_from_dict(values))) == digest(deciding(before))


def test_recipes_of_other_networks_have_other_digests() -> None:
    recipes: list[Recipe] = [paper(), lite(), tiny()]
    assert len({digest(deciding(recipe)) for recipe in recipes}) == 3
