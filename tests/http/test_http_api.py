"""The HTTP service's routes on a real server, with a service behind them that knows a handful of bodies."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ma_cluster.errors import (
    ImageFailedError,
    ImageRefusedError,
    ObjectMissingError,
    Reason,
    RequestFault,
    RunConflictError,
    StoreError,
    UsageError,
    WorkerLostError,
)
from ma_cluster.http.api import Answer, HttpLimits, create_api

TOKEN = "a token of the tests"
LIMITS = HttpLimits(max_body_bytes=1000, body_deadline_s=0.5, waiting=2)
ROUTES = [
    ("POST", "/v1/segment"),
    ("POST", "/v1/archives"),
    ("GET", "/v1/archives"),
    ("GET", "/v1/archives/abd"),
    ("DELETE", "/v1/archives/abd"),
    ("GET", "/metrics"),
    ("GET", "/healthz"),
]
REASONS = {
    b"text": (ImageRefusedError(Reason.NOT_AN_IMAGE, "no known format"), 415),
    b"film": (ImageRefusedError(Reason.UNSUPPORTED, "many frames"), 415),
    b"vast": (ImageRefusedError(Reason.TOO_LARGE, "more pixels than the limit"), 413),
    b"half": (ImageRefusedError(Reason.TRUNCATED, "the file ends too soon"), 422),
    b"dark": (ImageRefusedError(Reason.NO_FOV, "no bright disc"), 422),
    b"bomb": (ImageFailedError(Reason.CRASHED_WORKER, "the decoder died"), 422),
    b"lost": (WorkerLostError(Reason.CRASHED_WORKER, "the replica died"), 503),
    b"late": (WorkerLostError(Reason.TIMEOUT, "not segmented in time"), 503),
    b"wild": (ImageFailedError(Reason.NOT_FINITE, "values that are no numbers"), 503),
    b"flaw": (RuntimeError("nobody foresaw this"), 503),
}


@dataclass
class Known:
    """A service that knows the bodies of `REASONS`, waits at `gate` for b"wait", and scores all others."""

    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    up: bool = True
    error: Exception | None = None

    def segment(self, data: bytes) -> Answer:
        if data in REASONS:
            raise REASONS[data][0]
        if data == b"wait":
            self.entered.release()
            assert self.gate.wait(20)
        return Answer({"status": "scored", "lesions": [], "bytes": len(data)}, b"a mask", b"an overlay")

    def ready(self) -> bool:
        return self.up

    def request_archive(self, source: str, destination: str) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return {"id": "abc", "source": source, "destination": destination}

    def archives(self) -> list[dict[str, Any]]:
        return [{"id": "abc"}]

    def archive(self, job_id: str) -> dict[str, Any]:
        if job_id != "abc":
            raise ObjectMissingError("there is no such job")
        return {"id": job_id}

    def cancel_archive(self, job_id: str) -> dict[str, Any]:
        return self.archive(job_id) | {"state": "cancelled"}

    def metrics(self) -> bytes:
        return b"ma_archive_remaining 3\n"


@dataclass(frozen=True)
class Server:
    port: int
    service: Known

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, body (as values where it is JSON) and headers of an answer."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            data, kept = answer.read(), {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, json.loads(data) if kept.get("content-type") == "application/json" else data, kept


@contextmanager
def served(limits: HttpLimits) -> Iterator[Server]:
    service = Known()
    with closing(socket.socket()) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()  # a client that comes before the server waits
        server = uvicorn.Server(uvicorn.Config(create_api(service, limits), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Server(listening.getsockname()[1], service)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def open_server() -> Iterator[Server]:
    with served(LIMITS) as server:
        yield server


def test_a_photograph_is_answered_as_json_mask_or_overlay(open_server: Server) -> None:
    assert open_server.ask("POST", "/v1/segment", b"eye")[:2] == (
        200,
        {"status": "scored", "lesions": [], "bytes": 3},
    )
    assert open_server.ask("POST", "/v1/segment", b"eye", Accept="image/png")[1] == b"a mask"
    assert open_server.ask("POST", "/v1/segment", b"eye", Accept="image/jpeg")[1] == b"an overlay"


@pytest.mark.parametrize("body", REASONS, ids=bytes.decode)
def test_each_reason_has_its_status(open_server: Server, body: bytes) -> None:
    error, status = REASONS[body]
    answered, problem, headers = open_server.ask("POST", "/v1/segment", body)
    assert answered == status
    assert problem["reason"] == getattr(error, "reason", "unavailable")
    assert ("retry-after" in headers) == (status == 503)
    assert "foresaw" not in problem["detail"]


def test_no_more_of_a_body_is_read_than_the_limit(open_server: Server) -> None:
    assert open_server.ask("POST", "/v1/segment", b"x" * 1000)[0] == 200
    assert open_server.ask("POST", "/v1/segment", b"x" * 1001)[:2] == (
        413,
        {"reason": "too_large", "detail": "the limit is 1000 bytes"},
    )
    with closing(socket.create_connection(("127.0.0.1", open_server.port), timeout=10)) as client:
        client.sendall(b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        client.sendall(b"258\r\n" + b"x" * 600 + b"\r\n" + b"258\r\n" + b"x" * 600 + b"\r\n")  # and no end
        assert client.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_arrive_is_not_waited_for(open_server: Server) -> None:
    began = time.monotonic()
    with closing(socket.create_connection(("127.0.0.1", open_server.port), timeout=10)) as client:
        client.sendall(b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nslow")
        assert client.recv(100).startswith(b"HTTP/1.1 400")
    assert time.monotonic() - began < 5


def test_an_empty_body_is_a_bad_request(open_server: Server) -> None:
    assert open_server.ask("POST", "/v1/segment", b"")[0] == 400


def test_more_photographs_than_fit_are_told_to_come_again() -> None:
    with served(LIMITS) as server:
        waiting = [threading.Thread(target=server.ask, args=("POST", "/v1/segment", b"wait")) for _ in range(2)]
        for thread in waiting:
            thread.start()
            assert server.service.entered.acquire(timeout=10)
        status, problem, headers = server.ask("POST", "/v1/segment", b"eye")
        assert (status, problem["reason"]) == (429, "busy")
        assert int(headers["retry-after"]) > 0
        assert server.ask("GET", "/healthz")[0] == 200
        server.service.gate.set()
        for thread in waiting:
            thread.join()
        assert server.ask("POST", "/v1/segment", b"eye")[0] == 200


def test_archives_are_asked_for_listed_looked_at_and_cancelled(open_server: Server) -> None:
    wanted = json.dumps({"source": "s3://a/b", "destination": "s3://c/d"}).encode()
    status, job, _ = open_server.ask("POST", "/v1/archives", wanted, content_type="application/json")
    assert (status, job["id"]) == (202, "abc")
    assert open_server.ask("GET", "/v1/archives")[1] == {"archives": [{"id": "abc"}]}
    assert open_server.ask("GET", "/v1/archives/abc")[:2] == (200, {"id": "abc"})
    assert open_server.ask("DELETE", "/v1/archives/abc")[1]["state"] == "cancelled"
    assert open_server.ask("GET", "/v1/archives/abd")[:2] == (
        404,
        {"reason": "not_found", "detail": "there is no such job"},
    )


def test_a_request_that_is_not_understood_is_answered_without_what_was_sent(open_server: Server) -> None:
    for body in (b"{}", b"not json", b'{"source": "patient 12", "destination": 3}', b"[]"):
        status, problem, _ = open_server.ask("POST", "/v1/archives", body, content_type="application/json")
        assert (status, problem["reason"]) == (422, "invalid")
        assert "patient" not in problem["detail"]
    assert open_server.ask("GET", "/v2/segment")[1]["reason"] == "not_found"
    assert open_server.ask("GET", "/v1/segment")[0] == 405


def test_what_the_stores_say_of_an_archive_has_its_status() -> None:
    cases: list[tuple[Exception, int, str]] = [
        (UsageError("no such scheme"), 422, "invalid"),
        (RunConflictError("another run"), 422, "invalid"),
        (StoreError("no answer"), 503, "store_error"),
    ]
    wanted = json.dumps({"source": "a", "destination": "b"}).encode()
    with served(LIMITS) as server:
        for error, status, reason in cases:
            server.service.error = error
            answered, problem, _ = server.ask("POST", "/v1/archives", wanted, content_type="application/json")
            assert (answered, problem) == (status, {"reason": reason, "detail": str(error)})


def test_everything_but_root_and_health_asks_for_the_token() -> None:
    limits = HttpLimits(token_sha256=hashlib.sha256(TOKEN.encode()).hexdigest())
    asked = {
        ("POST", "/v1/segment"): 200,
        ("POST", "/v1/archives"): 422,
        ("GET", "/v1/archives"): 200,
        ("GET", "/v1/archives/abc"): 200,
        ("DELETE", "/v1/archives/abc"): 200,
        ("GET", "/metrics"): 200,
    }
    with served(limits) as server:
        for (method, path), status in asked.items():
            for headers in ({}, {"Authorization": "Bearer another"}, {"Authorization": "Basic YTpi"}):
                answered, problem, kept = server.ask(method, path, b"eye", **headers)
                assert (answered, problem["reason"], kept["www-authenticate"]) == (401, "unauthorized", "Bearer")
            assert server.ask(method, path, b"eye", Authorization=f"Bearer {TOKEN}")[0] == status
        assert server.ask("GET", "/")[0] == server.ask("GET", "/healthz")[0] == 200


def test_health_is_that_of_the_fleet() -> None:
    with served(LIMITS) as server:
        server.service.up = False
        assert server.ask("GET", "/healthz")[:2] == (
            503,
            {"reason": "unavailable", "detail": "the fleet is not up"},
        )


def test_the_root_says_that_this_is_research_software(open_server: Server) -> None:
    assert "not a medical device" in open_server.ask("GET", "/")[1]["notice"]


def test_the_document_describes_each_route_and_its_errors(open_server: Server) -> None:
    document = open_server.ask("GET", "/openapi.json")[1]
    segment = document["paths"]["/v1/segment"]["post"]
    assert set(segment["responses"]) >= {"200", "400", "401", "413", "415", "422", "429", "503"}
    assert segment["requestBody"]["content"]["application/octet-stream"]["schema"]["format"] == "binary"
    reasons = document["components"]["schemas"]["Problem"]["properties"]["reason"]["anyOf"]
    assert len(reasons) == 2


KINDS = st.sampled_from(
    ["application/json", "application/octet-stream", "image/jpeg", "text/html", "multipart/form-data"]
)
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=4)
OBJECTS = st.dictionaries(st.sampled_from(["source", "destination", "more"]), VALUES)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(route=st.sampled_from(ROUTES), body=st.binary(max_size=1200) | OBJECTS, kind=KINDS)
def test_whatever_is_sent_is_answered_as_the_document_says(
    open_server: Server, route: tuple[str, str], body: bytes | dict[str, Any], kind: str
) -> None:
    method, path = route
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, answer, headers = open_server.ask(method, path, data, content_type=kind)
    document = open_server.ask("GET", "/openapi.json")[1]
    assert str(status) in document["paths"][path.replace("abd", "{job_id}")][method.lower()]["responses"]
    if status >= 400:
        assert headers["content-type"] == "application/json"
        assert answer.keys() == {"reason", "detail"}
        assert answer["reason"] in {*Reason, *RequestFault}
