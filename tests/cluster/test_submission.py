"""Jobs on a cluster at a distance: a real head that asks for a token, and the command that submits to it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from archive_runs import rows
from fundus_set import write_training_set
from PIL import Image
from ray_head import RAY, Head, running_head

from ma_cluster.cluster.submission import copy_source, entrypoint, exit_status
from ma_cluster.errors import UsageError
from ma_cluster.images.sample import retina
from ma_cluster.storage.local import LocalStore
from ma_cluster.training.run import TrainFolder

ROOT = Path(__file__).parents[2]
COMMAND = str(Path(sys.executable).with_name("ma-cluster"))
PROBE = """
import os, sys, ma_cluster
print(ma_cluster.GREETING, sys.argv[1:], sorted(os.listdir(".")), "wJalrXUtnFEMI" in os.environ.values())
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Six logical CPUs, as the tests' shared Ray has."""
    with running_head(cpus=6) as head:
        yield head


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose package is another than the installed one, with a job that tells what it finds."""
    root = tmp_path_factory.mktemp("checkout")
    for name, text in {
        "ma_cluster/__init__.py": "GREETING = 'from the checkout'",
        "jobs/probe.py": PROBE,
        "jobs/wait.py": "import time\nprint('waiting', flush=True)\ntime.sleep(60)",
        ".venv/large.bin": "",
        "runs/patients.csv": "",
    }.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root


def submit(head: Head, *arguments: object, cwd: Path = ROOT, **environment: str) -> subprocess.Popen[str]:
    command = [COMMAND, "submit", "--address", head.dashboard, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    # a shell starts what it puts into the background, this test run perhaps, with SIGINT ignored
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    given = dict(head.environment) | environment
    return subprocess.Popen(command, cwd=cwd, env=given, text=True, preexec_fn=heeding, **pipes)


def test_a_job_gets_the_source_and_no_variable_and_its_exit_status_comes_back(head: Head, probe: Path) -> None:
    job = submit(head, "probe", 3, "--dry-run", cwd=probe, AWS_SECRET_ACCESS_KEY="wJalrXUtnFEMI")
    out, _ = job.communicate(timeout=120)
    assert "from the checkout ['3', '--dry-run'] ['jobs', 'ma_cluster'] False" in out
    assert out.startswith("raysubmit_")
    assert job.returncode == 3
    assert "wJalr" not in out


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_running_and_says_how_to_stop_it(head: Head, probe: Path) -> None:
    # RAY_ADDRESS, as set on a machine that has a cluster of its own, does not overrule --address
    following = submit(head, "wait.py", cwd=probe, RAY_ADDRESS="http://127.0.0.1:1")
    assert following.stdout is not None
    job_id = following.stdout.readline().strip()
    while "waiting" not in following.stdout.readline():
        assert following.poll() is None
    following.send_signal(signal.SIGINT)
    out, _ = following.communicate(timeout=30)
    assert following.returncode == 130
    stop = next(line.split() for line in out.splitlines() if "ray job stop" in line)
    assert stop[:3] == ["ray", "job", "stop"]
    assert stop[-1] == job_id
    assert "RUNNING" in ray_job(head, "status", job_id)
    ray_job(head, *stop[2:])
    assert "was stopped" in ray_job(head, "status", job_id)


@pytest.mark.parametrize(
    "token", [{"RAY_AUTH_TOKEN": ""}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}], ids=str
)
def test_without_the_token_a_job_is_refused(head: Head, probe: Path, token: dict[str, str], tmp_path: Path) -> None:
    job = submit(head, "probe", 0, cwd=probe, HOME=str(tmp_path), **token)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    assert "RAY_AUTH_TOKEN" in out
    assert "raysubmit" not in out


@pytest.mark.slow
def test_an_archive_is_scored_by_a_job(head: Head, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    for side in (300, 320):
        Image.fromarray(retina()).resize((side, side)).save(tmp_path / "archive" / f"{side}.jpg")
    dest = tmp_path / "results"
    options = ("--model", tiny_bundle, "--replicas", 1)
    job = submit(head, "score_archive", tmp_path / "archive", dest, *options, cwd=tmp_path)
    out, _ = job.communicate(timeout=240)
    assert job.returncode == 0, out
    assert {row["status"] for row in rows(LocalStore(dest)).values()} == {"scored"}
    assert "succeeded" in ray_job(head, "status", out.split()[0])


@pytest.mark.long
def test_a_network_is_trained_by_a_job(head: Head, tmp_path: Path) -> None:
    write_training_set(tmp_path / "data")
    out = tmp_path / "run"
    options = ("--recipe", "tiny", "--scale", "0.5x", "--steps", 4, "--epoch-steps", 2)
    job = submit(head, "train_hgn.py", "--data", tmp_path / "data", "--out", out, *options)
    lines, _ = job.communicate(timeout=240)
    assert job.returncode == 0, lines
    assert [epoch.step for epoch in TrainFolder(str(out)).epochs] == [2, 4]
    assert "succeeded" in ray_job(head, "status", lines.split()[0])


def ray_job(head: Head, verb: str, *arguments: str) -> str:
    """What Ray's own command says."""
    command = [RAY, "job", verb, "--address", head.dashboard, *arguments]
    done = subprocess.run(command, env=dict(head.environment), capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def test_a_job_that_is_not_there_is_named_with_those_that_are(probe: Path) -> None:
    with pytest.raises(UsageError, match="'tea'; jobs/ has probe, wait"):
        entrypoint(probe, "tea", [])


def test_arguments_reach_the_job_as_they_are(probe: Path) -> None:
    command = entrypoint(probe, "jobs/probe.py", ["s3://a/left eye", "$(rm -rf /)"])
    assert command == "python jobs/probe.py 's3://a/left eye' '$(rm -rf /)'"


def test_only_package_and_jobs_are_sent(probe: Path, tmp_path: Path) -> None:
    copy_source(probe, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jobs", "ma_cluster"]


def test_a_job_ended_by_a_signal_exits_as_a_shell_says_it() -> None:
    assert [exit_status(code) for code in (1, 3, 143, -9)] == [1, 3, 143, 137]
