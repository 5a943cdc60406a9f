"""An HTTP proxy in front of an S3 server that breaks the replies it is told to break; the server itself stays whole.

    with fault_proxy(weed.endpoint) as proxy:
        proxy.faults.append(Fault(Kind.RESET, "GET", "eye.jpg", times=2))     # the next two such replies break off

Requests go on as the client has sent them, Host included, which is part of what it has signed.
"""

from __future__ import annotations

import http.client
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


class Kind(StrEnum):
    """How a reply breaks."""

    ERROR = "error"  # `status` and `code` in its place; the server never hears of the request
    RESET = "reset"  # half of the body, then the connection is reset
    TRICKLE = "trickle"  # 1 KB each second
    STALL = "stall"  # half of the body, then nothing, for ever
    SILENCE = "silence"  # no reply at all, for ever
    LONGER = "longer"  # Content-Length says more than there is
    SHORTER = "shorter"  # Content-Length says less
    LOST = "lost"  # the server has done it, the connection closes without a reply


@dataclass(slots=True)
class Fault:
    """Breaks the next `times` replies to requests of a method whose path, encoded as clients send it, holds a text."""

    kind: Kind
    method: str
    path: str
    times: int = 1
    after: int = 0
    """So many such requests pass first."""
    status: int = 503
    code: str = "SlowDown"


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes


class FaultProxy(ThreadingHTTPServer):
    """Listens on loopback until it is shut down. `faults` may be changed at any time; the first that fits is used."""

    daemon_threads = True

    def __init__(self, upstream: str, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults: list[Fault] = []
        self.broken: Counter[Kind] = Counter()
        """Replies broken so far."""
        self.closing = threading.Event()
        self._lock = threading.Lock()

    def fault_for(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets, counted."""
        with self._lock:
            for fault in self.faults:
                if fault.method != method or fault.path not in path or not fault.times:
                    continue
                if fault.after:
                    fault.after -= 1
                    continue
                fault.times -= 1
                self.broken[fault.kind] += 1
                return fault
        return None

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up on a broken reply are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        gone = self.server.closing.is_set()  # a connection that was kept alive ends with the server
        if gone or not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault_for(self.command, self.path)
        if fault is None:
            self._send(self._ask(body))
        elif fault.kind is Kind.ERROR:
            self._send(_error(fault))
        elif fault.kind is Kind.SILENCE:
            self.server.closing.wait()
        else:
            self._break(fault.kind, self._ask(body))

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def _ask(self, body: bytes) -> _Reply:
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            reply = upstream.getresponse()
            return _Reply(reply.status, reply.reason, reply.getheaders(), reply.read())
        finally:
            upstream.close()

    def _send(self, reply: _Reply) -> None:
        self._head(reply, len(reply.body))
        self.wfile.write(reply.body)

    def _head(self, reply: _Reply, length: int) -> None:
        headers = [(name, value) for name, value in reply.headers if name.lower() not in _HOP_BY_HOP]
        if self.command == "HEAD":
            length = int(dict(reply.headers).get("Content-Length", 0))
        lines = [f"HTTP/1.1 {reply.status} {reply.reason}", *(f"{name}: {value}" for name, value in headers)]
        self.wfile.write("\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode("latin-1"))

    def _break(self, kind: Kind, reply: _Reply) -> None:
        self.close_connection = True
        half = len(reply.body) // 2
        if kind is Kind.LOST:
            return
        self._head(reply, len(reply.body) + {Kind.LONGER: 100, Kind.SHORTER: half - len(reply.body)}.get(kind, 0))
        if kind in (Kind.LONGER, Kind.SHORTER):
            self.wfile.write(reply.body)
        elif kind is Kind.TRICKLE:
            self._trickle(reply.body)
        else:
            self.wfile.write(reply.body[:half])
            if kind is Kind.RESET:
                _reset(self.connection)
            else:
                self.server.closing.wait()

    def _trickle(self, body: bytes) -> None:
        for start in range(0, len(body), 256):
            self.wfile.write(body[start : start + 256])
            if self.server.closing.wait(0.25):
                return


def _reset(connection: socket.socket) -> None:
    """Close it by RST, as a server that died does; a moment later, or the client would not see what was sent before."""
    time.sleep(0.05)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(connection.detach())


def _error(fault: Fault) -> _Reply:
    body = f"<Error><Code>{fault.code}</Code><Message>as told</Message></Error>".encode()
    return _Reply(fault.status, "As Told", [("Content-Type", "application/xml")], body)


@contextmanager
def fault_proxy(upstream: str, port: int = 0) -> Iterator[FaultProxy]:
    """A proxy in front of an endpoint, in threads of this process, on any free port; it starts with no faults."""
    with FaultProxy(upstream, port) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.closing.set()
            proxy.shutdown()
            thread.join()
