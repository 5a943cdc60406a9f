"""What is chosen on validation photographs, on two photographs with drawn lesions and untrained networks."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from untrained import calibrated_frrn

from ma_cluster.bundle import Bundle
from ma_cluster.config import GradingConfig, tiny
from ma_cluster.errors import UsageError
from ma_cluster.evaluation.calibration import calibrate, fit_grading, fitted, least_score
from ma_cluster.evaluation.calibration import calibrated as calibrated_grading
from ma_cluster.evaluation.scoring import PixelCounts, average_precision
from ma_cluster.evaluation.tally import ROWS
from ma_cluster.images.datasets import Graded, Sample, decode_mask, read_dataset, read_object
from ma_cluster.images.sample import write_sample
from ma_cluster.lesions.detector import Detector
from ma_cluster.lesions.findings import image_score
from ma_cluster.refinement.resnet import build_prn
from ma_cluster.training.checkpoints import with_judge


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("data")
    write_sample(str(folder), images=2)
    return read_dataset(str(folder), tiny().split)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    torch.manual_seed(0)
    recipe = tiny()
    networks = {
        "hgn_1x": calibrated_frrn(recipe.hgn_1x.width, seed=1),
        "hgn_half": calibrated_frrn(recipe.hgn_half.width, seed=2),
        "prn": build_prn(recipe.prn),
    }
    for name in ("hgn_1x", "hgn_half"):
        networks[name].head.weight.data *= 0.1  # untrained, they would say 0 or 1 everywhere
    return Bundle(recipe, {name: network.state_dict() for name, network in networks.items()}, "untrained")


@pytest.fixture(scope="module")
def calibrated(bundle: Bundle, samples: list[Sample]) -> Bundle:
    detector = dataclasses.replace(bundle.recipe.detector, roi_recall=0.5)
    return calibrate(dataclasses.replace(bundle, recipe=dataclasses.replace(bundle.recipe, detector=detector)), samples)


def test_each_region_of_interest_keeps_the_lesion_pixels_it_must(calibrated: Bundle, samples: list[Sample]) -> None:
    detector = Detector(calibrated)
    kept = {"hgn_1x": 0, "hgn_half": 0}
    lesion_pixels = 0
    for sample in samples:
        assert sample.mask is not None
        prepared = detector.prepare(read_object(sample.image))
        truth = decode_mask(read_object(sample.mask))
        maps = detector.maps(prepared)
        lesion_pixels += truth.sum()
        config = calibrated.recipe.detector
        for name, threshold in (("hgn_1x", config.roi_threshold_1x), ("hgn_half", config.roi_threshold_half)):
            own = prepared.grid.uncrop(ROWS[name](maps), prepared.shape)
            kept[name] += ((own >= threshold) & truth).sum()
    assert [count / lesion_pixels for count in kept.values()] == pytest.approx([0.5, 0.5], abs=0.01)


def test_the_figures_of_a_row_are_those_of_its_maps(calibrated: Bundle, samples: list[Sample]) -> None:
    detector = Detector(calibrated)
    total = None
    for sample in samples:
        assert sample.mask is not None
        prepared = detector.prepare(read_object(sample.image))
        own = prepared.grid.uncrop(ROWS["prn_geometric"](detector.maps(prepared)), prepared.shape)
        counts = PixelCounts.of(np.clip(own, 0, 1), decode_mask(read_object(sample.mask)))
        total = counts if total is None else total + counts
    assert total is not None
    row = calibrated.validation["rows"]["prn_geometric"]
    assert row["average_precision"] == pytest.approx(average_precision(total), abs=1e-4)


def test_no_other_odds_of_the_refinement_would_do_better(calibrated: Bundle, samples: list[Sample]) -> None:
    def best_of(odds: float) -> float:
        detector = dataclasses.replace(calibrated.recipe.detector, prn_odds=odds)
        changed = Detector(
            dataclasses.replace(calibrated, recipe=dataclasses.replace(calibrated.recipe, detector=detector))
        )
        totals: dict[str, PixelCounts] = {}
        for sample in samples:
            prepared = changed.prepare(read_object(sample.image))
            maps, truth = changed.maps(prepared), decode_mask(read_object(str(sample.mask)))
            for row in ("prn_geometric", "prn_arithmetic"):
                own = prepared.grid.uncrop(ROWS[row](maps), prepared.shape)
                counts = PixelCounts.of(np.clip(own, 0, 1), truth)
                totals[row] = totals[row] + counts if row in totals else counts
        return max(average_precision(counts) for counts in totals.values())

    chosen = calibrated.recipe.detector.prn_odds
    assert best_of(chosen) >= max(best_of(odds) for odds in (1.0, 4.0, 16.0)) - 1e-6


def test_the_best_fusion_and_its_best_threshold_are_kept(calibrated: Bundle) -> None:
    own, rows = calibrated.validation["detector"], calibrated.validation["rows"]
    others = [rows[f"prn_{how}"]["average_precision"] for how in ("geometric", "arithmetic")]
    assert own["average_precision"] >= max(others)
    assert calibrated.recipe.detector.threshold == pytest.approx(max(1e-3, own["threshold"]), abs=1e-4)


def test_healthy_photographs_set_the_score_that_a_lesion_must_reach(bundle: Bundle, samples: list[Sample]) -> None:
    healthy = [dataclasses.replace(sample, mask=None, label="healthy") for sample in samples]
    calibrated = calibrate(bundle, [samples[0], *healthy])
    detector = Detector(calibrated)
    calls = [len(detector.detect(read_object(sample.image)).lesions) for sample in healthy]
    assert sum(calls) / len(calls) <= calibrated.recipe.detector.healthy_calls
    assert calibrated.validation["healthy"]["mean_calls"] == sum(calls) / len(calls)
    assert calibrated.validation["photographs"] == [samples[0].name]


@pytest.mark.parametrize(
    ("calls", "allowed", "above"),
    [([[0.9, 0.5], [0.7], []], 0.34, 0.7), ([[0.9], [0.3]], 0.0, 0.9), ([[0.9], [0.3]], 1.0, 0.0), ([[]], 0.0, 0.0)],
)
def test_the_least_score_lies_just_above_the_first_call_too_many(
    calls: list[list[float]], allowed: float, above: float
) -> None:
    least = least_score([[float(np.float32(score)) for score in of_one] for of_one in calls], allowed)
    assert least == 0 if above == 0 else above < least < above + 1e-6


def graded(count: int, seed: int, shift: float = 0.0) -> list[tuple[dict[str, float], int]]:
    """Photographs of grades 0 to 2 whose first feature rises with the grade, and whose second says nothing."""
    rng = np.random.default_rng(seed)
    grades = rng.integers(0, 3, count).tolist()
    return [({"signs": 10 * rng.normal(grade + shift), "noise": rng.normal()}, grade) for grade in grades]


def test_the_image_score_is_the_regression_that_scikit_learn_fits() -> None:
    photographs = graded(200, seed=0)
    config = fitted(photographs, GradingConfig())
    features = np.array([[each["signs"], each["noise"]] for each, _ in photographs])
    standard = (features - features.mean(axis=0)) / features.std(axis=0)
    truth = [grade > 0 for _, grade in photographs]
    theirs = LogisticRegression(C=1.0, tol=1e-9).fit(standard, truth)
    assert config.features == ("signs", "noise")
    assert config.weights == pytest.approx(theirs.coef_[0], abs=1e-4)
    assert config.bias == pytest.approx(theirs.intercept_[0], abs=1e-4)


def test_unseen_photographs_set_slope_bias_and_the_point_that_refers() -> None:
    """All of them have fewer signs than those that trained, so that their scores would be too low."""
    unseen = graded(400, seed=2, shift=-1.0)
    before = fitted(graded(200, seed=1), GradingConfig())
    config = calibrated_grading(before, unseen)
    scores = np.array([image_score(features, config) for features, _ in unseen])
    grade = np.array([each for _, each in unseen])
    assert scores.mean() == pytest.approx((grade > 0).mean(), abs=0.01)
    old = [image_score(features, before) for features, _ in unseen]
    assert (np.argsort(scores) == np.argsort(old)).all()
    called = scores >= config.refer_at
    assert called[grade == 2].mean() >= 0.95 > called[grade == 2].mean() - 1 / (grade == 2).sum()
    assert (calibrated_grading(before, unseen[::-1])).refer_at == pytest.approx(config.refer_at)


def test_a_feature_that_is_always_the_same_and_perfect_ones_stay_finite() -> None:
    photographs = [({"flat": 3.0, "signs": float(grade)}, grade) for grade in (0, 0, 1, 2, 2)]
    config = calibrated_grading(fitted(photographs, GradingConfig()), photographs)
    assert np.isfinite([*config.weights, config.bias]).all() and config.weights[0] == pytest.approx(0, abs=1e-9)
    assert image_score({"flat": 3.0, "signs": 1.0}, config) < config.refer_at < image_score(photographs[-1][0], config)


def test_a_bundle_gets_a_grading_of_graded_photographs(bundle: Bundle, samples: list[Sample]) -> None:
    parts = [(part, grade) for part in ("training", "validation") for grade in (0, 2)]
    eyes = [
        Graded(f"{part} {grade}", samples[grade // 2].image, grade, part, part, {})  # type: ignore[arg-type]
        for part, grade in parts
    ]
    with_grading = fit_grading(bundle, eyes)
    grading = with_grading.recipe.grading
    assert len(grading.features) == len(grading.weights) == 3  # of one kind of lesion
    figures = with_grading.validation["grading"]
    assert (figures["training"], figures["validation"], figures["sensitivity"]) == (2, 2, 1)
    detection = Detector(with_grading).detect(read_object(samples[1].image))
    assert detection.image_score is not None and detection.image_score >= grading.refer_at
    with pytest.raises(UsageError, match="the grades need validation photographs"):
        fit_grading(bundle, eyes[:2])


@pytest.mark.parametrize("use", [calibrate, with_judge])
def test_a_mask_that_is_not_on_its_photograph_is_named_by_the_number_of_that(
    bundle: Bundle, samples: list[Sample], tmp_path: Path, use: Callable[[Bundle, list[Sample]], Bundle]
) -> None:
    Image.new("1", (90, 100), 1).save(tmp_path / "mask.png")
    misplaced = dataclasses.replace(samples[1], mask=str(tmp_path / "mask.png"))
    with pytest.raises(UsageError, match=r"photograph 1 of 2 .* mask is of 90 x 100 pixels"):
        use(bundle, [misplaced, samples[0]])


def test_masks_that_outline_nothing_are_refused(bundle: Bundle, samples: list[Sample], tmp_path: Path) -> None:
    """By them a detector would call everything."""
    with Image.open(samples[0].image) as photograph:
        Image.new("1", photograph.size).save(tmp_path / "mask.png")
    with pytest.raises(UsageError, match="the masks of the validation photographs outline nothing"):
        calibrate(bundle, [dataclasses.replace(samples[0], mask=str(tmp_path / "mask.png"))])


def test_the_photographs_are_named_and_the_weights_stay(
    calibrated: Bundle, bundle: Bundle, samples: list[Sample]
) -> None:
    assert calibrated.validation["photographs"] == [sample.name for sample in samples]
    assert calibrated.weights is bundle.weights


def test_without_refinement_the_hypotheses_alone_are_joined(bundle: Bundle, samples: list[Sample]) -> None:
    weights = {name: values for name, values in bundle.weights.items() if name != "prn"}
    calibrated = calibrate(dataclasses.replace(bundle, weights=weights), samples[:1])
    assert set(calibrated.validation["rows"]) == {"hgn_1x", "hgn_half", "hgn_geometric", "hgn_arithmetic"}
