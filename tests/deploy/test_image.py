"""The image, as far as it can be told without building it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
INSTRUCTIONS = re.findall(
    r"^([A-Z]+) (.*)$", re.sub(r"\\\n", " ", re.sub(r"^ *#.*\n", "", DOCKERFILE, flags=re.M)), re.M
)
ARGUMENTS = dict(text.split("=") for name, text in INSTRUCTIONS if name == "ARG" and "=" in text)


def stages() -> list[list[tuple[str, str]]]:
    starts = [number for number, (name, _) in enumerate(INSTRUCTIONS) if name == "FROM"]
    return [INSTRUCTIONS[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]


def copied() -> list[str]:
    """Sources in the checkout."""
    copies = [text.split() for name, text in INSTRUCTIONS if name == "COPY" and "--from=" not in text]
    return [source for words in copies for source in words[:-1]]


def test_all_stages_stand_on_the_official_image_of_the_ray_that_the_package_wants() -> None:
    bases = {text.removesuffix(" AS build") for (_, text), *_ in stages()}
    assert bases == {"rayproject/ray:${RAY_VERSION}-${PYTHON}-${FLAVOUR}"}
    (least,) = [re.findall(r">=([\d.]+)", each)[0] for each in PROJECT["dependencies"] if each.startswith("ray[")]
    python = PROJECT["requires-python"].removeprefix(">=").replace(".", "")
    expected = {"RAY_VERSION": f"{least}.0", "PYTHON": f"py{python}", "FLAVOUR": "cpu"}
    assert expected == ARGUMENTS


def test_the_tags_of_the_build_are_the_packages_version() -> None:
    assert set(re.findall(r"-t ma-cluster-\w+:(\S+)", DOCKERFILE)) == {PROJECT["version"]}


def test_what_is_copied_is_there_and_nothing_else_reaches_the_build() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules == ["*", *(f"!{source}" for source in copied()), "**/__pycache__"]
    assert [source for source in copied() if not (ROOT / source).exists()] == []


def test_the_last_stage_is_not_root_has_no_compiler_and_gets_the_environment_alone() -> None:
    *_, last = stages()
    users = [text for name, text in last if name == "USER"]
    assert users[-1] == "1000:100"
    runs = " ".join(text for name, text in last if name == "RUN")
    assert all(f"! command -v {compiler}" in runs for compiler in ("gcc", "g++", "nvcc"))
    assert "pip" not in runs
    assert [text for name, text in last if name == "COPY"] == [
        "--from=build /opt/ma_cluster/venv /opt/ma_cluster/venv",
        "jobs /opt/ma_cluster/jobs",
    ]


def test_only_wheels_are_installed_and_ray_is_the_one_of_the_image() -> None:
    install = next(text for name, text in stages()[0] if name == "RUN" and "--requirement" in text)
    assert "--only-binary=:all:" in install
    assert 'echo "ray==${RAY_VERSION}" > constraints.txt' in install
    assert "--constraint constraints.txt" in install
