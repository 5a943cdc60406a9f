"""The command line as a user meets it: files, lines, texts of errors, exit statuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dicom_files import dicom_file
from PIL import Image
from untrained import calibrated_frrn

from ma_cluster.archive.outcomes import Outcome, config_digest
from ma_cluster.archive.plan import read_shard, shards
from ma_cluster.archive.run import begin_run, commit
from ma_cluster.bundle import load_bundle, save_bundle
from ma_cluster.cli import main
from ma_cluster.config import KnownField, ScoreOptions, tiny, to_dict
from ma_cluster.errors import Reason, Triage
from ma_cluster.images.sample import retina, write_sample
from ma_cluster.images.sandbox import SandboxConfig
from ma_cluster.lesions.findings import Findings, encode_mask
from ma_cluster.networks import build_optimizer
from ma_cluster.storage.manifest import Photographs
from ma_cluster.storage.store import open_store
from ma_cluster.training.checkpoints import checkpoint_bytes
from ma_cluster.training.run import Epoch, TrainFolder

IMAGES = "A. Segmentation/1. Original Images/b. Testing Set"


@dataclass(frozen=True)
class Done:
    status: object
    out: str
    err: str


class Command:
    """Runs the command line in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *arguments: object) -> Done:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        return Done(left.value.code, *self._capfd.readouterr())


@pytest.fixture
def ma_cluster(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture
def model(tiny_bundle: Path) -> Path:
    return tiny_bundle


@pytest.fixture
def eye(tmp_path: Path) -> Path:
    path = tmp_path / "left eye.jpg"
    Image.fromarray(retina()).resize((300, 300)).save(path)
    return path


def process(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ma_cluster", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_version_and_help(ma_cluster: Command) -> None:
    assert ma_cluster("--version").out.startswith("ma-cluster 0.")
    done = ma_cluster("--help")
    assert done.status == 0
    assert all(name in done.out for name in ("detect", "score", "status", "sample", "bundle", "doctor"))


def test_detect_writes_json_mask_and_overlay(ma_cluster: Command, eye: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = ma_cluster("detect", eye, "--out", out, "--model", model)
    assert (done.status, done.err) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == [
        "left eye.json",
        "left eye_mask.png",
        "left eye_overlay.jpg",
    ]
    values = json.loads((out / "left eye.json").read_text())
    assert (values["status"], values["height"], values["width"], values["threshold"]) == ("scored", 300, 300, 0.5)
    assert values["model_digest"] == load_bundle(model).digest
    assert values["fov"]["diameter_px"] == pytest.approx(298, abs=3)
    with Image.open(out / "left eye_mask.png") as mask:
        assert (mask.mode, mask.size) == ("1", (300, 300))
        assert np.asarray(mask).sum() == sum(lesion["area_px"] for lesion in values["lesions"]) > 0
    assert f"left eye.jpg: {len(values['lesions'])} lesion" in done.out


def test_detect_reads_dicom_and_names_the_patient_by_a_pseudonym(
    ma_cluster: Command, model: Path, tmp_path: Path
) -> None:
    out, photograph = tmp_path / "out", np.asarray(Image.fromarray(retina()).resize((301, 300)))
    (tmp_path / "x.dcm").write_bytes(dicom_file(photograph, "jpeg", 7))
    done = ma_cluster("detect", tmp_path / "x.dcm", "--out", out, "--model", model)
    assert (done.status, done.err) == (0, "")
    values = json.loads((out / "x.json").read_text())
    assert (values["status"], values["height"], values["width"]) == ("scored", 300, 301)
    assert (values["eye"], values["eye_source"], values["visit"]) == ("R", "dicom", "2026-01-02")
    assert (values["fov"]["degrees"], values["operating_point"]) == (45.0, "default")
    assert values["patient"] is not None
    said = (out / "x.json").read_text() + done.out
    assert not any(word in said for word in ("patient-7", "Jane", "Camera"))
    with Image.open(out / "x_mask.png") as mask:
        assert mask.size == (301, 300)
        assert np.asarray(mask).sum() == sum(lesion["area_px"] for lesion in values["lesions"]) > 0


def test_an_operating_point_that_does_not_exist_is_wrong_usage(ma_cluster: Command, eye: Path, tmp_path: Path) -> None:
    done = ma_cluster("detect", eye, "--out", tmp_path, "--operating-point", "bold")
    assert done.status == 2 and "sensitive" in done.err


def test_detect_goes_on_after_a_refusal_and_exits_3(
    ma_cluster: Command, eye: Path, model: Path, tmp_path: Path
) -> None:
    page = tmp_path / "a_page.jpg"
    page.write_text("<html>")
    done = ma_cluster("detect", page, eye, "--out", tmp_path / "out", "--model", model)
    assert done.status == 3
    first, second = done.out.splitlines()
    assert first.startswith("a_page.jpg: refused: not_an_image: ")
    assert second.startswith("left eye.jpg: ")
    assert json.loads((tmp_path / "out/a_page.json").read_text())["reason"] == "not_an_image"


def test_detect_escapes_control_characters_of_a_name(ma_cluster: Command, model: Path, tmp_path: Path) -> None:
    page = tmp_path / "two\nlines\x1b[2J.jpg"
    page.write_text("<html>")
    assert "two\\nlines\\x1b[2J.jpg: refused" in ma_cluster("detect", page, "--out", tmp_path, "--model", model).out


def test_detect_refuses_two_photographs_of_one_stem(
    ma_cluster: Command, eye: Path, model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "Left Eye.png"
    other.write_bytes(eye.read_bytes())
    done = ma_cluster("detect", eye, other, "--out", tmp_path / "out", "--model", model)
    assert done.status == 2
    assert done.err.endswith("would both write Left Eye.json; rename one or give each its own --out\n")
    assert not (tmp_path / "out").exists()


def test_detect_refuses_two_stems_that_some_file_systems_take_for_one(ma_cluster: Command, eye: Path) -> None:
    for names in (("Eye", "eye"), ("\xe9", "e\u0301")):
        photographs = [eye.with_name(f"{name}.jpg") for name in names]
        for photograph in photographs:
            photograph.write_bytes(eye.read_bytes())
        assert ma_cluster("detect", *photographs, "--out", eye.with_name("out")).status == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
@pytest.mark.parametrize(("options", "why"), [("size=64k", "No space left on device"), ("ro", "Read-only file system")])
def test_a_disk_that_is_full_or_read_only_is_told_in_a_line(
    eye: Path, model: Path, tmp_path: Path, options: str, why: str
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    photographs = [str(eye.with_name(f"{number}.jpg")) for number in range(6)]
    for photograph in photographs:
        Path(photograph).write_bytes(eye.read_bytes())
    command = [sys.executable, "-m", "ma_cluster", "detect", *photographs, "--out", str(disk), "--model", str(model)]
    mounted = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o {options} tmpfs "$0" && exec "$@"', str(disk), *command]
    done = subprocess.run(mounted, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        f"ma-cluster: the destination cannot be written: {why}; check space and permissions\n",
    )


def test_detect_imports_no_ray(eye: Path, model: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom ma_cluster.cli import main\n"
        "try:\n    main()\nfinally:\n    print('ray' in sys.modules, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "detect", eye, "--out", tmp_path / "out", "--model", model]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False True"


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["detect", "none.jpg", "--out", "x"], 2, "file 'none.jpg' does not exist"),
        (["detect", __file__, "--out", "x", "--model", "no-such"], 2, "no model 'no-such'"),
        (["detect", __file__], 2, "Missing option '--out'"),
        (["score", "a", "b", "--replicas", "0"], 2, "--replicas"),
        (["score", "a", "b", "--model", "no-such"], 2, "no model 'no-such'"),
        (["status", "~nosuch/x"], 2, "this is no path of a folder"),
        (["score", "a\0b", "c"], 2, "this is no path of a folder"),
        (["score", "~nosuch/list.csv", "c"], 2, "this is no path of a folder"),
        (["score", ".", "./", "--model", "lite"], 2, "the destination would write into the source"),
        (["score", "no-such.csv", "c"], 2, "there is no manifest of this name"),
        (["status", "/nonexistent"], 2, "there is no run at this destination: it has no run.json; check the URL"),
        (["sample", "gs://x"], 2, "gs:// is not a store"),
        (["sample", "x", "--images", "0"], 2, "--images"),
        (["bundle", "--hgn-1x", "a", "--hgn-half", "b", "--out", "c"], 2, "no checkpoint at a"),
        (["train", "hgn", "--data", "a", "--out", "b", "--recipe", "d"], 2, "recipes are paper, lite, tiny"),
        (["train", "prn", "--data", "a", "--out", "b", "--recipe", "tiny"], 1, "the source folder does not exist"),
        (["train", "prn", "--data", "a", "--out", "b", "--scale", "0.5x"], 2, "No such option"),
        (["train", "hgn", "--data", "a", "--out", "b", "--uniform"], 2, "No such option"),
        (["train", "hgn", "--data", "a", "--out", "b", "--local", "--workers", "2"], 2, "--workers is for training on"),
        (["train", "hgn", "--data", "a", "--out", "b", "--device", "cuda"], 2, "--device is for training with --local"),
        (["bundle", "--hgn-1x", "a", "--hgn-half", "b", "--out", "c", "--recipe", "d"], 2, "recipes are paper, lite"),
        (["nonsense"], 2, "No such command 'nonsense'"),
    ],
)
def test_mistakes_end_in_one_clear_text(ma_cluster: Command, arguments: list[str], status: int, text: str) -> None:
    done = ma_cluster(*arguments)
    assert done.status == status
    assert text in done.err
    assert "Traceback" not in done.err


def test_score_takes_only_stores_it_knows(ma_cluster: Command, model: Path) -> None:
    done = ma_cluster("score", "ftp://a", "b", "--model", model)
    assert done.status == 2
    assert done.err == (
        "ma-cluster: ftp:// is not a store this version knows; use a local path, file:// or s3://bucket/prefix\n"
    )


def test_a_destination_that_cannot_be_written_fails_with_its_cure(
    ma_cluster: Command, eye: Path, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    done = ma_cluster("detect", eye, "--out", tmp_path / "file" / "out", "--model", model)
    assert done.status == 1
    assert "the destination cannot be written" in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_detect_with_its_status(
    eye: Path, model: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    copies = [tmp_path / f"{copy}.jpg" for copy in range(50)]
    for copy in copies:
        os.link(eye, copy)
    with process("detect", *copies, "--out", tmp_path / "out", "--model", model) as running:
        assert running.stdout is not None and running.stderr is not None
        assert running.stdout.readline().startswith("0.jpg: ")
        running.send_signal(number)
        assert "Traceback" not in running.stderr.read()
    assert running.returncode == status


def test_bundle_packs_checkpoints_and_overwrites_nothing(ma_cluster: Command, tmp_path: Path) -> None:
    for name, seed in (("hgn_1x", 0), ("hgn_half", 1)):
        network = calibrated_frrn(seed=seed)
        optimizer = build_optimizer(network, tiny().hgn_1x)
        (tmp_path / f"{name}.safetensors").write_bytes(checkpoint_bytes({"model": network}, optimizer, {"step": 4}))
    arguments = ["bundle", "--hgn-1x", tmp_path / "hgn_1x.safetensors", "--hgn-half", tmp_path / "hgn_half.safetensors"]
    done = ma_cluster(*arguments, "--recipe", "tiny", "--attribution", "ours", "--out", tmp_path / "model")
    packed = load_bundle(tmp_path / "model")
    assert (done.status, packed.recipe, packed.attribution) == (0, tiny(), "ours")
    assert done.out == f"{tmp_path / 'model'}  digest {packed.digest}\n"
    again = ma_cluster(*arguments, "--recipe", "tiny", "--out", tmp_path / "model")
    assert again.status == 2
    assert "holds a bundle already, and nothing is overwritten" in again.err
    other = ma_cluster(*arguments, "--recipe", "lite", "--out", tmp_path / "other")
    assert other.status == 2
    assert "do not fit the recipe's network" in other.err
    assert len(other.err.splitlines()) == 1
    assert not (tmp_path / "other").exists()
    silent = ma_cluster(*arguments, "--out", tmp_path / "other")
    assert (silent.status, "does not say its recipe" in silent.err) == (2, True)
    both = (*arguments, "--hgn-half", tmp_path / "hgn_1x.safetensors", "--recipe", "tiny", "--out", tmp_path / "mean")
    assert ma_cluster(*both).status == 0
    one, half = packed.weights["hgn_1x"], packed.weights["hgn_half"]
    for name, mean in load_bundle(tmp_path / "mean").weights["hgn_half"].items():
        assert torch.allclose(mean.float(), (one[name].float() + half[name].float()) / 2)


def test_bundle_needs_no_recipe_where_runs_say_what_they_trained(ma_cluster: Command, tmp_path: Path) -> None:
    steps = replace(tiny().hgn_half, steps=6)
    recipes = {"hgn_1x": tiny(), "hgn_half": replace(tiny(), hgn_half=steps)}
    for seed, (name, recipe) in enumerate(recipes.items()):
        network = calibrated_frrn(seed=seed)
        what = {"network": name, "recipe": to_dict(recipe), "photographs": "2f", "version": "1"}
        folder = TrainFolder.begin(str(tmp_path / name), what, resume=False)
        record = Epoch(step=4, losses={}, average_precision=0.5, workers=1, patches_per_second=1.0, seconds=1.0)
        folder.save({"model": network}, build_optimizer(network, tiny().hgn_1x), record)
    one, half, out = tmp_path / "hgn_1x", tmp_path / "hgn_half", tmp_path / "model"
    assert ma_cluster("bundle", "--hgn-1x", one, "--hgn-half", half, "--out", out).status == 0
    packed = load_bundle(out)
    assert packed.recipe == recipes["hgn_half"]
    assert packed.training["hgn_half"] == {"network": "hgn_half", "photographs": "2f", "version": "1"}
    swapped = ma_cluster("bundle", "--hgn-1x", half, "--hgn-half", one, "--out", tmp_path / "swapped")
    assert (swapped.status, "given as hgn_1x is of hgn_half" in swapped.err) == (2, True)
    foreign = ma_cluster("bundle", "--hgn-1x", one, "--hgn-half", half, "--recipe", "lite", "--out", tmp_path / "lite")
    assert foreign.status == 2
    said = "checkpoint of hgn_1x was trained by recipe tiny with image.fov_diameter_px 512, recipe lite has 3410"
    assert said in foreign.err
    nothing = ma_cluster("bundle", "--hgn-1x", tmp_path, "--hgn-half", half, "--out", tmp_path / "nothing")
    assert (nothing.status, "no checkpoint at" in nothing.err) == (2, True)


def test_detect_says_of_values_that_are_no_numbers_that_it_failed(
    ma_cluster: Command, eye: Path, model: Path, tmp_path: Path
) -> None:
    bundle = load_bundle(model)
    half = {key: value * (1e38 if key.startswith("head") else 1) for key, value in bundle.weights["hgn_half"].items()}
    save_bundle(replace(bundle, weights=bundle.weights | {"hgn_half": half}), tmp_path / "wild")
    done = ma_cluster("detect", eye, "--out", tmp_path / "out", "--model", tmp_path / "wild")
    assert (done.status, done.out.partition(" gave")[0]) == (3, "left eye.jpg: failed: not_finite: network hgn_half")
    values = json.loads((tmp_path / "out" / "left eye.json").read_text())
    assert (values["status"], values["reason"]) == ("failed", "not_finite")
    assert not (tmp_path / "out" / "left eye_mask.png").exists()


def test_detect_reads_a_field_that_is_known(ma_cluster: Command, eye: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for known, degrees in (((), 50.0), (("--field-degrees", "45"), 45.0)):
        assert ma_cluster("detect", eye, "--out", out, "--model", model, *known).status == 0
        values = json.loads((out / "left eye.json").read_text())
        assert (values["fov"]["degrees"], "field_assumed" in values["flags"]) == (degrees, not known)


def test_detect_reads_a_photograph_without_surround_whose_field_is_known(
    ma_cluster: Command, model: Path, tmp_path: Path
) -> None:
    path, detect = tmp_path / "inner.png", ("detect", tmp_path / "inner.png", "--out", tmp_path, "--model", model)
    Image.fromarray(retina()[400:1000, 400:1000]).save(path)
    refused = ma_cluster(*detect, "--field-degrees", "21")
    assert (refused.status, "--no-surround with --field-degrees" in refused.out) == (3, True)
    assert ma_cluster(*detect, "--field-degrees", "21", "--no-surround").status == 0
    fov = json.loads((tmp_path / "inner.json").read_text())["fov"]
    assert fov == {"row": 299.5, "col": 299.5, "diameter_px": 600.0, "degrees": 21.0}


@pytest.mark.parametrize(
    ("known", "fault"),
    [
        (("--no-surround",), "give the angle across it, --field-degrees"),
        (("--field-degrees", "5"), "no camera has it"),
        (("--field-degrees", "361"), "Invalid value"),
    ],
)
def test_a_field_that_cannot_be_is_wrong_usage(
    ma_cluster: Command, eye: Path, tmp_path: Path, known: tuple[str, ...], fault: str
) -> None:
    out = tmp_path / "out"
    for arguments in (("detect", eye, "--out", out), ("score", tmp_path, out)):
        done = ma_cluster(*arguments, *known)
        assert (done.status, fault in done.err) == (2, True)
    assert not out.exists()


def test_ultra_widefield_is_refused_by_its_name(ma_cluster: Command, eye: Path, model: Path, tmp_path: Path) -> None:
    done = ma_cluster("detect", eye, "--out", tmp_path, "--model", model, "--field-degrees", "200")
    assert (done.status, "unsupported: a field of 200 degrees: ultra-widefield" in done.out) == (3, True)


def test_a_run_does_not_go_on_with_another_field(ma_cluster: Command, model: Path, tmp_path: Path) -> None:
    source, dest = open_store(tmp_path / "source"), open_store(tmp_path / "run")
    source.put("0.jpg", b"no photograph")
    bundle, field = load_bundle(model), KnownField(45.0)
    config = config_digest(bundle.recipe, SandboxConfig().decoder, ScoreOptions(field=field))
    photographs = Photographs(source.url, field)
    run = begin_run(photographs.open(), dest, bundle.digest, config)
    (shard,) = shards(dest, run.plan)
    (entry,) = read_shard(dest, shard)
    assert entry.field_degrees == 45
    commit(dest, run, shard, [Outcome(key=entry.key, etag=entry.etag, reason=Reason.NOT_AN_IMAGE, attempts=1)])
    score = ("score", source.url, dest.url, "--model", model, "--field-degrees")
    assert ma_cluster(*score, "45").status == 3
    done = ma_cluster(*score, "46")
    assert (done.status, "of another config" in done.err) == (2, True)


@pytest.fixture
def half_done(tmp_path: Path) -> Path:
    """A run over three sample photographs: the first scored perfectly, the second refused, the third undecided."""
    write_sample(str(tmp_path / "archive"), 3)
    source, dest = open_store(tmp_path / "archive" / IMAGES), open_store(tmp_path / "run")
    run = begin_run(source, dest, "model", "config")
    first, second, _ = shards(dest, run.plan)
    entry = read_shard(dest, first)[0]
    truth = next((tmp_path / "archive").rglob("sample_001_MA.tif"))
    with Image.open(truth) as image:
        dest.put("masks/1.png", encode_mask(np.asarray(image) > 0))
    scored = Outcome(
        key=entry.key,
        etag=entry.etag,
        reason=None,
        attempts=1,
        findings=Findings((), None, Triage.NONE),
        mask_key="masks/1.png",
    )
    commit(dest, run, first, [scored])
    entry = read_shard(dest, second)[0]
    commit(dest, run, second, [Outcome(key=entry.key, etag=entry.etag, reason=Reason.TRUNCATED, attempts=1)])
    return tmp_path / "run"


def test_status_counts_by_status_and_reason(ma_cluster: Command, half_done: Path) -> None:
    lines = ma_cluster("status", half_done).out.splitlines()
    assert lines[1].endswith(", unfinished")
    assert lines[2] == "2 of 3 photographs decided, 0 lesions"
    assert [line.split() for line in lines[3:6]] == [["refused", "1"], ["scored", "1"], ["truncated", "1"]]


def test_status_lists_what_is_missing(ma_cluster: Command, half_done: Path) -> None:
    assert ma_cluster("status", half_done, "--missing").out == "sample_003.jpg\n"
    values = json.loads(ma_cluster("status", half_done, "--missing", "--json").out)
    assert (values["missing"], values["remaining"], values["reasons"]) == (["sample_003.jpg"], 1, {"truncated": 1})


def test_status_compares_with_the_truth(ma_cluster: Command, half_done: Path) -> None:
    archive = half_done.parent / "archive"
    values = json.loads(ma_cluster("status", half_done, "--json", "--truth", archive).out)["truth"]
    assert (values["photographs"], values["unscored"], values["false_lesions"]) == (3, 2, 0)
    assert 0 < values["found_lesions"] < values["reference_lesions"]
    assert values["both_px"] == values["called_px"] < values["reference_px"]
    lines = ma_cluster("status", half_done, "--truth", archive).out.splitlines()
    assert lines[-3] == "against the reference, 3 photographs (2 not scored):"
    assert "precision 1.000" in lines[-2]


def test_a_run_against_a_data_set_of_other_photographs_is_refused(ma_cluster: Command, half_done: Path) -> None:
    done = ma_cluster("status", half_done, "--truth", half_done)
    assert done.status == 2
    assert "no photographs under" in done.err


def test_score_repairs_what_status_names(ma_cluster: Command, model: Path, tmp_path: Path) -> None:
    source, dest = open_store(tmp_path / "source"), open_store(tmp_path / "run")
    for number in range(2):
        source.put(f"{number}.jpg", b"no photograph")
    bundle = load_bundle(model)
    run = begin_run(source, dest, bundle.digest, config_digest(bundle.recipe, SandboxConfig().decoder))
    for shard in shards(dest, run.plan):
        (entry,) = read_shard(dest, shard)
        commit(dest, run, shard, [Outcome(key=entry.key, etag=entry.etag, reason=Reason.NOT_AN_IMAGE, attempts=1)])
    dest.put("outcomes/part-000002.parquet", dest.get("outcomes/part-000001.parquet"))
    cure = "`ma-cluster score SOURCE DEST --repair` puts it aside, and goes on with what is whole\n"
    score = ("score", source.url, dest.url, "--model", model)
    for command in (("status", dest.url), score):
        done = ma_cluster(*command)
        *about, fault = done.err.splitlines(keepends=True)
        assert (done.status, about) == (1, ["listing the photographs\n"] if command is score else [])
        assert fault.startswith("ma-cluster: outcomes/part-000002.parquet of the destination: ")
        assert fault.endswith(cure)
    done = ma_cluster(*score, "--repair")
    assert done.status == 3, "no photograph was one"
    first, *_, last = done.out.splitlines()
    moved = "now damaged/0001/outcomes/part-000002.parquet"
    assert first == f"outcomes/part-000002.parquet: the plan has no such part; {moved}"
    assert last == "nothing was left to score"
    assert ma_cluster(*score, "--repair").out.startswith("nothing of the run is damaged\n")


def test_doctor_names_each_fault_with_a_cure(ma_cluster: Command, tmp_path: Path) -> None:
    done = ma_cluster("doctor", "--model", "no-such", "--store", tmp_path / "store")
    levels = {line.split()[1]: line.split()[0] for line in done.out.splitlines()}
    assert done.status == 1
    assert (levels["python"], levels["torch"], levels["store"], levels["ray"]) == ("ok", "ok", "ok", "ok")
    assert levels["model"] == "fail"
    assert list((tmp_path / "store").iterdir()) == []


def test_an_archive_is_scored_resumed_and_compared(ma_cluster: Command, model: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    assert ma_cluster("sample", archive, "--images", "2", "--seed", "3").status == 0
    images = archive / IMAGES
    (images / "notes.jpg").write_text("no photograph")
    with process("score", images, tmp_path / "run", "--model", model) as running:
        out, err = running.communicate()
    assert running.returncode == 3, err
    assert "3 photographs, " in out
    assert "photographs/s, " in out and "megapixels/s" in out
    assert [line.split() for line in out.splitlines()[1:4]] == [
        ["refused", "1"],
        ["scored", "2"],
        ["not_an_image", "1"],
    ]
    again = ma_cluster("score", images, tmp_path / "run", "--model", model)
    assert again.status == 3
    assert "nothing was left to score" in again.out
    retried = ma_cluster("score", images, tmp_path / "run", "--model", model, "--retry-failed")
    assert (retried.status, retried.out) == (3, again.out), "what was refused is not retried"
    conflict = ma_cluster("score", archive, tmp_path / "run", "--model", model)
    assert conflict.status == 2
    assert "holds run" in conflict.err
    values = json.loads(ma_cluster("status", tmp_path / "run", "--json", "--truth", archive).out)
    assert (values["truth"]["photographs"], values["truth"]["unscored"]) == (3, 1)  # notes.jpg is the third
