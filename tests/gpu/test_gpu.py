"""The checks of a GPU, on one where there is one, and what of `make gpu` a CPU can try."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import CHECKS, Figures
from pack import pack
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
PROVE = str(ROOT / "tests/gpu/prove.py")
MISSING = ["ray", "boto3", "botocore", "simplejpeg", "tensorboardX", "monai", "beartype", "typer", "rich", "pytest"]
MISSING += ["jaxtyping", "jinja2", "matplotlib", "prometheus_client", "scipy", "sklearn", "hypothesis"]
"""All that a machine may lack that has torch, numpy, OpenCV, Pillow, pyarrow and safetensors."""


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_the_gpu(check: type) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    figures: Figures = check("cuda")
    assert figures


@pytest.mark.slow
def test_make_gpu_runs_on_a_bare_machine_and_writes_what_it_may(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({MISSING}))")
    out = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, PROVE, "--device", "cpu", "--steps", "2", "--out", str(out), "--without"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    assert {name: check for name, check in results["checks"].items() if check["status"] == "failed"} == {}
    assert {"detect", "in_flight"} <= results["bench"].keys() and results["pace"].keys() == {"0.5"}
    assert [run["epochs"][-1]["step"] for run in results["training"].values()] == [2]
    files = list(out.iterdir())
    assert len(files) <= 8 and max(file.stat().st_size for file in files) <= 16 * 10**6
    joined = tmp_path / "joined.safetensors"
    subprocess.run([sys.executable, str(ROOT / "tests/gpu/pack.py"), "join", str(out), "half", str(joined)], check=True)
    assert load_file(joined)["model.head.bias"].shape == (5,)


def test_nothing_is_trained_on_drawn_photographs_where_the_pack_is_not_where_it_was_said(tmp_path: Path) -> None:
    kept = tmp_path / "half.1.safetensors"
    kept.touch()
    command = [sys.executable, PROVE, "--data", str(tmp_path / "mistyped"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and "mistyped/idrid" in done.stderr and kept.exists()


def test_what_travels_is_chosen_to_fit(tmp_path: Path) -> None:
    from fundus_set import rich_set

    where = rich_set(tmp_path)
    grades = tmp_path / "grades.csv"
    names = [f"healthy/{file.name}" for file in sorted((tmp_path / "healthy").iterdir())]
    grades.write_text("image,grade\n" + "".join(f"{name},0\n" for name in names) + f"{names[0]},3\n")
    needed = pack(where["data"], str(grades), tmp_path / "whole", 10**8)
    assert needed == {"photographs": 3, "healthy": 2, "bytes": needed["bytes"]}
    size = sum(file.stat().st_size for file in (tmp_path / "whole").rglob("*") if file.is_file())
    assert size == needed["bytes"]
    fewer = pack(where["data"], str(grades), tmp_path / "fewer", size - 1000)
    assert fewer["healthy"] == 1 and fewer["bytes"] < size
