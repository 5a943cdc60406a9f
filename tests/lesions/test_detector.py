"""The stages joined, on the CC0 photograph and on real ones where they are."""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from ma_cluster.bundle import Bundle, load_bundle, save_bundle
from ma_cluster.config import GradingConfig, tiny
from ma_cluster.errors import ImageFailedError, ImageRefusedError, Reason
from ma_cluster.hypotheses.frrn import build_hgn, of_kinds
from ma_cluster.hypotheses.maps import Maps, fuse, upsample_half
from ma_cluster.images.sample import enlarged_sample, retina
from ma_cluster.lesions.detector import Detector
from ma_cluster.lesions.findings import image_score
from ma_cluster.refinement.dense import DensePrn, refine_dense
from ma_cluster.refinement.resnet import build_prn


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """Untrained, with thresholds at the middle so that something is found."""
    torch.manual_seed(0)
    recipe = tiny()
    detector = dataclasses.replace(recipe.detector, roi_threshold_1x=0.5, roi_threshold_half=0.5)
    recipe = dataclasses.replace(recipe, detector=detector)
    networks = {
        "hgn_1x": build_hgn(recipe.hgn_1x),
        "hgn_half": build_hgn(recipe.hgn_half),
        "prn": build_prn(recipe.prn),
    }
    return Bundle(recipe, {name: network.state_dict() for name, network in networks.items()}, "untrained")


@pytest.fixture(scope="module")
def photograph():
    return retina()


def test_a_detection_lies_on_the_grid_of_the_photograph(bundle, photograph):
    detection = Detector(bundle).detect(photograph)
    assert detection.shape == photograph.shape[:2]
    assert detection.mask.sum() == sum(lesion.area_px for lesion in detection.lesions)
    assert set(detection.seconds) == {"prepare", "hgn", "prn", "lesions"}
    assert all(value > 0 for value in detection.seconds.values())


def test_the_same_photograph_gives_the_same_answer_again(bundle, photograph):
    detector = Detector(bundle)
    first, second = detector.detect(photograph), detector.detect(photograph)
    assert first.lesions == second.lesions
    assert (first.mask == second.mask).all()


@pytest.mark.parametrize("dense", [False, True], ids=["patchwise", "dense"])
def test_the_number_of_threads_changes_no_pixel_of_any_map(bundle, photograph, dense):
    """All of the photograph is region of interest; tiles are small enough to be many."""
    detector = dataclasses.replace(
        bundle.recipe.detector,
        tile_px=256,
        halo_px=32,
        prn_dense=dense,
        prn_stride_px=8,
        roi_threshold_1x=0.0,
        roi_threshold_half=0.0,
    )
    bundle = dataclasses.replace(bundle, recipe=dataclasses.replace(bundle.recipe, detector=detector))
    prepared = Detector(bundle).prepare(photograph)
    one, three = (Detector(bundle, threads=threads).maps(prepared).stack() for threads in (1, 3))
    assert all((ours == others).all() for ours, others in zip(one, three, strict=True))


def test_a_saved_bundle_answers_as_the_one_in_memory(bundle, photograph, tmp_path: Path):
    digest = save_bundle(bundle, tmp_path / "model")
    detector = Detector.load(tmp_path / "model")
    assert detector.digest == digest == load_bundle(tmp_path / "model").digest
    assert detector.detect(photograph).lesions == Detector(bundle).detect(photograph).lesions


def test_detection_leaves_the_ablation_unread_and_evaluation_has_it():
    bundle = load_bundle("lite")
    assert Detector(bundle).refiners == ("prn", "cls")
    assert Detector.load("lite").refiners == ("prn",)


def test_nothing_is_found_outside_the_field_of_view(bundle, photograph):
    detector = Detector(bundle)
    prepared = detector.prepare(photograph)
    for probability in detector.maps(prepared).stack():
        assert (probability[~prepared.fov_1x] == 0).all()
        assert 0 <= probability.min() <= probability.max() <= 1


def test_refinement_answers_only_within_its_regions_of_interest(bundle, photograph):
    maps = Detector(bundle).maps(Detector(bundle).prepare(photograph))
    assert maps.prn_1x is not None
    assert maps.prn_half is not None
    assert (maps.prn_1x[maps.hgn_1x <= 0.5] == 0).all()
    assert (maps.prn_half[maps.hgn_half <= 0.5] == 0).all()
    assert (maps.prn_1x[maps.hgn_1x > 0.5] > 0).any()
    assert (fuse(maps.stack(), "geometric")[maps.prn_1x == 0] == 0).all()


def test_a_bundle_without_refinement_fuses_its_two_hypotheses(bundle, photograph):
    weights = {name: values for name, values in bundle.weights.items() if name != "prn"}
    detection = Detector(dataclasses.replace(bundle, weights=weights)).detect(photograph)
    assert "prn" not in detection.seconds


def test_what_is_no_retina_is_refused_with_a_reason(bundle):
    with pytest.raises(ImageRefusedError) as refusal:
        Detector(bundle).detect(np.full((600, 600, 3), 200, np.uint8))
    assert refusal.value.reason is Reason.NO_FOV


@pytest.mark.parametrize("dense", [False, True], ids=["patchwise", "dense"])
@pytest.mark.parametrize(("network", "last"), [("hgn_1x", "head"), ("hgn_half", "head"), ("prn", "classify")])
def test_values_that_are_no_numbers_are_a_failure_and_no_healthy_eye(bundle, photograph, network, last, dense):
    """The weights are finite; what they give is more than a float can hold, as it happens sooner in half precision."""
    weights = {key: value * 1e38 if key.startswith(last) else value for key, value in bundle.weights[network].items()}
    detector = dataclasses.replace(bundle.recipe.detector, prn_dense=dense, prn_stride_px=16)
    recipe = dataclasses.replace(bundle.recipe, detector=detector)
    wild = Detector(dataclasses.replace(bundle, recipe=recipe, weights=bundle.weights | {network: weights}))
    with pytest.raises(ImageFailedError, match=f"network {network} gave values") as failure:
        wild.detect(photograph)
    assert failure.value.reason is Reason.NOT_FINITE


@pytest.mark.parametrize("scale", ["1x", "0.5x"])
def test_refinement_in_shared_computation_is_what_the_configuration_says(bundle, photograph, scale):
    recipe = dataclasses.replace(
        bundle.recipe,
        prn=dataclasses.replace(bundle.recipe.prn, scale=scale),
        detector=dataclasses.replace(bundle.recipe.detector, prn_dense=True, prn_stride_px=16),
    )
    detector = Detector(dataclasses.replace(bundle, recipe=recipe))
    prepared = detector.prepare(photograph)
    one = np.zeros(prepared.fov_1x.shape, np.float32)
    one[200:300, 220:320] = 1
    maps = detector.refinements(prepared, Maps(one, np.zeros_like(one), None, None))
    prn = build_prn(recipe.prn)
    prn.load_state_dict(bundle.weights["prn"])
    dense = DensePrn(prn, recipe.prn.patch_px, 16)
    if scale == "1x":
        expected = refine_dense(dense, prepared.enhanced_1x, one > 0)
    else:
        expected = upsample_half(refine_dense(dense, prepared.enhanced_half, one[::2, ::2] > 0), one.shape) * one
    assert maps.prn_1x is not None
    np.testing.assert_allclose(maps.prn_1x, expected, atol=1e-5)
    assert (expected[one > 0] > 0).all()
    assert not maps.prn_half.any()


def resized(photograph, side):
    return cv2.resize(photograph, (side, side), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize(
    ("prn_scale", "joined", "side"),
    [
        ("0.5x", {"fusion": "arithmetic", "prn_dense": False}, 1411),
        ("0.5x", {"fusion": "geometric", "prn_dense": False}, 400),
        ("1x", {"fusion": "geometric", "prn_dense": True}, 1411),
        ("1x", {"fusion": "arithmetic", "prn_dense": True}, 400),
    ],
)
def test_looking_only_where_it_matters_changes_no_lesion(bundle, photograph, prn_scale, joined, side):
    joined = {**joined, "prn_stride_px": 8, "roi_threshold_1x": 0.51, "min_area_px": 2, "tile_px": 640, "halo_px": 192}
    prn = dataclasses.replace(bundle.recipe.prn, scale=prn_scale)
    detector = dataclasses.replace(bundle.recipe.detector, **joined)
    bundle = dataclasses.replace(bundle, recipe=dataclasses.replace(bundle.recipe, prn=prn, detector=detector))
    everywhere = Detector(bundle)
    prepared = everywhere.prepare(cv2.resize(photograph, (side, side), interpolation=cv2.INTER_AREA))
    maps = everywhere.maps(prepared)
    threshold = float(np.quantile(fuse(maps.stack(), detector.fusion), 0.98))
    detector = dataclasses.replace(detector, threshold=threshold)
    early = Detector(dataclasses.replace(bundle, recipe=dataclasses.replace(bundle.recipe, detector=detector)))
    expected, found = early.decide(prepared, maps), early.segment(prepared)
    assert expected.mask.any()
    assert (found.mask == expected.mask).all()
    assert len(found.lesions) == len(expected.lesions)
    for one, other in zip(found.lesions, expected.lesions, strict=True):
        assert one.score_mean == pytest.approx(other.score_mean, abs=1e-5)


def test_a_1x_network_without_weight_is_not_run(bundle, photograph):
    detector = dataclasses.replace(bundle.recipe.detector, weight_1x=0.0)
    recipe = dataclasses.replace(
        bundle.recipe, detector=detector, prn=dataclasses.replace(bundle.recipe.prn, scale="1x")
    )
    alone = Detector(dataclasses.replace(bundle, recipe=recipe))
    prepared = alone.prepare(photograph)
    expected = alone.decide(prepared, alone.maps(prepared))
    alone._hypotheses["hgn_1x"].register_forward_pre_hook(lambda *_: pytest.fail("it was run"))
    found = alone.segment(prepared)
    assert expected.mask.any() and (found.mask == expected.mask).all()


def test_the_sensitive_point_calls_what_the_default_one_only_outlines(bundle, photograph):
    detector = dataclasses.replace(bundle.recipe.detector, least_score=0.95)
    sure = dataclasses.replace(bundle, recipe=dataclasses.replace(bundle.recipe, detector=detector))
    prepared = Detector(sure).prepare(photograph)
    default, sensitive = (Detector(sure).segment(prepared, point) for point in ("default", "sensitive"))
    assert 0 <= len(default.lesions) < len(sensitive.lesions)
    assert (sensitive.mask | default.mask == sensitive.mask).all()
    assert all(lesion.score_max >= 0.95 for lesion in default.lesions)


def test_a_network_of_more_kinds_calls_the_same_and_grades_the_photograph(bundle, photograph):
    """Its other outputs change no lesion; the score is the grading's, on the maps at 0.5x."""
    more = of_kinds(bundle.weights["hgn_half"], 4)
    more["head.weight"][2:] = torch.randn(3, *more["head.weight"].shape[1:], generator=torch.manual_seed(0)) * 0.1
    grading = GradingConfig(features=("MA_mean", "EX_largest"), mean=(0.0, 0.0), scale=(1.0, 1.0), weights=(0.5, 0.25))
    graded = dataclasses.replace(
        bundle,
        recipe=dataclasses.replace(bundle.recipe, grading=dataclasses.replace(grading, refer_at=1.0)),
        weights=bundle.weights | {"hgn_half": more},
    )
    plain, detector = Detector(bundle).detect(photograph), Detector(graded)
    prepared = detector.prepare(photograph)
    found, features = detector.segment(prepared), detector.features(prepared)
    assert (found.mask == plain.mask).all() and found.lesions == plain.lesions != ()
    assert len(features) == 12
    assert found.image_score == image_score(features, grading) == detector.hypotheses(prepared).image_score
    unseen = "none" if prepared.quality.gradable else "ungradable"
    assert (plain.image_score, plain.triage, found.triage) == (None, "refer", unseen)
    assert Detector(bundle).segment(prepared).findings == plain.findings


def test_the_network_at_1x_looks_only_where_lesions_may_be():
    """With the model that ships, on a grid of a quarter of its pixels; halos as wide as the networks see."""
    bundle = load_bundle("lite")
    recipe = dataclasses.replace(
        bundle.recipe,
        image=dataclasses.replace(bundle.recipe.image, fov_diameter_px=1705.0),
        detector=dataclasses.replace(
            bundle.recipe.detector,
            fusion="arithmetic",
            weight_1x=1.0,
            weight_prn=1.0,
            threshold=0.6,
            least_score=0.0,
            halo_px=192,
            min_area_px=1,
        ),
    )
    detector = Detector(dataclasses.replace(bundle, recipe=recipe))
    prepared = detector.prepare(enlarged_sample(1411)[0])
    seen: list[int] = []
    network = detector._hypotheses["hgn_1x"]
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, 0].numel()))
    expected = detector.decide(prepared, detector.maps(prepared))
    everywhere = sum(seen)
    seen.clear()
    found = detector.segment(prepared)
    assert 0 < sum(seen) < 0.7 * everywhere
    assert len(expected.lesions) > 0
    assert (found.mask == expected.mask).all()
    assert [lesion.bbox for lesion in found.lesions] == [lesion.bbox for lesion in expected.lesions]
