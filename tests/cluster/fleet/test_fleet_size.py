"""How large a fleet is: what a machine or a cluster has room for, what is refused, and what is waited for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import ray
from archive_runs import rows, upload_eyes
from processes import descendants, wait_until_gone
from ray.util.placement_group import placement_group, remove_placement_group
from ray_head import RAY, Head, ray_process, running_head

from ma_cluster.archive.run import begin_run, pending
from ma_cluster.bundle import load_bundle
from ma_cluster.cluster.fleet.driver import model_of, score_archive
from ma_cluster.cluster.fleet.replicas import Fleet
from ma_cluster.cluster.fleet.scoring_app import ScoringApp
from ma_cluster.cluster.fleet.workers import WorkerSpec, score_shards
from ma_cluster.errors import FleetBrokenError, UsageError
from ma_cluster.images.sandbox import SandboxConfig
from ma_cluster.machine import cores
from ma_cluster.storage.local import LocalStore

COMMAND = [sys.executable, "-m", "ma_cluster", "score"]


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> str:
    source = LocalStore(tmp_path_factory.mktemp("eyes"))
    upload_eyes(source, 2)
    return source.url


def wait_for(what: Callable[[], object], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("threads", "gpus", "cpus_there", "gpus_there", "room"),
    [
        (1, 0.0, 8.0, 0.0, 8),
        (3, 0.0, 8.0, 0.0, 2),
        (1, 1.0, 8.0, 4.0, 4),
        (3, 1.0, 8.0, 4.0, 2),
        (1, 0.1, 64.0, 1.0, 10),
        (1, 0.6, 8.0, 2.0, 2),
        (1, 2.0, 8.0, 5.0, 2),
        (1, 1.0, 8.0, 0.0, 0),
    ],
)
def test_room_is_what_cpus_and_gpus_both_hold(
    threads: int, gpus: float, cpus_there: float, gpus_there: float, room: int
) -> None:
    assert Fleet(threads_per_segmenter=threads, gpus_per_segmenter=gpus).room(cpus_there, gpus_there) == room


@pytest.mark.parametrize("gpus", [-1.0, 1.5, float("nan")])
def test_gpus_are_a_whole_number_or_a_share_of_one(gpus: float) -> None:
    with pytest.raises(ValueError, match="a whole number or a share of one"):
        Fleet(gpus_per_segmenter=gpus)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("fleet", "images", "segmenters"),
    [
        (Fleet(), 100, 4),
        (Fleet(), 3, 3),
        (Fleet(threads_per_segmenter=2), 100, 2),
        (Fleet(gpus_per_segmenter=1.0), 100, 1),
        (Fleet(gpus_per_segmenter=0.5), 100, 2),
        (Fleet(gpus_per_segmenter=4.0), 100, 1),  # which waits for a node that has them
        (Fleet(segmenters=50), 1, 50),
    ],
)
def test_a_fleet_is_as_large_as_the_free_cpus_and_gpus(fleet: Fleet, images: int, segmenters: int) -> None:
    """Of six CPUs and a GPU, a Reader and the workers taken off."""
    wait_for(lambda: {"CPU": 6, "GPU": 1}.items() <= ray.available_resources().items(), 30)
    assert fleet.sized(images).segmenters == segmenters


@pytest.mark.usefixtures("local_ray")
def test_what_others_use_is_not_counted() -> None:
    wait_for(lambda: ray.available_resources()["CPU"] == 6, 30)
    theirs = placement_group([{"CPU": 3, "GPU": 0.5}])
    wait_for(lambda: ray.available_resources()["CPU"] == 3, 30)
    assert Fleet().sized(100).segmenters == 1
    assert Fleet(gpus_per_segmenter=0.25).sized(100).segmenters == 1
    remove_placement_group(theirs)
    wait_for(lambda: ray.available_resources()["CPU"] == 6, 30)


REFUSED = [
    (["--gpus", "1000"], 2, "needs 1000 GPU for each Segmenter, .+ here: lower --gpus"),
    (["--threads", "1000"], 2, f"needs 1000 CPUs for each Segmenter, {cores()} here: lower --threads"),
    (["--replicas", "1000"], 2, f"there is room for {cores()} Segmenters here, not for 1000: lower --replicas"),
    (["--readers", "1000"], 2, f"needs a CPU for each of 1000 Readers, {cores()} here: lower --readers"),
    (["--fleet", "warm"], 2, "fleet warm is kept by a cluster: give its address"),
    (["--fleet", "warm", "--replicas", "3"], 2, "a warm fleet has its own sizes: leave out --replicas"),
    (["--address", "nonsense"], 2, "'nonsense' is no address of a Ray cluster; give its head as HOST:PORT"),
    (["--address", "head:99999"], 2, "'head:99999' is no address of a Ray cluster"),
    (["--address", "http://head:8265"], 2, "http:// is what `ma-cluster submit` takes; give its head as HOST:PORT"),
    (["--address", "ray://head:10001"], 2, "ray:// is for Ray's client"),
    (["--address", "127.0.0.1:1"], 1, "no Ray cluster answers at 127.0.0.1:1 .Connection refused.; check"),
    (["--address", "..:6379"], 1, r"no Ray cluster answers at \.\.:6379"),
    (["--address", "127.0.0.1:WEB"], 1, r"what answers at 127.0.0.1:\d+ is no head of a Ray cluster"),
]
"""Options of `score`, its exit status, and what it says. WEB is the port of a web server."""
TRAIN = ["train", "hgn", "--data", "data", "--out", "out", "--recipe", "tiny", "--gpus", "1000"]
EVALUATE = ["evaluate", "--data", "data", "--out", "out", "--model", "MODEL", "--split", "test", "--gpus", "1000"]
CHILD = """
import contextlib, io, json, sys
from ma_cluster.cli import main
for arguments in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main(arguments)
        except SystemExit as left:
            status = left.code
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""


@pytest.fixture(scope="module")
def web_server() -> Iterator[str]:
    """The port of one."""
    command = [sys.executable, "-u", "-m", "http.server", "--bind", "127.0.0.1", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        yield re.findall(r"port (\d+)", server.stdout.readline())[0]
        server.terminate()


def test_what_cannot_be_had_is_refused_in_a_line_before_anything_is_begun(
    eyes: str, tiny_bundle: Path, tmp_path: Path, web_server: str
) -> None:
    """All in one process, since the imports take longer than the answer."""
    dest = tmp_path / "dest"
    cases = [
        (["score", eyes, str(dest), "--model", "MODEL", *options], status, text) for options, status, text in REFUSED
    ]
    cases += [(others, 2, "needs 1000 GPU in all, .+ here: lower --gpus") for others in (TRAIN, EVALUATE)]
    given = {"WEB": web_server, "MODEL": str(tiny_bundle)}
    asked = [[re.sub("WEB|MODEL", lambda name: given[name[0]], word) for word in case[0]] for case in cases]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    began = time.monotonic()
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert time.monotonic() - began < 60, "some 5 s on cores that nobody else uses"
    assert child.stderr == ""
    for (options, expected, text), line in zip(cases, child.stdout.splitlines(), strict=True):
        status, out, err = json.loads(line)
        assert (status, out, err.count("\n")) == (expected, "", 1), (options, err)
        assert re.search(text, err), err
    assert not dest.exists()


@pytest.mark.slow
def test_a_process_tied_to_one_core_scores_and_says_what_it_is_about(
    eyes: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nfrom ma_cluster.cli import main; main()"
    command = [sys.executable, "-c", code, "score", eyes, str(tmp_path), "--model", str(tiny_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[:4] == ["listing the photographs", "starting Ray", "loading the model", "scoring"]
    assert "core_worker" not in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_worker_that_dies_time_and_again_ends_the_run(eyes: str, tmp_path: Path) -> None:
    source, dest = LocalStore(Path(eyes)), LocalStore(tmp_path)
    run = begin_run(source, dest, "model", "config")
    with pytest.raises(FleetBrokenError, match="a worker process of the run died more than"):
        score_shards(pending(dest, run), WorkerSpec(partial(os._exit, 1), dest.url, dest.url, run, 1), 1)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_who_joins_a_fleet_goes_by_that_ones_deadlines(eyes: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """Segmenters that have no time for a photograph: late, not crashed, though the driver would have given an hour."""
    warm = Fleet(segmenters=1, segment_deadline_s=0.02, sandbox=SandboxConfig(children=1))
    model = model_of(str(tiny_bundle), load_bundle(tiny_bundle))
    app = ScoringApp.deploy("ma-cluster-warm", None, model, warm)
    try:
        wanted = Fleet(name="ma-cluster-warm", operating_point="sensitive")
        assert ScoringApp.join(eyes, model, wanted).fleet == replace(warm, operating_point="sensitive")
        with pytest.raises(UsageError, match="another model or decoder"):
            ScoringApp.join(eyes, model, replace(wanted, sandbox=SandboxConfig(decoder="decoders:decode")))
        summary = score_archive(eyes, str(tmp_path), Fleet(name="ma-cluster-warm"), model=str(tiny_bundle))
    finally:
        app.delete()
    assert summary.counts.reasons == {"timeout": 2}
    assert {row["attempts"] for row in rows(LocalStore(tmp_path)).values()} == {2}


@pytest.fixture(scope="module")
def small_head() -> Iterator[Head]:
    with running_head(cpus=1) as head:
        yield head


@pytest.mark.long
def test_a_cluster_without_room_is_waited_for_and_said_so_until_it_ends_or_a_node_comes(
    small_head: Head, eyes: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    head, log, dest = small_head, tmp_path / "log.txt", tmp_path / "dest"
    command = [*COMMAND, eyes, str(dest), "--model", str(tiny_bundle), "--address", head.gcs, "--threads", "3"]

    def begun() -> subprocess.Popen[bytes]:
        with log.open("wb") as lines:
            run = subprocess.Popen(command, stdout=lines, stderr=lines, env=dict(head.environment))
        wait_for(lambda: run.poll() is not None or '{"CPU": 3' in log.read_text(), 120)
        assert run.poll() is None, log.read_text()
        assert "waiting: Segmenter is UPDATING" in log.read_text()
        return run

    run = begun()
    left = descendants(run.pid)
    run.terminate()
    assert run.wait(timeout=60) == 143
    assert "Traceback" not in log.read_text()
    assert wait_until_gone(left, 30) == []
    run = begun()
    node = [RAY, "start", f"--address={head.gcs}", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=4"]
    node += ["--dashboard-agent-listen-port=0", "--object-store-memory=209715200"]
    with ray_process(node, head.environment, head.folder / "node.log"):
        assert run.wait(timeout=180) == 0, log.read_text()
    assert {row["status"] for row in rows(LocalStore(dest)).values()} == {"scored"}
