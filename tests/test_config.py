"""Configuration: recipes come back from JSON, wrong settings are named, and what decides a result moves its digest."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ma_cluster import config, image_config, network_config
from ma_cluster.archive.outcomes import config_digest
from ma_cluster.bundle import load_bundle
from ma_cluster.config import (
    IDLE,
    RECIPES,
    DetectorConfig,
    Recipe,
    ScoreOptions,
    SplitConfig,
    deciding,
    digest,
    lite,
    paper,
    recipe_from_dict,
    tiny,
    to_dict,
)
from ma_cluster.errors import UsageError


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_comes_back_from_json(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.name == name
    assert recipe_from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        paper().hgn_1x.steps = 1  # type: ignore[misc]


def test_the_paper_recipe_has_the_numbers_of_the_paper() -> None:
    recipe = paper()
    assert (recipe.hgn_1x.width, recipe.hgn_half.width, recipe.prn.width) == (1, 1, 1)
    assert (recipe.hgn_1x.batch_patches, recipe.hgn_1x.patch_px, recipe.hgn_1x.weight_decay) == (10, 256, 0)
    assert (recipe.prn.scale, recipe.detector.fusion, len(recipe.split.validation)) == ("1x", "geometric", 10)
    assert (recipe.prn.patch_px, recipe.detector.prn_stride_px) == (128, 1)


def test_the_paper_s_patches_share_their_computation_and_are_trained_for_it() -> None:
    assert paper().detector.prn_dense
    assert paper().prn.cut_px > paper().prn.patch_px


@pytest.mark.parametrize(
    ("section", "field", "value", "complaint"),
    [
        ("image", "fov_diameter_px", 255.0, "at least 256"),
        ("image", "scale_tolerance", 0.2, "scale_tolerance"),
        ("image", "sigma_ratio", 0.0, "sigma_ratio"),
        ("image", "max_pixels", 100, "max_pixels"),
        ("hgn_1x", "width", 0.0, "width"),
        ("hgn_1x", "patch_px", 100, "multiple of 16"),
        ("hgn_half", "lesion_share", 1.1, "lesion_share"),
        ("hgn_half", "warmup_steps", 10**6, "warmup_steps"),
        ("prn", "patch_px", 60, "multiple of 16"),
        ("prn", "margin", 1.0, "margin"),
        ("prn", "triplet_weight", -1.0, "triplet_weight"),
        ("detector", "tile_px", 100, "multiples of 16"),
        ("detector", "halo_px", 256, "more than twice"),
        ("detector", "threshold", 1.0, "threshold"),
        ("detector", "prn_stride_px", 0, "prn_stride_px"),
        ("grading", "refer_at", 1.1, "refer_at"),
    ],
)
def test_a_setting_out_of_range_is_named(section: str, field: str, value: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(getattr(tiny(), section), **{field: value})
    values = to_dict(tiny())
    values[section][field] = value
    with pytest.raises(UsageError, match=complaint):
        recipe_from_dict(values)


def test_a_grading_has_as_many_weights_as_features() -> None:
    with pytest.raises(ValueError, match="a weight for each of its features"):
        replace(tiny().grading, weights=(1.0,))


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda values: {},
        lambda values: _without(values, "prn"),
        lambda values: values | {"image": None},
        lambda values: values | {"split": None},
        lambda values: values | {"split": {"validation": 3}},
        lambda values: values | {"detector": values["detector"] | {"colour": "red"}},
        lambda values: values | {"hgn_1x": values["hgn_1x"] | {"width": "wide"}},
        lambda values: values | {"grading": {"features": ["a"], "mean": [0], "scale": [1], "weights": ["heavy"]}},
    ],
)
def test_what_is_no_recipe_is_a_usage_error(spoil: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(UsageError, match="not a recipe"):
        recipe_from_dict(spoil(to_dict(tiny())))


def test_a_digest_ignores_the_order_of_keys_and_nothing_else() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1, "b": [1, 2]}) != digest({"a": 1, "b": [2, 1]})
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_every_setting_changes_the_digest() -> None:
    recipe = tiny()
    changed = [recipe, replace(recipe, detector=DetectorConfig()), replace(recipe, prn=replace(recipe.prn, margin=0.3))]
    assert len({digest(to_dict(each)) for each in changed}) == 3


def test_shared_computation_needs_a_step_that_divides_the_networks_stride() -> None:
    assert DetectorConfig(prn_dense=True, prn_stride_px=8).prn_dense
    with pytest.raises(ValueError, match="prn_dense needs a prn_stride_px of 1, 2, 4, 8 or 16"):
        DetectorConfig(prn_dense=True, prn_stride_px=3)


def test_a_recipe_from_before_shared_computation_still_refines_patch_by_patch() -> None:
    values = to_dict(tiny())
    del values["detector"]["prn_dense"]
    assert not recipe_from_dict(values).detector.prn_dense


def test_every_setting_is_documented_below_its_field() -> None:
    sources = "".join(map(inspect.getsource, (config, network_config, image_config)))
    for node in ast.parse(sources).body:
        if not isinstance(node, ast.ClassDef) or node.name == Recipe.__name__:
            continue
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{node.name}.{ast.unparse(field.target)} has no docstring"


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


def test_another_operating_point_or_grading_is_another_configuration() -> None:
    recipe = lite()
    graded = replace(recipe, grading=replace(recipe.grading, refer_at=0.25))
    digests = {config_digest(recipe, "here", ScoreOptions(point)) for point in ("default", "sensitive")}
    assert len(digests | {config_digest(graded, "here")}) == 3
    assert config_digest(recipe, "here") in digests
    assert "grading" not in deciding(recipe)  # so that models without one keep their digests


def test_a_recipe_from_before_a_field_has_the_digest_of_one_that_says_its_default(tmp_path: Path) -> None:
    before = load_bundle("lite").recipe
    values = json.loads(json.dumps(dataclasses.asdict(before)))
    values["image"].pop("fov_rim_px")
    assert digest(deciding(recipe_from_dict(values))) == digest(deciding(before))


def test_recipes_of_other_networks_have_other_digests() -> None:
    recipes: list[Recipe] = [paper(), lite(), tiny()]
    assert len({digest(deciding(recipe)) for recipe in recipes}) == 3


def test_each_photograph_is_left_out_of_one_fold_and_the_last_is_the_usual_split() -> None:
    names = [name for number in range(1, 6) for name in SplitConfig.fold(number).validation]
    assert names == [f"IDRiD_{number:02d}" for number in range(1, 55)]
    assert SplitConfig.fold(5) == SplitConfig()
