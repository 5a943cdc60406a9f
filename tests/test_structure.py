"""How the source holds together: import order, sizes, declared dependencies. Read from the files, mostly."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ma_cluster.errors import Reason

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ma_cluster"
ORDER = ["base", "storage", "bundle", "images", "networks", "hypotheses", "refinement", "lesions", "evaluation"]
ORDER += ["training", "archive", "http", "review", "cluster", "report", "cli"]
"""Each imports only itself and what stands to its left; `base` is what lies beside the folders."""
_BASE = ["config", "network_config", "image_config", "errors", "machine", "metrics", "__init__"]
TOP_LEVEL = dict.fromkeys(_BASE, "base") | {"bundle": "bundle", "networks": "networks", "__main__": "cli"}
STORAGE = {"boto3", "botocore", "obstore", "s3fs", "fsspec", "smart_open", "minio"}
DISTRIBUTIONS = {
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
COMES_WITH = {"anyio", "fastapi", "starlette", "pydantic", "uvicorn", "grpc", "botocore", "urllib3"}
"""Parts of ray[serve] and boto3, versioned by them."""
LONGEST_FILE, LONGEST_FUNCTION = 320, 60

SOURCES = sorted(PACKAGE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def layer(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else TOP_LEVEL[path.stem]


def layer_of_module(module: str) -> str:
    parts = module.split(".")
    return "base" if len(parts) == 1 else TOP_LEVEL.get(parts[1], parts[1])


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere, also inside functions and for type checking."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            yield node.module


def third_party(path: Path) -> set[str]:
    roots = {module.partition(".")[0] for module in imports(path)}
    return roots - set(sys.stdlib_module_names) - {"ma_cluster", "__future__"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_module_imports_only_from_its_own_layer_and_those_to_its_left(path: Path) -> None:
    allowed = ORDER[: ORDER.index(layer(path)) + 1]
    if path.name == "__init__.py":
        allowed = ORDER  # it hands out Detector, lazily
    own = [module for module in imports(path) if module.partition(".")[0] == "ma_cluster"]
    assert [module for module in own if layer_of_module(module) not in allowed] == []


CLUSTER = {"fleet": {"fleet"}, "service": {"fleet", "service"}, "training": {"training"}}
"""What each folder of cluster/ imports of its folders."""


@pytest.mark.parametrize("folder", CLUSTER)
def test_the_folders_of_cluster_import_in_one_direction(folder: str) -> None:
    prefix = "ma_cluster.cluster."
    own = {
        module.removeprefix(prefix).partition(".")[0]
        for path in (PACKAGE / "cluster" / folder).glob("*.py")
        for module in imports(path)
        if module.startswith(prefix)
    }
    assert own & CLUSTER.keys() <= CLUSTER[folder]


def test_only_cluster_imports_ray_and_all_of_it_does() -> None:
    users = {relative(path) for path in SOURCES if "ray" in third_party(path)}
    assert users == {relative(path) for path in (PACKAGE / "cluster").rglob("*.py")}


def test_only_the_store_imports_a_storage_library() -> None:
    assert {relative(path) for path in SOURCES if third_party(path) & STORAGE} == {"ma_cluster/storage/s3.py"}


@pytest.mark.parametrize("module", ["ma_cluster", "ma_cluster.cli", "ma_cluster.report.console"])
def test_importing_loads_neither_torch_nor_ray(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'torch', 'ray', 'boto3'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_and_functions_fit_a_reader(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= LONGEST_FILE
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}


def test_no_file_is_a_drawer() -> None:
    drawers = {"utils", "util", "helpers", "common", "misc", "tools"}
    assert [relative(path) for path in SOURCES if drawers & {path.stem, *path.relative_to(PACKAGE).parts}] == []


def test_every_third_party_import_is_declared() -> None:
    declared = {name(requirement) for requirement in PROJECT["dependencies"]}
    used = {DISTRIBUTIONS.get(module, module) for path in SOURCES for module in third_party(path)}
    assert {normalised(module) for module in used} - declared - COMES_WITH == set()


def test_every_third_party_import_of_the_tests_is_declared() -> None:
    extras = [*PROJECT["optional-dependencies"]["test"], *PROJECT["optional-dependencies"]["bench"]]
    declared = {name(requirement) for requirement in [*PROJECT["dependencies"], *extras]} | COMES_WITH
    local = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"tests"}
    used = {module for path in (ROOT / "tests").rglob("*.py") for module in third_party(path)} - local
    assert {normalised(DISTRIBUTIONS.get(module, module)) for module in used} - declared == set()


def test_every_declared_dependency_is_imported_somewhere() -> None:
    used = {normalised(DISTRIBUTIONS.get(module, module)) for path in SOURCES for module in third_party(path)}
    assert {name(requirement) for requirement in PROJECT["dependencies"]} - used == set()


def test_readme_and_pyproject_agree_on_the_python_version() -> None:
    wanted = PROJECT["requires-python"].removeprefix(">=")
    assert re.findall(r"Python (\d\.\d+) or newer", (ROOT / "README.md").read_text()) == [wanted]


def test_the_readme_is_a_door_that_names_every_folder_and_every_reason() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 200
    folders = {f"  {path.parent.name}/" for path in PACKAGE.glob("*/*.py")}
    assert {folder for folder in folders if f"\n{folder}" not in text} == set()
    assert {reason for reason in Reason if f"`{reason}`" not in text} == set()


def name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None
    return normalised(found.group())


def normalised(distribution: str) -> str:
    return distribution.lower().replace("_", "-")
