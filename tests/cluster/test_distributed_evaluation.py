"""An evaluation from the command line to its files, on real Ray: an archive of known truth, untrained networks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from untrained import calibrated_frrn

from ma_cluster.bundle import Bundle, load_bundle, save_bundle
from ma_cluster.cli import main
from ma_cluster.cluster.distributed_evaluation import EvaluationRequest, chosen_rows, evaluate
from ma_cluster.config import GradingConfig, ImageConfig, tiny
from ma_cluster.errors import UsageError
from ma_cluster.evaluation.examples import Kind
from ma_cluster.evaluation.tally import DETECT, ROWS, Tally, evaluate_photograph, row_map
from ma_cluster.images.datasets import IMAGES_FOLDER, TEST_PART, decode_mask, read_dataset, read_object
from ma_cluster.images.sample import write_sample
from ma_cluster.lesions.detector import Detector
from ma_cluster.refinement.resnet import build_prn
from ma_cluster.report.evaluation_report import table
from ma_cluster.report.model_card import write_card

FIGURES = {"auc_pr_33", "average_precision", "ci_low", "ci_high", "f1", "precision", "recall", "threshold", "froc"}


def untrained(*refiners: str) -> Bundle:
    """A bundle that says something different everywhere: scores near the middle, regions of interest of some size."""
    torch.manual_seed(0)
    recipe = replace(tiny(), image=ImageConfig(fov_diameter_px=256.0))
    recipe = replace(recipe, detector=replace(recipe.detector, roi_threshold_1x=0.6, roi_threshold_half=0.6))
    networks: dict[str, torch.nn.Module] = {}
    for seed, name in enumerate(("hgn_1x", "hgn_half"), 1):
        networks[name] = calibrated_frrn(recipe.hgn_1x.width, seed)
        networks[name].head.weight.data *= 0.1  # untrained, they would say 0 or 1 everywhere
    networks |= {name: build_prn(recipe.prn) for name in refiners}
    validation = {"rows": {"hgn_1x": {"threshold": 0.55}}}
    return Bundle(recipe, {name: network.state_dict() for name, network in networks.items()}, "untrained", validation)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_bundle(untrained("prn", "cls"), folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photographs in a test part alone, reduced; the last is healthy."""
    folder = tmp_path_factory.mktemp("data")
    write_sample(str(folder), images=6)
    for path in folder.rglob("*.jpg"):
        with Image.open(path) as image:
            small = image.resize((320, 320))
        small.save(path, quality=95)
    for path in folder.rglob("*.tif"):
        with Image.open(path) as image:
            coverage = np.asarray(image.convert("L").resize((320, 320), Image.Resampling.BOX))
        Image.fromarray(coverage > 0).save(path)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, data: Path, model: Path, local_ray: None) -> Path:
    out = tmp_path_factory.mktemp("results")
    healthy = tmp_path_factory.mktemp("healthy")
    shutil.copy(data / IMAGES_FOLDER / TEST_PART / "sample_006.jpg", healthy / "another.jpg")
    assert run("--data", data, "--model", model, "--split", "test", "--out", out, "--healthy", healthy) == 0
    return out


@pytest.fixture(scope="module")
def values(results: Path) -> dict[str, Any]:
    return json.loads((results / "table.json").read_text())


def run(*arguments: object) -> object:
    with pytest.raises(SystemExit) as left:
        main(["evaluate", *map(str, arguments)])
    return left.value.code


def test_every_file_is_there_and_opens(results: Path) -> None:
    names = {path.relative_to(results).as_posix() for path in results.rglob("*") if path.is_file()}
    sheets = {f"examples/{kind.value}.jpg" for kind in Kind}
    assert names == {"table.json", "table.md", "photographs.parquet", "pr.png", "froc.png"} | sheets
    for name in {"pr.png", "froc.png"} | sheets:
        with Image.open(results / name) as picture:
            picture.load()
            assert min(picture.size) > 150
            assert len(picture.convert("RGB").getcolors(2**24)) > 20


def test_the_table_keeps_its_contract(values: dict[str, Any], model: Path) -> None:
    assert list(values["rows"]) == list(ROWS)
    for row in (*values["rows"].values(), values["detect"]):
        assert row.keys() >= FIGURES
        assert row["ci_low"] <= row["average_precision"] <= row["ci_high"]
        assert row["froc"].keys() == {"0.125", "0.25", "0.5", "1", "2", "4", "8", "mean"}
        assert row["best"]["f1"] >= max(row["f1"], row["at_half"]["f1"])
        assert row["at_half"]["threshold"] == 0.5
    assert (values["images"], values["split"], values["left_out"]) == (6, "test", {})
    assert values["bundle"] == load_bundle(model).digest
    assert values["healthy"]["images"] == 2  # the data set's own, and the folder's
    assert values.keys() >= {"lesions", "data", "date", "versions", "conventions", "differences", "bootstrap"}


def test_thresholds_are_validations_where_it_has_one(values: dict[str, Any]) -> None:
    sources = {name: row["threshold_from"] for name, row in values["rows"].items()}
    assert sources.pop("hgn_1x") == "the bundle's validation"
    assert values["rows"]["hgn_1x"]["threshold"] == 0.55
    assert set(sources.values()) == {"these photographs"}
    assert values["rows"]["hgn_half"]["f1"] == values["rows"]["hgn_half"]["best"]["f1"]


def test_every_claim_of_the_paper_gets_a_plain_word(values: dict[str, Any]) -> None:
    rows = values["rows"]
    assert len(values["differences"]) == 8
    for each in values["differences"]:
        better, than = (rows[each[side]]["average_precision"] for side in ("better", "than"))
        assert each["difference"] == pytest.approx(better - than, abs=1.1e-4)
        word = "holds" if each["ci_low"] > 0 else "does not" if each["ci_high"] < 0 else "cannot be told"
        assert each["claim"] == word
        assert 0 <= each["share_above_zero"] <= 1


def test_table_md_shows_the_papers_figures_beside(results: Path, values: dict[str, Any]) -> None:
    lines = (results / "table.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith("| prn_geometric |")]
    assert f"{values['rows']['prn_geometric']['average_precision']:.3f}" in row
    assert "0.420" in row


def test_a_rows_figure_is_scikit_learns_over_all_pixels(values: dict[str, Any], data: Path, model: Path) -> None:
    detector = Detector(load_bundle(model))
    scores, truths = [], []
    for sample in read_dataset(str(data), detector.recipe.split):
        prepared = detector.prepare(read_object(sample.image))
        hypotheses = detector.hypotheses(prepared)
        maps = {"hgn": hypotheses, "cls": detector.refinements(prepared, hypotheses, "cls")}
        scores.append(np.stack([row_map(row, maps, prepared) for row in ("hgn_arithmetic", "cls_arithmetic")]))
        truth = np.zeros(prepared.shape, bool) if sample.mask is None else decode_mask(read_object(sample.mask))
        truths.append(truth.ravel())
    for number, row in enumerate(("hgn_arithmetic", "cls_arithmetic")):
        expected = average_precision_score(np.concatenate(truths), np.concatenate([s[number].ravel() for s in scores]))
        assert values["rows"][row]["average_precision"] == pytest.approx(expected, abs=1e-4)


def test_two_halves_add_up_to_the_whole_in_any_order(data: Path, model: Path, values: dict[str, Any]) -> None:
    bundle = load_bundle(model)
    detector = Detector(bundle)
    samples = read_dataset(str(data), bundle.recipe.split)
    rows = [*ROWS, DETECT]
    each = [evaluate_photograph(detector, sample, number, rows) for number, sample in enumerate(samples, 1)]
    first, second = sum(each[:3], Tally()), sum(each[3:], Tally())
    ours, theirs = (table(tally, bundle, "test") for tally in (first + second, second + first))
    for name in ("rows", "detect", "called", "differences", "data", "images", "lesions"):
        assert ours[name] == theirs[name] == values[name]
    shown = [[(e.kind, e.photograph, e.score) for e in tally.examples] for tally in (first + second, second + first)]
    assert shown[0] == shown[1]


def test_examples_are_sorted_by_how_wrong_they_are(data: Path, model: Path) -> None:
    bundle = load_bundle(model)
    sample = read_dataset(str(data), bundle.recipe.split)[0]
    tally = evaluate_photograph(Detector(bundle), sample, 1, ["hgn_1x"])
    scores = {kind: [example.score for example in tally.examples if example.kind is kind] for kind in Kind}
    assert scores[Kind.FALSE_POSITIVE] == sorted(scores[Kind.FALSE_POSITIVE], reverse=True) != []
    assert scores[Kind.FALSE_NEGATIVE] == sorted(scores[Kind.FALSE_NEGATIVE])
    assert all(score >= bundle.recipe.detector.threshold for score in scores[Kind.FALSE_POSITIVE])


def test_an_outline_of_other_lesions_of_another_size_is_refused(data: Path, model: Path, tmp_path: Path) -> None:
    Image.new("1", (90, 100), 1).save(tmp_path / "a_HE.tif")
    bundle = load_bundle(model)
    sample = replace(read_dataset(str(data), bundle.recipe.split)[0], other_masks=(f"{tmp_path}/a_HE.tif",))
    with pytest.raises(UsageError, match="mask is of 90 x 100 pixels"):
        evaluate_photograph(Detector(bundle), sample, 1, ["hgn_1x"])


def test_pooled_with_itself_an_evaluation_says_the_same_and_no_difference(
    results: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["pool", str(results), "--out", str(tmp_path), "--against", str(results)])
    assert left.value.code == 0
    pooled = json.loads((tmp_path / "table.json").read_text())
    assert (pooled["called"], pooled["healthy"], pooled["images"]) == (values["called"], values["healthy"], 6)
    for name, row in values["rows"].items():
        assert pooled["rows"][name]["average_precision"] == pytest.approx(row["average_precision"], abs=2e-3)
        assert pooled["rows"][name]["froc"] == row["froc"]
    assert len(pooled["against"]) == 2 * (len(ROWS) + 1)
    assert {(each["ci_low"], each["ci_high"], each["better"]) for each in pooled["against"]} == {
        (0, 0, "cannot be told")
    }


def test_photographs_cannot_be_pooled_twice_nor_an_older_evaluation(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = tmp_path / "older"
    older.mkdir()
    for folder, words in ((results, "more than one of the evaluations"), (older, "older version")):
        with pytest.raises(SystemExit) as left:
            main(["pool", str(results), str(folder), "--out", str(tmp_path / "out")])
        assert left.value.code == 2
        assert words in capsys.readouterr().err.replace("\n", " ")


def test_without_a_network_its_rows_are_left_out_or_refused_by_name(
    data: Path, tmp_path: Path, local_ray: None
) -> None:
    bundle = untrained()
    save_bundle(bundle, tmp_path / "model")
    usual = ("--data", data, "--model", tmp_path / "model", "--split", "test", "--out", tmp_path / "out")
    assert run(*usual, "--rows", "cls_geometric") == 2
    assert run(*usual, "--rows", "hgn_2x") == 2
    assert run(*usual) == 0
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    assert list(found["rows"]) == ["hgn_1x", "hgn_half", "hgn_geometric", "hgn_arithmetic"]
    assert found["left_out"]["cls_geometric"] == "the bundle has no cls"
    assert "| prn_geometric | the bundle has no prn |" in (tmp_path / "out" / "table.md").read_text()


def test_rows_are_chosen_by_name_in_the_papers_order() -> None:
    assert chosen_rows(untrained("prn"), ["prn_geometric", "hgn_1x"]) == ["hgn_1x", "prn_geometric"]
    with pytest.raises(UsageError, match="no network for cls_arithmetic"):
        chosen_rows(untrained("prn"), ["cls_arithmetic"])


def test_grades_are_compared_with_the_image_score(data: Path, tmp_path: Path, local_ray: None) -> None:
    """Eyes with lesions are called 2, the healthy one and one with half of them taken away 0; one is no photograph."""
    bundle = untrained()
    grading = GradingConfig(features=("MA_mean",), mean=(0.0,), scale=(1.0,), weights=(1.0,), bias=0.7, refer_at=0.5)
    bundle = replace(bundle, recipe=replace(bundle.recipe, grading=grading))
    save_bundle(bundle, tmp_path / "model")
    photographs = [f"{data}/{IMAGES_FOLDER}{TEST_PART}/sample_{number:03d}.jpg" for number in range(1, 7)]
    (tmp_path / "broken.jpg").write_text("<html>")
    rows = [f"{image},{grade},{'A|B'}" for image, grade in zip(photographs, (2, 2, 3, 1, 0, 0), strict=True)]
    (tmp_path / "grades.csv").write_text("\n".join(["image,grade,camera", *rows, "broken.jpg,0,A|B"]) + "\n")
    out = tmp_path / "out"
    usual = ("--grades", tmp_path / "grades.csv", "--out", out)
    assert run(*usual, "--model", tmp_path / "model") == 0
    assert {path.name for path in out.iterdir()} == {"images.json", "images.md"}
    values = json.loads((out / "images.json").read_text())
    assert (values["images"], values["unscored"], values["bundle"]) == (
        7,
        {"not_an_image": 1},
        load_bundle(tmp_path / "model").digest,
    )
    detector = Detector(bundle)
    scores = [detector.detect(read_object(image)).image_score for image in photographs]
    assert values["comparisons"]["none_against_any"]["area"]["value"] == pytest.approx(
        roc_auc_score([1, 1, 1, 1, 0, 0], scores), abs=1e-4
    )
    lines = (out / "images.md").read_text().splitlines()
    assert any(line.startswith("| none against any | 4 | 2 | ") for line in lines)
    assert "| A/B, none against any | 4 | 2 | " in "".join(lines)
    assert run(*usual, "--model", tmp_path / "model", "--split", "validation") == 2
    save_bundle(untrained(), tmp_path / "without")
    assert run(*usual, "--model", tmp_path / "without") == 2
    assert run("--out", out) == 2


def test_a_photograph_of_no_use_is_named_by_its_number(
    data: Path, model: Path, tmp_path: Path, local_ray: None
) -> None:
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / IMAGES_FOLDER / TEST_PART / "sample_002.jpg").write_text("<html>")
    with pytest.raises(UsageError, match=r"photograph 2 of 6 .*not_an_image") as error:
        evaluate(load_bundle(model), EvaluationRequest(data=str(tmp_path / "data"), split="test", rows=("hgn_1x",)))
    assert "sample_002" not in str(error.value)


def test_a_mask_of_another_size_is_refused(data: Path, model: Path, tmp_path: Path, local_ray: None) -> None:
    shutil.copytree(data, tmp_path / "data")
    (mask,) = (tmp_path / "data").rglob("sample_003_MA.tif")
    Image.new("L", (100, 90)).save(mask)
    with pytest.raises(UsageError, match=r"photograph 3 of 6 .* mask is of 100 x 90 pixels.* 320 x 320"):
        evaluate(load_bundle(model), EvaluationRequest(data=str(tmp_path / "data"), split="test", rows=("hgn_1x",)))


def test_a_split_without_masks_is_refused(data: Path, model: Path) -> None:
    with pytest.raises(UsageError, match="validation split has a mask"):
        evaluate(load_bundle(model), EvaluationRequest(data=str(data), split="validation"))


def test_the_card_says_what_was_measured_and_shows_pictures(results: Path, values: dict[str, Any], model: Path) -> None:
    card = write_card(model, values, results).read_text()
    assert load_bundle(model).digest in card
    for name in ("Intended use", "Limits", "Figures", "Where it fails"):
        assert f"## {name}" in card
    for kind in Kind:
        assert f"({kind.value}.jpg)" in card
        assert (model / f"{kind.value}.jpg").read_bytes() == (results / "examples" / f"{kind.value}.jpg").read_bytes()
    assert "It gives no image score" in card
    detect = values["detect"] | {"froc": values["detect"]["froc"] | {"1": 0.123, "8": 0.456}}
    apart = write_card(model, values | {"detect": detect}, results).read_text()
    assert "With one false lesion a photograph it finds 12% of the lesions, with eight 46%" in apart
    with pytest.raises(UsageError, match="another model"):
        write_card(model, values | {"bundle": "0" * 64}, None)
