"""Benchmarks on an untrained model over a small photograph: each ends with figures that can be."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import bench_networks
import pytest
import torch
from photographs import encode
from typer.testing import CliRunner

from ma_cluster.bundle import Bundle, load_bundle, save_bundle
from ma_cluster.cli.app import app
from ma_cluster.images.sample import retina
from ma_cluster.refinement.resnet import build_prn
from ma_cluster.report.bench import SAMPLE_SIDE_PX, Subject


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photograph") / "eye.png"
    path.write_bytes(encode(retina()[::3, ::3].copy(), "PNG"))
    return path


@pytest.fixture(scope="module")
def model(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a refinement, whose regions are what the untrained networks call likely."""
    torch.manual_seed(0)
    bundle = load_bundle(tiny_bundle)
    detector = dataclasses.replace(bundle.recipe.detector, roi_threshold_1x=0.6, roi_threshold_half=0.6)
    recipe = dataclasses.replace(bundle.recipe, detector=detector)
    weights = bundle.weights | {"prn": build_prn(recipe.prn).state_dict()}
    folder = tmp_path_factory.mktemp("model")
    save_bundle(Bundle(recipe=recipe, weights=weights, attribution="untrained"), folder)
    return folder


def report_of(names: list[str], model: Path, photograph: Path, out: Path) -> dict:  # type: ignore[type-arg]
    options = ["--model", str(model), "--image", str(photograph), "--out", str(out)]
    done = CliRunner().invoke(app, ["bench", *names, *options], catch_exceptions=False)
    assert done.exit_code == 0
    assert all(line.split()[0] in names for line in done.output.splitlines())
    return json.loads(out.read_text())


def test_detections_are_timed_stage_by_stage_and_the_machine_is_described(
    model: Path, photograph: Path, tmp_path: Path
) -> None:
    report = report_of(["detect"], model, photograph, tmp_path / "new" / "bench.json")
    rows = report["results"]["detect"]
    assert [row["flips_half"] for row in rows] == [1, 2, 4]
    assert [row["of_the_model"] for row in rows] == [True, False, False]
    for row in rows:
        assert set(row["seconds"]) == {"prepare", "hgn", "prn", "lesions"}
        assert row["total_seconds"] == pytest.approx(sum(row["seconds"].values()), abs=0.03)
        assert 50 < row["peak_mb"] < 4000
    assert report["machine"]["cores"] >= 1 and report["machine"]["versions"]["torch"] == torch.__version__
    assert report["settings"]["image"] == "eye.png"


@pytest.mark.slow
def test_monai_is_timed_in_the_same_run(model: Path, photograph: Path, tmp_path: Path) -> None:
    result = report_of(["monai"], model, photograph, tmp_path / "bench.json")["results"]["monai"]
    if importlib.util.find_spec("monai") is None:
        assert result == "skipped: MONAI is not installed: pip install 'ma_cluster[bench]'"
    else:
        (row,) = result
        assert row["speed_up"] > 0 and row["difference_at_1x"]["median"] < 1e-2


@pytest.mark.long
def test_a_run_is_timed_beside_a_bare_loop(
    model: Path, photograph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    bare, run, ratio = report_of(["score"], model, photograph, tmp_path / "bench.json")["results"]["score"]
    assert run["photographs_per_second"] > run["with_start"] > 0
    assert ratio["ratio"] == pytest.approx(run["photographs_per_second"] / bare["photographs_per_second"])


def test_the_sample_photograph_has_twelve_megapixels_and_known_lesions() -> None:
    photograph = Subject().photograph()
    assert photograph.truth is not None
    assert photograph.truth.shape == (SAMPLE_SIDE_PX, SAMPLE_SIDE_PX) and photograph.truth.any()
    assert photograph.data[:2] == b"\xff\xd8"


def test_an_unknown_benchmark_is_named_with_those_there_are(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "speed", "--out", str(tmp_path / "bench.json")])
    assert "no benchmark speed; there are detect, monai" in str(done.exception)
    assert not (tmp_path / "bench.json").exists()


def test_growth_is_followed_from_the_smallest_photograph_on(model: Path, photograph: Path) -> None:
    rows = list(bench_networks.growth(Subject(model=str(model), image=photograph)))
    sizes = [row["fov_megapixels"] for row in rows]
    assert sizes == sorted(sizes)
    # the model's own diameter is the smallest allowed
    assert len(sizes) == sum(factor >= 1 for factor in bench_networks.GROWTH)
    assert all(row["hgn_seconds_per_fov_megapixel"] > 0 for row in rows)


def test_the_bare_loop_takes_the_tiles_of_the_detector(model: Path, photograph: Path) -> None:
    (row,) = bench_networks.engine(Subject(model=str(model), image=photograph))
    assert row["megapixels"] >= 0.05  # a field of view of 256 pixels, and a quarter of it
    assert row["tiles"] >= 2 and 0 < row["efficiency"] < 10


def test_tiles_come_nearer_to_the_whole_photograph_as_their_halo_grows(model: Path, photograph: Path) -> None:
    rows = list(bench_networks.halo(Subject(model=str(model), image=photograph)))
    assert [row["halo_px"] for row in rows] == list(bench_networks.HALOS_PX)
    assert rows[-1]["mean_difference"] <= rows[0]["mean_difference"] < 0.5
    assert all(row["computed_over_fov_at_1x"] >= 1 for row in rows)


@pytest.mark.slow
def test_shared_computation_is_timed_beside_patches_of_the_model_and_of_the_paper(
    model: Path, photograph: Path, tmp_path: Path
) -> None:
    script, out = bench_networks.__file__, tmp_path / "bench.json"
    options = ["--model", str(model), "--image", str(photograph), "--out", str(out)]
    subprocess.run([sys.executable, script, "dense", *options], check=True)
    rows = json.loads(out.read_text())["results"]["dense"]
    settings = [(row["patch_px"], row["stride_px"]) for row in rows]
    assert settings == [(32, 1), (32, 1), (32, 4), (32, 4), (128, 1), (128, 1), (128, 4), (128, 4)]
    assert all(row["speed_up"] > 0 and 0 <= row["mean_difference"] <= 1 for row in rows)
