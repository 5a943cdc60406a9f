"""Scoring while a node is taken out of the cluster with notice, as an autoscaler or a preemption does it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from archive_runs import rows
from PIL import Image
from processes import Process, descendants
from ray_head import RAY, Head, ray_process, running_head

from ma_cluster.images.sample import retina
from ma_cluster.storage.local import LocalStore

pytestmark = pytest.mark.long
PHOTOGRAPHS = 1000  # more than are scored meanwhile


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """One photograph under many keys."""
    folder = tmp_path / "archive"
    folder.mkdir()
    Image.fromarray(retina()).resize((400, 400)).save(folder / "0000.jpg")
    for number in range(1, PHOTOGRAPHS):
        shutil.copyfile(folder / "0000.jpg", folder / f"{number:04d}.jpg")
    return folder


@contextmanager
def node(head: Head, name: str, cpus: int) -> Iterator[subprocess.Popen[bytes]]:
    """A worker node that has joined."""
    command = [RAY, "start", f"--address={head.gcs}", "--block", "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}"]
    command += ["--dashboard-agent-listen-port=0", "--object-store-memory=209715200", f"--labels=name={name}"]
    with ray_process(command, head.environment, head.folder / f"{name}.log") as process:
        wait_until(lambda: name in alive(head), 90)
        yield process


def alive(head: Head) -> dict[str, str]:
    """Ids of the nodes, by the names that they were given; the head has none."""
    text = ray(head, "list", "nodes", "--address", head.dashboard, "--format", "json", "--detail")
    listed = json.loads(text) if text.startswith("[") else []  # a head that is just up says so in words
    return {each["labels"].get("name", ""): each["node_id"] for each in listed if each["state"] == "ALIVE"}


def ray(head: Head, *arguments: str) -> str:
    done = subprocess.run([RAY, *arguments], env=dict(head.environment), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def replicas(node: subprocess.Popen[bytes]) -> list[Process]:
    return [each for each in descendants(node.pid) if each.title.startswith("ray::ServeReplica:ma-cluster-")]


def wait_until(done: Callable[[], object], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def drain(head: Head, name: str) -> None:
    notice = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "maintenance")
    which = ("--address", head.gcs, "--node-id", alive(head)[name])
    ray(head, "drain-node", *which, *notice, "--deadline-remaining-seconds", "60")


def test_a_node_that_is_drained_hands_its_work_on_and_no_photograph_is_begun_twice(
    archive: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    dest = tmp_path / "results"

    def committed() -> int:
        return len(list(dest.glob("outcomes/*")))

    with running_head(cpus=5) as head, node(head, "leaving", cpus=4) as leaving:
        command = [sys.executable, "-m", "ma_cluster", "score", str(archive), str(dest), "--model", str(tiny_bundle)]
        run = subprocess.Popen([*command, "--address", head.gcs, "--replicas", "3"], env=dict(head.environment))
        wait_until(lambda: replicas(leaving) and committed(), 120)
        drain(head, "leaving")
        wait_until(lambda: not replicas(leaving), 90)
        assert run.poll() is None  # they left the node, not the cluster
        leaving.terminate()
        leaving.wait()
        without_it = committed()
        wait_until(lambda: committed() >= without_it + 3, 90)
        run.terminate()
        assert run.wait(timeout=60) == 143
    ends = {(row["status"], row["attempts"]) for row in rows(LocalStore(dest)).values()}
    assert ends == {("scored", 1)}
