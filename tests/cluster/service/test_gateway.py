"""The HTTP service as its users have it: `ma-cluster serve` in a process of its own, real Ray, real S3, and faults."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archive_runs import rows
from dicom_files import dicom_file
from PIL import Image
from processes import Process, descendants, kill, wait_until_gone
from servers import Weed, free_ports

from ma_cluster.cluster.service.gateway import ServiceArguments
from ma_cluster.config import ImageConfig
from ma_cluster.errors import UsageError
from ma_cluster.images.decode import decode
from ma_cluster.lesions.detector import Detector
from ma_cluster.storage.store import open_store

PHOTOGRAPHS = 16
COMMAND = [sys.executable, "-m", "ma_cluster", "serve"]


@dataclass(frozen=True, slots=True)
class Served:
    """A service that is up."""

    process: subprocess.Popen[str]
    port: int

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, named, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def values(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        data = json.dumps(body).encode() if body else None
        status, answer = self.ask(method, path, data, content_type="application/json")
        assert status in (200, 202), answer
        values: dict[str, Any] = json.loads(answer)
        return values

    def replicas(self, kind: str) -> list[Process]:
        prefix = f"ray::ServeReplica:ma-cluster-{kind}"
        return [process for process in descendants(self.process.pid) if process.title.startswith(prefix)]


@contextmanager
def serving(bundle: Path, state: str) -> Iterator[Served]:
    """`ma-cluster serve` from its first line to SIGTERM, which it must heed."""
    (port,) = free_ports(1)
    options = ["--model", str(bundle), "--state", state, "--port", str(port), "--replicas", "1"]
    process = subprocess.Popen([*COMMAND, *options], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert f"listening on http://127.0.0.1:{port}" in process.stdout.readline()
        yield Served(process, port)
        left = descendants(process.pid)
        process.terminate()
        assert process.wait(timeout=90) == 143
        assert wait_until_gone(left, 30) == []
    finally:
        kill(descendants(process.pid))
        process.kill()
        process.communicate()


def wait_for(what: Callable[[], Any], timeout_s: float = 300) -> Any:
    """What becomes true."""
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def eye(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A real photograph, small."""
    from ma_cluster.images.sample import retina

    path = tmp_path_factory.mktemp("eye") / "eye.jpg"
    Image.fromarray(retina()).resize((400, 400)).save(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def archive(weed: Weed, eye: bytes) -> str:
    """Many photographs and a text, in a bucket."""
    source = open_store(weed.bucket("gateway-source"))
    for number in range(PHOTOGRAPHS - 1):
        source.put(f"eye {number:02d}.jpg", eye)
    source.put("page.jpg", b"<html>closed</html>")
    return source.url


@pytest.fixture(scope="module")
def state(weed: Weed) -> str:
    return weed.bucket("gateway-state")


@pytest.fixture(scope="module")
def service(tiny_bundle: Path, state: str) -> Iterator[Served]:
    with serving(tiny_bundle, state) as served:
        yield served


def finished(service: Served, job: str) -> Callable[[], bool]:
    return lambda: service.values("GET", f"/v1/archives/{job}")["state"] == "finished"


def test_a_photograph_is_answered_as_detect_answers_it(service: Served, eye: bytes, tiny_bundle: Path) -> None:
    detection = Detector.load(tiny_bundle).detect(eye)
    status, answer = service.ask("POST", "/v1/segment", eye)
    values = json.loads(answer)
    assert (status, values["height"], values["width"]) == (200, 400, 400)
    found = [(lesion["row"], lesion["col"], lesion["area_px"]) for lesion in values["lesions"]]
    assert found == [(lesion.row, lesion.col, lesion.area_px) for lesion in detection.lesions]
    assert {"fetch", "hgn", "decode"} - values["seconds"].keys() == {"fetch"}
    assert service.ask("POST", "/v1/segment", eye, Accept="image/png")[1].startswith(b"\x89PNG")
    assert service.ask("POST", "/v1/segment", b"<html>")[0] == 415


def test_clients_that_leave_take_no_replica_with_them(service: Served, eye: bytes) -> None:
    def replicas() -> list[int]:
        return [replica.pid for kind in ("segmenter", "reader") for replica in service.replicas(kind)]

    before = replicas()
    head = f"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(eye)}\r\n\r\n".encode()
    for seconds in np.linspace(0.0, 0.5, 8):
        with closing(socket.create_connection(("127.0.0.1", service.port))) as client:
            client.sendall(head + eye)
            time.sleep(seconds)
    assert service.ask("POST", "/v1/segment", eye)[0] == 200
    assert replicas() == before


def test_a_dicom_file_is_answered_with_what_its_header_tells_but_who_it_is(service: Served, eye: bytes) -> None:
    data = dicom_file(decode(eye, ImageConfig()).pixels, "jpeg-ls", 7)
    status, answer = service.ask("POST", "/v1/segment", data)
    values = json.loads(answer)
    assert (status, values["eye"], values["eye_source"], values["fov"]["degrees"]) == (200, "R", "dicom", 45.0)
    assert values["patient"] is None and b"patient-7" not in answer


def test_photographs_are_read_as_they_are_asked_for(service: Served, archive: str, weed: Weed, eye: bytes) -> None:
    known = json.loads(service.ask("POST", "/v1/segment?field_degrees=30&operating_point=sensitive", eye)[1])
    assert (known["fov"]["degrees"], "field_assumed" in known["flags"]) == (30, False)
    dest = weed.bucket("gateway-asked")
    options = {"operating_point": "sensitive", "field_degrees": 30.0}
    job = service.values("POST", "/v1/archives", source=archive, destination=dest, **options)
    assert options.items() <= job.items()
    wait_for(finished(service, job["id"]))
    row = rows(open_store(dest))["eye 00.jpg"]
    assert (row["fov_degrees"], row["lesion_count"]) == (30, len(known["lesions"]))
    plain = json.dumps({"source": archive, "destination": dest}).encode()
    assert service.ask("POST", "/v1/archives", plain, content_type="application/json")[0] == 409


def test_an_archive_is_scored_and_told_of(service: Served, archive: str, weed: Weed) -> None:
    dest = weed.bucket("gateway-whole")
    job = service.values("POST", "/v1/archives", source=archive, destination=dest)
    assert service.values("POST", "/v1/archives", source=archive, destination=dest)["id"] == job["id"]
    wait_for(finished(service, job["id"]))
    known = service.values("GET", f"/v1/archives/{job['id']}")
    assert known["status"]["statuses"] == {"refused": 1, "scored": PHOTOGRAPHS - 1}
    assert known["status"]["reasons"] == {"not_an_image": 1}
    assert len(rows(open_store(dest))) == PHOTOGRAPHS
    assert "scored" in known["log"]
    other = json.dumps({"source": archive + "/eye", "destination": dest}).encode()
    assert service.ask("POST", "/v1/archives", other, content_type="application/json")[0] == 409
    run, text = known["status"]["run"], service.ask("GET", "/metrics")[1].decode()
    assert f'ma_archive_images{{run="{run}",status="scored"}} {PHOTOGRAPHS - 1}.0' in text
    assert f'ma_archive_remaining{{run="{run}"}} 0.0' in text
    assert "eye" not in text


def test_what_cannot_be_scored_says_why(service: Served, tmp_path: Path) -> None:
    source = tmp_path / "not there"
    job = service.values("POST", "/v1/archives", source=str(source), destination=str(tmp_path / "dest"))
    failed = wait_for(
        lambda: (known := service.values("GET", f"/v1/archives/{job['id']}"))["state"] == "failed" and known
    )
    assert "does not exist" in failed["error"]


@pytest.mark.slow
def test_a_cancelled_archive_ends_and_goes_on_when_it_is_asked_for_again(
    service: Served, archive: str, weed: Weed
) -> None:
    dest = weed.bucket("gateway-cancelled")
    job = service.values("POST", "/v1/archives", source=archive, destination=dest)["id"]
    wait_for(lambda: service.values("GET", f"/v1/archives/{job}")["state"] == "running")
    service.values("DELETE", f"/v1/archives/{job}")
    wait_for(lambda: service.values("GET", f"/v1/archives/{job}")["state"] == "cancelled")
    assert service.ask("GET", "/healthz")[0] == 200
    service.values("POST", "/v1/archives", source=archive, destination=dest)
    wait_for(finished(service, job))
    assert len(rows(open_store(dest))) == PHOTOGRAPHS


@pytest.mark.slow
def test_a_killed_segmenter_costs_only_the_photographs_in_it(service: Served, eye: bytes) -> None:
    """Those that were not in it wait for the next replica."""
    with ThreadPoolExecutor(4) as clients:
        asked = [clients.submit(service.ask, "POST", "/v1/segment", eye) for _ in range(40)]
        wait_for(lambda: sum(answer.done() for answer in asked) >= 5)
        kill(service.replicas("segmenter"))
        statuses = [answer.result()[0] for answer in asked]
    assert statuses.count(200) >= len(asked) - 1
    assert set(statuses) <= {200, 503}
    assert service.ask("POST", "/v1/segment", eye)[0] == 200


@pytest.mark.slow
def test_an_archive_does_not_miss_a_killed_gateway(service: Served, archive: str, weed: Weed) -> None:
    dest = weed.bucket("gateway-killed")
    job = service.values("POST", "/v1/archives", source=archive, destination=dest)["id"]
    wait_for(lambda: service.values("GET", f"/v1/archives/{job}")["state"] == "running")
    kill(service.replicas("gateway"))
    wait_for(lambda: service.ask("GET", "/healthz")[0] == 200)
    wait_for(finished(service, job))
    assert len(rows(open_store(dest))) == PHOTOGRAPHS


@pytest.mark.long
def test_the_next_service_finishes_what_the_last_one_left(tiny_bundle: Path, archive: str, weed: Weed) -> None:
    state, dest = weed.bucket("gateway-next"), weed.bucket("gateway-left")
    with serving(tiny_bundle, state) as first:
        job = first.values("POST", "/v1/archives", source=archive, destination=dest)["id"]
        wait_for(lambda: first.values("GET", f"/v1/archives/{job}")["state"] == "running")
    with serving(tiny_bundle, state) as second:
        wait_for(finished(second, job))
    assert len(rows(open_store(dest))) == PHOTOGRAPHS


def test_a_header_without_end_ends_its_connection(service: Served) -> None:
    with closing(socket.create_connection(("127.0.0.1", service.port), timeout=30)) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nX-A: ")
        with pytest.raises(OSError):
            for _ in range(100):
                client.sendall(b"a" * 2**20)
    assert service.ask("GET", "/healthz")[0] == 200


def test_slow_bodies_under_serve_stop_neither_health_nor_photographs(service: Served, eye: bytes) -> None:
    head = b"POST /v1/%s HTTP/1.1\r\nHost: localhost\r\nContent-Type: %s\r\nContent-Length: 100\r\n\r\nx"
    with ExitStack() as clients:
        for number in range(260):
            kind = (b"archives", b"application/json") if number % 2 else (b"segment", b"image/jpeg")
            client = clients.enter_context(closing(socket.create_connection(("127.0.0.1", service.port))))
            client.sendall(head % kind)
        for _ in range(5):
            began = time.monotonic()
            assert service.ask("GET", "/healthz")[0] == 200
            assert time.monotonic() - began < 10
    wait_for(lambda: service.ask("POST", "/v1/segment", eye)[0] == 200, 60)


@pytest.mark.parametrize(("by", "host"), [("SO_REUSEPORT", "127.0.0.1"), ("SO_REUSEADDR", "localhost")])
def test_a_port_in_use_is_not_shared(tmp_path: Path, by: str, host: str) -> None:
    with closing(socket.socket()) as listening:
        listening.setsockopt(socket.SOL_SOCKET, getattr(socket, by), 1)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        options = ["--host", host, "--port", str(port), "--state", str(tmp_path)]
        done = subprocess.run([*COMMAND, *options], capture_output=True, text=True)
    in_use = f"ma-cluster: port {port} of {host} is in use: end what listens there, or give another --port\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", in_use)


def test_beyond_loopback_nothing_is_served_without_a_token(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MA_CLUSTER_TOKEN"}
    done = subprocess.run(
        [*COMMAND, "--host", "0.0.0.0", "--state", str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "MA_CLUSTER_TOKEN" in done.stderr


@pytest.mark.parametrize(
    "token", ["", "short", "sixteen letters and spaces", "with-the-files-line-end\n", "eine-längere-losung"]
)
def test_a_token_that_lets_everybody_in_or_nobody_is_refused(token: str, tmp_path: Path) -> None:
    """No header can carry the last three as they are; `Bearer` alone would carry the first."""
    done = subprocess.run(
        [*COMMAND, "--state", str(tmp_path)],
        env=os.environ | {"MA_CLUSTER_TOKEN": token},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ma-cluster: MA_CLUSTER_TOKEN must be 16 visible ASCII characters or more")
    with pytest.MonkeyPatch.context() as patched, pytest.raises(UsageError, match="MA_CLUSTER_TOKEN"):
        patched.setenv("MA_CLUSTER_TOKEN", token)
        ServiceArguments(state=str(tmp_path)).config()
