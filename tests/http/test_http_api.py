"""The HTTP service's routes on a real server, with a service behind them that knows a handful of bodies."""

from __future__ import annotations

import itertools
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from known_service import GUARDED, LIMITS, REASONS, TOKEN, Server, served

from ma_cluster.errors import Reason, RequestFault, RunConflictError, StoreError, UsageError

ROUTES = [
    ("POST", "/v1/segment"),
    ("POST", "/v1/archives"),
    ("GET", "/v1/archives"),
    ("GET", "/v1/archives/abd"),
    ("DELETE", "/v1/archives/abd"),
    ("GET", "/metrics"),
    ("GET", "/healthz"),
]


@pytest.fixture(scope="module")
def open_server() -> Iterator[Server]:
    with served(LIMITS) as server:
        yield server


ASSUMED = {"operating_point": "default", "field": {"degrees": 0.0, "no_surround": False}}
ASKED = {"operating_point": "sensitive", "field": {"degrees": 45.0, "no_surround": True}}


def test_a_photograph_is_answered_as_json_mask_or_overlay(open_server: Server) -> None:
    assert open_server.ask("POST", "/v1/segment", b"eye")[:2] == (
        200,
        {"status": "scored", "lesions": [], "bytes": 3, "asked": ASSUMED},
    )
    assert open_server.ask("POST", "/v1/segment", b"eye", Accept="image/png")[1] == b"a mask"
    assert open_server.ask("POST", "/v1/segment", b"eye", Accept="image/jpeg")[1] == b"an overlay"


def test_what_is_known_of_a_photograph_or_an_archive_comes_with_the_request(open_server: Server) -> None:
    query = "operating_point=sensitive&field_degrees=45&no_surround=true"
    assert open_server.ask("POST", f"/v1/segment?{query}", b"eye")[1]["asked"] == ASKED
    for fault in ("operating_point=bold", "field_degrees=5", "field_degrees=nan", "field_degrees=x", "no_surround=1"):
        status, problem, _ = open_server.ask("POST", f"/v1/segment?{fault}", b"eye")
        assert (status, problem["reason"]) == (422, "invalid"), fault

    def ask(**options: object) -> tuple[int, Any]:
        body = json.dumps({"source": "a", "destination": "b"} | options).encode()
        return open_server.ask("POST", "/v1/archives", body, content_type="application/json")[:2]

    assert ask()[1]["asked"] == ASSUMED
    assert ask(operating_point="sensitive", field_degrees=45, no_surround=True)[1]["asked"] == ASKED
    for fault in ({"field_degrees": "45"}, {"field_degrees": 400}, {"no_surround": True}, {"no_surround": "yes"}):
        assert ask(**fault)[0] == 422, fault


@pytest.mark.parametrize("body", REASONS, ids=bytes.decode)
def test_each_reason_has_its_status(open_server: Server, body: bytes) -> None:
    error, status = REASONS[body]
    answered, problem, headers = open_server.ask("POST", "/v1/segment", body)
    assert answered == status
    assert problem["reason"] == getattr(error, "reason", "unavailable")
    assert ("retry-after" in headers) == (status == 503)
    assert "foresaw" not in problem["detail"]


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


def test_however_many_arrive_at_once_no_more_than_fit_are_taken_and_a_place_is_kept_until_its_answer() -> None:
    with served(LIMITS) as server, ThreadPoolExecutor(12) as clients:
        asked = [clients.submit(server.ask, "POST", "/v1/segment", b"wait") for _ in range(12)]
        refused = [each.result() for each in itertools.islice(as_completed(asked), 10)]
        assert {status for status, _, _ in refused} == {429}
        server.service.gate.set()
        assert sorted(each.result()[0] for each in asked) == [200] * 2 + [429] * 10
        server.service.gate.clear()
        server.service.entered = threading.Semaphore(0)
        for _ in range(2):
            left = socket.create_connection(("127.0.0.1", server.port))
            left.sendall(b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nwait")
            assert server.service.entered.acquire(timeout=10)
            left.close()
        assert server.ask("POST", "/v1/segment", b"eye")[0] == 429
        server.service.gate.set()


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
    for body in (b"{}", b"not json", b'{"source": "patient 12", "destination": 3}', b'{"patient 12": 1}', b"[]"):
        status, problem, _ = open_server.ask("POST", "/v1/archives", body, content_type="application/json")
        assert (status, problem["reason"]) == (422, "invalid")
        assert "patient" not in problem["detail"]
    assert open_server.ask("GET", "/v2/segment")[1]["reason"] == "not_found"
    assert open_server.ask("GET", "/v1/segment")[0] == 405


def test_what_the_stores_say_of_an_archive_has_its_status() -> None:
    cases: list[tuple[Exception, int, str]] = [
        (UsageError("no such scheme"), 422, "invalid"),
        (RunConflictError("another run"), 409, "conflict"),
        (StoreError("no answer"), 503, "store_error"),
    ]
    wanted = json.dumps({"source": "a", "destination": "b"}).encode()
    with served(LIMITS) as server:
        for error, status, reason in cases:
            server.service.error = error
            answered, problem, _ = server.ask("POST", "/v1/archives", wanted, content_type="application/json")
            assert (answered, problem) == (status, {"reason": reason, "detail": str(error)})


def test_everything_but_root_and_health_asks_for_the_token() -> None:
    asked = {
        ("POST", "/v1/segment"): 200,
        ("POST", "/v1/archives"): 415,
        ("GET", "/v1/archives"): 200,
        ("GET", "/v1/archives/abc"): 200,
        ("DELETE", "/v1/archives/abc"): 200,
        ("GET", "/metrics"): 200,
    }
    with served(GUARDED) as server:
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
    operations = {operation["operationId"] for path in document["paths"].values() for operation in path.values()}
    links = document["paths"]["/v1/archives"]["post"]["responses"]["202"]["links"].values()
    assert {link["operationId"] for link in links} <= operations
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
