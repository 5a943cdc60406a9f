"""The HTTP service on a real server, uvicorn, with a service behind it that knows a handful of bodies."""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from ma_cluster.config import ScoreOptions
from ma_cluster.errors import ImageFailedError, ImageRefusedError, ObjectMissingError, Reason, WorkerLostError
from ma_cluster.http.api import Answer, Service, create_api
from ma_cluster.http.connection import BoundedConnection
from ma_cluster.http.guard import HttpLimits

TOKEN = "a token of the tests"
GUARDED = HttpLimits(token_sha256=hashlib.sha256(TOKEN.encode()).hexdigest())
LIMITS = HttpLimits(max_body_bytes=1000, body_deadline_s=0.5, waiting=2)
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

    def segment(self, data: bytes, options: ScoreOptions) -> Answer:
        if data in REASONS:
            raise REASONS[data][0]
        if data == b"wait":
            self.entered.release()
            assert self.gate.wait(20)
        return Answer(
            {"status": "scored", "lesions": [], "bytes": len(data), "asked": dataclasses.asdict(options)},
            b"a mask",
            b"an overlay",
        )

    def ready(self) -> bool:
        return self.up

    def request_archive(self, source: str, destination: str, options: ScoreOptions) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return {"id": "abc", "source": source, "destination": destination, "asked": dataclasses.asdict(options)}

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
def served(limits: HttpLimits, other: Service | None = None) -> Iterator[Server]:
    """A server with these limits, and with another service behind it than `Known` where there is one."""
    service = Known()
    with closing(socket.socket()) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()  # a client that comes before the server waits
        api = create_api(other or service, limits)
        server = uvicorn.Server(uvicorn.Config(api, http=BoundedConnection, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Server(listening.getsockname()[1], service)
        finally:
            server.should_exit = True
            thread.join()
