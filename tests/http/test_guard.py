"""What reaches the service: strangers, floods and slow clients against a real server."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
from known_service import GUARDED, LIMITS, TOKEN, Server, served

from ma_cluster.http import connection
from ma_cluster.http.guard import HttpLimits

BEARER = {"Authorization": f"Bearer {TOKEN}"}
MIB = 2**20


@pytest.fixture(scope="module")
def open_server() -> Iterator[Server]:
    with served(LIMITS) as server:
        yield server


@pytest.fixture(scope="module")
def guarded() -> Iterator[Server]:
    with served(GUARDED) as server:
        yield server


def head(path: str, *headers: str) -> bytes:
    """The beginning of a POST, its headers whole."""
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


def begun(server: Server, data: bytes) -> socket.socket:
    """A connection on which so much was sent, and nothing more comes."""
    client = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    client.sendall(data)
    return client


def answer(server: Server, data: bytes) -> tuple[int, str]:
    """Status and reason of the answer to a request of which only the beginning is sent."""
    with closing(begun(server, data)) as client:
        status, body = told(client)
    return status, json.loads(body)["reason"]


def told(client: socket.socket) -> tuple[int, bytes]:
    """Status and body of the next answer, whose head and body may come apart."""
    response = http.client.HTTPResponse(client)
    response.begin()
    return response.status, response.read()


JSON = "Content-Type: application/json"
ONE = "Content-Length: 100"


@pytest.mark.parametrize(
    ("path", "headers", "expected"),
    [
        ("/v1/archives", (JSON, ONE), (401, "unauthorized")),
        ("/v1/segment", (ONE,), (401, "unauthorized")),
        ("/v1/other", (ONE,), (401, "unauthorized")),
        ("/v1/archives", ("Authorization: Bearer " + TOKEN, "Content-Type: text/plain", ONE), (415, "unsupported")),
        ("/v1/archives", ("Authorization: Bearer " + TOKEN, ONE), (415, "unsupported")),
        ("/v1/segment", ("Authorization: Bearer " + TOKEN, "Content-Type: text/html", ONE), (415, "unsupported")),
        ("/v1/archives", ("Authorization: Bearer " + TOKEN, JSON, f"Content-Length: {20_000}"), (413, "too_large")),
        ("/v1/segment", ("Authorization: Bearer " + TOKEN, f"Content-Length: {65 * MIB}"), (413, "too_large")),
        ("/v1/other", ("Authorization: Bearer " + TOKEN, f"Content-Length: {20_000}"), (413, "too_large")),
        ("/v1/segment", ("Authorization: Bearer " + TOKEN, "Content-Encoding: gzip", ONE), (415, "unsupported")),
        ("/v1/archives", ("Authorization: Bearer " + TOKEN, JSON, "Content-Encoding: br", ONE), (415, "unsupported")),
        ("/v1/archives", ("Authorization: Bearer " + TOKEN, JSON, ONE, "Origin: http://a.example"), (403, "forbidden")),
    ],
)
def test_what_the_headers_tell_is_answered_before_any_of_the_body_has_come(
    guarded: Server, path: str, headers: tuple[str, ...], expected: tuple[int, str]
) -> None:
    assert answer(guarded, head(path, *headers)) == expected


@pytest.mark.parametrize("more", [(), ("Authorization: Bearer " + TOKEN,)])
def test_a_flood_of_json_is_not_kept(guarded: Server, more: tuple[str, ...]) -> None:
    server, before = guarded, resident_bytes()
    chunk = b"%x\r\n" % MIB + b" " * MIB + b"\r\n"
    with closing(begun(server, head("/v1/archives", JSON, "Transfer-Encoding: chunked", *more))) as client:
        try:
            for _ in range(200):
                client.sendall(chunk)
        except OSError:  # refused and closed
            pass
    assert server.ask("GET", "/healthz")[0] == 200
    assert resident_bytes() - before < 50 * MIB


def resident_bytes() -> int:
    """Of this process, which holds the server, too."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_no_more_of_a_body_is_read_than_the_limit(open_server: Server) -> None:
    assert open_server.ask("POST", "/v1/segment", b"x" * 1000)[0] == 200
    assert open_server.ask("POST", "/v1/segment", b"x" * 1001)[:2] == (
        413,
        {"reason": "too_large", "detail": "the limit is 1000 bytes"},
    )
    chunks = b"258\r\n" + b"x" * 600 + b"\r\n" + b"258\r\n" + b"x" * 600 + b"\r\n"  # and no end
    assert answer(open_server, head("/v1/segment", "Transfer-Encoding: chunked") + chunks) == (413, "too_large")


@pytest.mark.parametrize("headers", [("/v1/segment", ONE), ("/v1/archives", JSON, ONE), ("/v1/other", ONE)])
def test_a_body_that_does_not_arrive_is_not_waited_for(open_server: Server, headers: tuple[str, ...]) -> None:
    began = time.monotonic()
    assert answer(open_server, head(*headers) + b"slow") == (400, "bad_request")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("headers", [("/v1/segment", ONE), ("/v1/archives", JSON, ONE)])
def test_slow_bodies_stop_neither_health_nor_lists_nor_quick_bodies(headers: tuple[str, ...]) -> None:
    with served(HttpLimits(bodies=20)) as server, ExitStack() as clients:
        for _ in range(260):
            clients.enter_context(closing(begun(server, head(*headers) + b"x")))
        for path in ("/healthz", "/v1/archives"):
            began = time.monotonic()
            assert server.ask("GET", path)[0] == 200
            assert time.monotonic() - began < 2
        assert server.ask("POST", "/v1/segment", b"eye")[1]["reason"] == "busy"
        clients.close()  # as those who are patient see
        deadline = time.monotonic() + 10
        while (status := server.ask("POST", "/v1/segment", b"eye")[0]) == 429 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert status == 200


def test_slow_bodies_take_no_slot_of_the_photographs() -> None:
    with served(HttpLimits(waiting=2)) as server, ExitStack() as clients:
        for _ in range(8):
            clients.enter_context(closing(begun(server, head("/v1/segment", ONE) + b"x")))
        assert server.ask("POST", "/v1/segment", b"eye")[0] == 200


def test_bodies_that_are_arriving_share_a_limit_of_bytes() -> None:
    with served(HttpLimits(arriving_bytes=1000)) as server:
        with closing(begun(server, head("/v1/segment", "Content-Length: 900") + b"x" * 800)):
            deadline = time.monotonic() + 10
            while (status := server.ask("POST", "/v1/segment", b"x" * 300)[0]) == 200 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert status == 429
        while (status := server.ask("POST", "/v1/segment", b"x" * 300)[0]) == 429 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert status == 200


def test_stores_that_do_not_answer_stop_neither_health_nor_photographs() -> None:
    with served(HttpLimits(answer_s=3.0)) as server:
        entered, stuck = threading.Semaphore(0), threading.Event()

        def archives() -> list[dict[str, object]]:
            entered.release()
            stuck.wait(20)
            return []

        server.service.archives = archives  # type: ignore[method-assign]
        answers = ThreadPoolExecutor(60)
        asked = [answers.submit(server.ask, "GET", "/v1/archives") for _ in range(60)]
        assert all(entered.acquire(timeout=2) for _ in range(40))
        assert server.ask("GET", "/healthz")[0] == server.ask("POST", "/v1/segment", b"eye")[0] == 200
        assert not any(answer.done() for answer in asked)
        detail = "the stores, or the cluster, did not answer within 3 s"
        assert {answer.result()[0] for answer in asked} == {503}
        assert asked[0].result()[1] == {"reason": "unavailable", "detail": detail}
        stuck.set()
        answers.shutdown()


def test_more_requests_than_fit_are_told_to_come_again() -> None:
    with served(HttpLimits(requests=2)) as server, ThreadPoolExecutor(2) as answers:
        asked = [answers.submit(server.ask, "POST", "/v1/segment", b"wait") for _ in range(2)]
        assert all(server.service.entered.acquire(timeout=10) for _ in asked)
        assert server.ask("GET", "/v1/archives")[1]["reason"] == "busy"
        assert server.ask("GET", "/healthz")[0] == server.ask("GET", "/")[0] == 200
        server.service.gate.set()
        assert {answer.result()[0] for answer in asked} == {200}


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::2]", "a:b:c"])
def test_without_a_token_a_name_that_is_not_the_services_is_not_answered(open_server: Server, host: str) -> None:
    for method, path in (("GET", "/v1/archives"), ("POST", "/v1/segment"), ("GET", "/"), ("GET", "/healthz")):
        status, problem, _ = open_server.ask(method, path, None, Host=host)
        assert (status, problem["reason"]) == (403, "forbidden")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "[::1]", "here.example"])
def test_the_names_of_loopback_and_of_the_option_are_answered(host: str) -> None:
    limits = HttpLimits(hosts=HttpLimits().hosts | {"here.example"})
    with served(limits) as server:
        assert server.ask("GET", "/v1/archives", None, Host=host)[0] == 200


def test_with_a_token_any_name_is_answered(guarded: Server) -> None:
    assert guarded.ask("GET", "/v1/archives", None, Host="clinic.example", **BEARER)[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "evil", "", "http://["])
def test_a_page_from_elsewhere_changes_nothing(open_server: Server, origin: str) -> None:
    for method, path in (("POST", "/v1/archives"), ("DELETE", "/v1/archives/abc"), ("POST", "/v1/segment")):
        status, problem, _ = open_server.ask(method, path, b"{}", Origin=origin)
        assert (status, problem["reason"]) == (403, "forbidden")
    assert open_server.ask("GET", "/v1/archives", None, Origin=origin)[0] == 200


def test_a_page_of_the_service_itself_may(open_server: Server) -> None:
    own = f"http://127.0.0.1:{open_server.port}"
    assert open_server.ask("DELETE", "/v1/archives/abc", None, Origin=own)[0] == 200


def test_what_nobody_foresaw_is_told_to_come_again_on_every_route() -> None:
    with served(LIMITS) as server:

        def flawed(*_: object) -> None:
            raise ZeroDivisionError("patient 12")

        for name in ("segment", "ready", "request_archive", "archives", "archive", "cancel_archive", "metrics"):
            setattr(server.service, name, flawed)
        body = json.dumps({"source": "a", "destination": "b"}).encode()
        asked = [("POST", "/v1/segment"), ("POST", "/v1/archives"), ("GET", "/v1/archives"), ("GET", "/v1/archives/a")]
        for method, path in [*asked, ("DELETE", "/v1/archives/a"), ("GET", "/metrics"), ("GET", "/healthz")]:
            status, problem, headers = server.ask(method, path, body, content_type="application/json")
            if path == "/v1/segment":
                status, problem, headers = server.ask(method, path, body)
            assert (status, problem["reason"]) == (503, "unavailable"), path
            assert int(headers["retry-after"]) > 0
            assert "12" not in problem["detail"]


@pytest.mark.parametrize("url", ["a\0b", "", "x" * 3000])
def test_an_url_that_no_store_can_have_is_refused(open_server: Server, url: str) -> None:
    body = json.dumps({"source": url, "destination": "b"}).encode()
    status, problem, _ = open_server.ask("POST", "/v1/archives", body, content_type="application/json")
    assert (status, problem["reason"]) == (422, "invalid")


@pytest.mark.parametrize("header", ["Content-Length: 100000000", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PROPFIND"])
def test_a_body_where_none_belongs_is_not_read(open_server: Server, method: str, header: str) -> None:
    start = f"{method} /v1/archives HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n".encode()
    with closing(begun(open_server, start)) as client:
        assert client.recv(4096).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "PATCH", "TRACE", "PROPFIND"])
@pytest.mark.parametrize("path", ["/v1/archives", "/v1/segment", "/healthz"])
def test_a_method_that_no_route_has_does_nothing_and_permits_no_page_to(
    open_server: Server, method: str, path: str
) -> None:
    start = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\nConnection: close\r\n\r\n"
    with closing(begun(open_server, start.encode())) as client:
        text = b"".join(iter(lambda: client.recv(4096), b"")).lower()
    assert text.startswith(b"http/1.1 405 ")
    assert b"access-control" not in text


@pytest.mark.parametrize(
    "path",
    [
        "//openapi.json",
        "/healthz/../v1/archives",
        "/healthz%2f..%2fv1/archives",
        "/./v1/archives",
        "/%2e/",
        "/healthz;",
    ],
)
def test_a_path_that_only_looks_open_asks_for_the_token(guarded: Server, path: str) -> None:
    assert guarded.ask("GET", path)[0] == 401


@pytest.mark.parametrize(
    "job", ["%2e%2e%2fservice", "..%2f..%2fetc", "abc%00", "abc%0a", "%ff", "abc/", "", "a" * 9_000, "abc%2ejson"]
)
def test_an_id_that_is_a_path_is_no_job_s(open_server: Server, job: str) -> None:
    assert open_server.ask("GET", f"/v1/archives/{job}")[0] == 404
    assert open_server.ask("DELETE", f"/v1/archives/{job}")[0] == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"source":NaN,"destination":"b"}', 422),
        (b'{"source":"\\ud800","destination":"b"}', 422),
        (b'{"source":"a","destination":"b","model":"other"}', 422),
        (b'{"source":' + b"9" * 9_000 + b',"destination":"b"}', 400),
        (b"[" * 16_000, 400),
        (b'{"a":' * 3_000, 400),
        (b'{"source":"\xff","destination":"b"}', 400),
    ],
    ids=["nan", "half a character", "an option that is none", "a long number", "deep", "deep objects", "not UTF-8"],
)
def test_json_that_means_nothing_is_refused(open_server: Server, body: bytes, status: int) -> None:
    assert open_server.ask("POST", "/v1/archives", body, content_type="application/json")[0] == status


def test_of_a_key_given_twice_the_last_counts_and_is_told(open_server: Server) -> None:
    body = b'{"source":"a","source":"c","destination":"b"}'
    status, known, _ = open_server.ask("POST", "/v1/archives", body, content_type="application/json")
    assert (status, known["source"]) == (202, "c")


def test_requests_sent_before_the_last_is_answered_are_answered_in_order(open_server: Server) -> None:
    upload = b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\neye"
    last = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with closing(begun(open_server, 50 * upload + last)) as client:
        text = b"".join(iter(lambda: client.recv(65_536), b""))
    assert (text.count(b"HTTP/1.1 200 "), text.count(b'"bytes":3')) == (51, 50)
    assert text.endswith(b'{"status":"ok"}')


FLOODS = {
    "headers": (b"", b"X-A: " + b"a" * MIB + b"\r\n"),
    "one header": (b"X-A: ", b"a" * MIB),
    "an address": (b"", b""),
    "trailers": (b"Transfer-Encoding: chunked\r\n\r\n3\r\neye\r\n0\r\n", b"X-A: " + b"a" * MIB + b"\r\n"),
}


@pytest.mark.parametrize("kind", FLOODS)
def test_a_flood_of_headers_is_not_kept(guarded: Server, kind: str) -> None:
    begin, more = FLOODS[kind]
    start = f"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n".encode() + begin
    if kind == "an address":
        start, more = b"GET /", b"a" * MIB
    before, closed = resident_bytes(), False
    with closing(begun(guarded, start)) as client:
        try:
            for _ in range(100):
                client.sendall(more)
        except OSError:
            closed = True
    assert closed
    assert resident_bytes() - before < 50 * MIB
    assert guarded.ask("GET", "/healthz")[0] == 200


def test_one_byte_in_each_chunk_is_a_body_like_any_other(guarded: Server) -> None:
    sent = head("/v1/segment", "Authorization: Bearer " + TOKEN, "Transfer-Encoding: chunked")
    sent += 100_000 * b"1\r\nx\r\n" + b"0\r\n\r\n"
    with closing(begun(guarded, sent)) as client:
        assert client.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_whoever_sends_no_headers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither at first nor after a request; one who has sent them is."""
    monkeypatch.setattr(connection, "HEAD_DEADLINE_S", 0.5)
    with served(HttpLimits()) as server, ThreadPoolExecutor(1) as answers:
        slow = answers.submit(server.ask, "POST", "/v1/segment", b"wait")
        assert server.service.entered.acquire(timeout=10)
        for sent in (b"", b"GET / HTTP/1.1\r\nHost: loc"):
            with closing(begun(server, sent)) as client:
                assert is_ended(client)
        with closing(begun(server, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")) as client:
            assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
            client.sendall(b"GET / HT")
            assert is_ended(client)
        server.service.gate.set()
        assert slow.result()[0] == 200


CHUNKED, FOUR = b"Transfer-Encoding: chunked", b"Content-Length: 4"


@pytest.mark.parametrize(("how", "rest"), [(CHUNKED, b"1\r\nx\r\n"), (CHUNKED, b"1"), (FOUR, b"body"), (FOUR, b"b")])
def test_whoever_goes_on_sending_what_was_refused_is_not_listened_to(
    how: bytes, rest: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_DEADLINE_S", 1.0)
    head = b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\n" + how + b"\r\n\r\n"
    with served(GUARDED) as server, closing(begun(server, head)) as client:
        assert told(client)[0] == 401
        client.sendall(rest)
        assert is_ended(client)
        assert server.ask("GET", "/healthz")[0] == 200


def test_a_request_after_one_whose_body_was_refused_is_answered() -> None:
    head = b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\n"
    with served(GUARDED) as server, closing(begun(server, head)) as client:
        assert told(client)[0] == 401
        client.sendall(b"body" + b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert told(client)[0] == 200


def test_connections_without_headers_shut_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "WAITING", 20)
    with served(HttpLimits()) as server, ExitStack() as clients:
        waiting = [clients.enter_context(closing(begun(server, b"GET"))) for _ in range(60)]
        assert server.ask("GET", "/healthz")[0] == 200
        assert is_ended(waiting[0])


def unread(server: Server) -> socket.socket:
    """A connection that asks for far more than the sockets' buffers hold, and reads nothing."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(10)
    client.connect(("127.0.0.1", server.port))
    client.sendall(1000 * b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return client


def test_whoever_does_not_read_what_it_asked_for_shuts_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a token: the document of the routes is answered to anybody."""
    monkeypatch.setattr(connection, "ANSWER_DEADLINE_S", 1.0)
    with served(replace(GUARDED, requests=1)) as server, closing(unread(server)):
        deadline = time.monotonic() + 20
        while server.ask("GET", "/openapi.json")[0] == 200:  # until its answers fill the buffers
            assert time.monotonic() < deadline
        while server.ask("GET", "/openapi.json")[0] != 200:
            assert time.monotonic() < deadline


def test_whoever_leaves_before_it_has_read_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    with served(replace(LIMITS, requests=1)) as server:
        with closing(unread(server)):
            while server.ask("GET", "/openapi.json")[0] == 200:
                pass
        while server.ask("GET", "/openapi.json")[0] != 200:
            pass
    assert caplog.messages == []


def is_ended(client: socket.socket) -> bool:
    """Whether the server ends a connection, within its ten seconds."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True
