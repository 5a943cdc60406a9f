"""A wheel of the tree, installed where there is no tree: all that a command needs is inside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ma_cluster.images.datasets import IMAGES_FOLDER, TEST_PART

ROOT = Path(__file__).parents[2]
Run = Callable[..., str]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: what an earlier build has left in the tree must not get in."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "ma_cluster", tree / "ma_cluster", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, tree)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs the command of an environment that has the wheel, and borrows this one's other packages."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home / "venv")
    (packages,) = (home / "venv").glob("lib/python*/site-packages")
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "borrowed.pth").write_text("\n".join(others) + "\n")
    pip("--python", home / "venv/bin/python", "install", "--no-deps", "--no-index", wheel)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*arguments: object, program: str = "ma-cluster", statuses: tuple[int, ...] = (0,)) -> str:
        command = [str(home / "venv/bin" / program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=home, env=kept, timeout=600, check=False)
        assert done.returncode in statuses, done.stdout + done.stderr
        return done.stdout

    return run


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_every_file_of_the_package_is_in_the_wheel_and_nothing_else(wheel: Path) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ma_cluster").rglob("*") if path.is_file()}
    wanted = {name for name in files if "__pycache__" not in name}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == wanted


@pytest.mark.slow
def test_the_installed_package_samples_detects_scores_and_examines(
    installed: Run, tiny_bundle: Path, tmp_path: Path
) -> None:
    where = installed("-c", "import ma_cluster; print(ma_cluster.__file__)", program="python")
    assert "/venv/" in where
    installed("sample", tmp_path / "archive", "--images", "2")
    images = tmp_path / "archive" / IMAGES_FOLDER / TEST_PART
    photograph = images / "sample_001.jpg"
    assert "lesion" in installed("detect", photograph, "--out", tmp_path / "out")  # with the model inside
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "sample_001.json", "sample_001_mask.png", "sample_001_overlay.jpg",
    }  # fmt: skip
    assert "2 photographs" in installed("score", images, tmp_path / "run", "--model", tiny_bundle)
    assert (tmp_path / "run" / "summary.json").is_file()
    assert "index.html" in installed("report", tmp_path / "run")
    findings = installed("doctor", statuses=(0, 1))
    states = {line.split()[1]: line.split()[0] for line in findings.splitlines()}
    assert (states["model"], states["ray"]) == ("ok", "ok")
