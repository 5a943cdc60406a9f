"""What is asked of a request before anything is read of its body, and how much of a body is read.

In this order: a place (429), Host and Origin (403), token (401), media type (415), announced length (413); then the
body, which must arrive whole, within its limit and its deadline (413, 400). The routes get it at once, or not at all.

Before there is a request, `BoundedConnection` bounds what one connection may take: uvicorn alone waits for headers for
ever, and keeps them all. Serve's proxy calls `bound_connections` where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names
it: in a Ray that we start, and in the image of deploy/.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import uvicorn.config
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from ma_cluster.errors import Reason, RequestFault
from ma_cluster.http.errors import RefusedError, problem

log = logging.getLogger(__name__)
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_ALWAYS = frozenset({"/", "/healthz"})
"""Answered to anybody, and however much is under way."""
_OPEN = _ALWAYS | {"/openapi.json"}
PAGE = "/page/"
"""Below it lie the files of the pages, the same for everybody: no token is asked for them."""
_CHANGING = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_HOST = re.compile(r"\[?([^\[\]]*?)\]?(:\d*)?")
_DIGITS = 18  # of an announced length; more are too many bytes in any case
HEAD_DEADLINE_S = 15.0
"""Time for a request's headers to arrive, seconds; the connection is closed after it."""
ANSWER_DEADLINE_S = 120.0
"""Time to take an answer that does not fit the sockets' buffers, seconds; the connection is closed after it. What was
asked for behind it has a place meanwhile."""
HEAD_BYTES = 64 * 2**10
"""Of a request without its body. What chunks cost in framing comes on top."""
WAITING = 512
"""Connections whose headers are arriving at a time; one more ends the oldest."""
_FRAMING = 8  # bytes for a body's byte, where each comes in a chunk of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """What one client may ask of the service."""

    max_body_bytes: int = 64 * 2**20
    """Of a photograph, bytes; longer ones are answered with 413."""
    max_json_bytes: int = 16 * 2**10
    """Of any other body, bytes."""
    body_deadline_s: float = 60.0
    """Time for a body to arrive, seconds."""
    bodies: int = 64
    """Bodies that may be arriving at a time; more are answered with 429, as all below."""
    arriving_bytes: int = 2**30
    """Of all bodies that are arriving, bytes."""
    requests: int = 128
    """Requests under way at a time, bodies included. Root and health are always answered."""
    waiting: int = 16
    """Photographs under way at a time, once their bodies have arrived."""
    answer_s: float = 30.0
    """Time for what is asked of the stores, seconds; 503 after it."""
    token_sha256: str | None = None
    """Of the bearer token that every request must carry, but for `/`, `/healthz`, `/openapi.json` and the files of the
    pages; None asks for none."""
    hosts: frozenset[str] = LOOPBACK
    """Names that a request may give for this service (Host) while there is no token: a page that a browser has loaded
    from elsewhere reaches loopback under another name (DNS rebinding)."""


@dataclass(frozen=True, slots=True)
class _Intake:
    """The body that a route takes."""

    max_bytes: int
    media: tuple[str, ...]
    """Types, or their beginnings up to the slash; any where there are none."""


class Guard:
    """The ASGI middleware around the routes. Whatever they raise is answered here, too."""

    def __init__(self, app: ASGIApp, limits: HttpLimits) -> None:
        self._app, self._limits = app, limits
        # curl sends files as forms where it is not told what they are
        images = ("image/", "application/dicom", "application/octet-stream", "application/x-www-form-urlencoded", "")
        self._intakes = {
            ("POST", "/v1/segment"): _Intake(limits.max_body_bytes, images),
            ("POST", "/v1/archives"): _Intake(limits.max_json_bytes, ("application/json",)),
            ("POST", "/v1/reviews"): _Intake(limits.max_json_bytes, ("application/json",)),
        }
        self._other = _Intake(limits.max_json_bytes, ())
        self._requests = self._bodies = self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            with self._place(scope["path"]):
                await self._app(scope, await self._taken(scope, receive), noting)
        except RefusedError as refusal:
            await problem(refusal)(scope, receive, send)
        except Exception:
            log.exception("a request failed in a way that nobody foresaw")
            if begun:
                raise
            await problem(UNFORESEEN)(scope, receive, send)

    @contextmanager
    def _place(self, path: str) -> Iterator[None]:
        if path in _ALWAYS:
            yield
            return
        if self._requests >= self._limits.requests:
            raise _busy("as many requests as fit are under way")
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1

    async def _taken(self, scope: Scope, receive: Receive) -> Receive:
        """What the routes receive: the body in one piece, where the route takes one."""
        method, path, headers = scope["method"], scope["path"], Headers(scope=scope)
        self._check_sender(method, path, headers)
        if method not in _CHANGING:
            _check_length(headers, self._other)
            if "transfer-encoding" in headers:  # Serve would hand the Gateway all of a body that nobody reads
                raise _too_large(self._other)
            return receive
        intake = self._intakes.get((method, path), self._other)
        _check_body(headers, intake)
        body: Message = {"type": "http.request", "body": await self._whole(receive, intake), "more_body": False}
        unread = [body]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        return replay

    def _check_sender(self, method: str, path: str, headers: Headers) -> None:
        limits, host, origin = self._limits, headers.get("host", "").lower(), headers.get("origin")
        if limits.token_sha256 is None:
            name = _HOST.fullmatch(host)
            if name is None or name[1] not in limits.hosts:
                raise _forbidden("this service does not go by the name that the request gives; use that of --host")
        if method in _CHANGING and origin is not None and origin.lower().partition("://")[2] != host:
            raise _forbidden("a page from elsewhere must not change anything here")
        if limits.token_sha256 is not None and path not in _OPEN and not path.startswith(PAGE):
            scheme, _, token = headers.get("authorization", "").partition(" ")
            digest = hashlib.sha256(token.strip().encode()).hexdigest()
            if scheme.lower() != "bearer" or not hmac.compare_digest(digest, limits.token_sha256):
                raise RefusedError(
                    HTTPStatus.UNAUTHORIZED, RequestFault.UNAUTHORIZED, "send the service's bearer token"
                )

    async def _whole(self, receive: Receive, intake: _Intake) -> bytes:
        """The body, read no further than its limit, and no longer than the deadline."""
        if self._bodies >= self._limits.bodies:
            raise _busy("as many bodies as fit are arriving")
        data, deadline_s = bytearray(), self._limits.body_deadline_s
        self._bodies += 1
        try:
            async with asyncio.timeout(deadline_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _bad("the client left")
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    data += chunk
                    self._bytes += len(chunk)
                    if len(data) > intake.max_bytes:
                        raise _too_large(intake)
                    if self._bytes > self._limits.arriving_bytes:
                        raise _busy("as many bytes as fit are arriving")
        except TimeoutError as error:
            raise _bad(f"the body did not arrive within {deadline_s:g} s") from error
        finally:
            self._bodies -= 1
            self._bytes -= len(data)
        return bytes(data)


UNFORESEEN = RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, RequestFault.UNAVAILABLE, "the service's log says more")


def _check_body(headers: Headers, intake: _Intake) -> None:
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise RefusedError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE, Reason.UNSUPPORTED, "send the body as it is, without Content-Encoding"
        )
    media = headers.get("content-type", "").partition(";")[0].strip().lower()
    if intake.media and not any(
        media == known or (known[-1:] == "/" and media.startswith(known)) for known in intake.media
    ):
        detail = f"send the body as {' or '.join(intake.media[:2]).replace('image/', 'image/jpeg')}"
        raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, Reason.UNSUPPORTED, detail)
    _check_length(headers, intake)


def _check_length(headers: Headers, intake: _Intake) -> None:
    announced = headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > _DIGITS or int(announced) > intake.max_bytes):
        raise _too_large(intake)


def _too_large(intake: _Intake) -> RefusedError:
    detail = f"the limit is {intake.max_bytes} bytes"
    return RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, Reason.TOO_LARGE, detail)


def _busy(detail: str) -> RefusedError:
    return RefusedError(HTTPStatus.TOO_MANY_REQUESTS, RequestFault.BUSY, detail)


def _forbidden(detail: str) -> RefusedError:
    return RefusedError(HTTPStatus.FORBIDDEN, RequestFault.FORBIDDEN, detail)


def _bad(detail: str) -> RefusedError:
    return RefusedError(HTTPStatus.BAD_REQUEST, RequestFault.BAD_REQUEST, detail)


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's connection, with these limits. Whoever passes them is not answered: nothing is known of a request."""

    _arriving: dict[BoundedConnection, asyncio.TimerHandle] = {}  # noqa: RUF012 - of all connections, the oldest first

    def connection_made(self, transport: Any) -> None:
        self._received = self._body = 0
        self._unread: asyncio.TimerHandle | None = None
        self._unanswered: deque[RequestResponseCycle] = deque()
        super().connection_made(transport)
        self._expect_head()
        if len(self._arriving) > WAITING:
            next(iter(self._arriving)).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._have_head()
        self._unblock()
        for cycle in self._unanswered:  # uvicorn tells the last alone, and the others would write to what is closed
            cycle.disconnected = True
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        self._unread = self.loop.call_later(ANSWER_DEADLINE_S, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._unblock()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        super().data_received(data)
        if self._received - self._body > HEAD_BYTES + _FRAMING * self._body:
            self.transport.abort()

    def on_message_begin(self) -> None:
        self._received = self._body = 0
        self._expect_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._have_head()
        super().on_headers_complete()
        if self.cycle is not None:  # as an upgrade has none
            self._unanswered.append(self.cycle)
        while self._unanswered and self._unanswered[0].response_complete:
            self._unanswered.popleft()

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        super().on_body(body)

    def _expect_head(self) -> None:
        if self not in self._arriving:
            self._arriving[self] = self.loop.call_later(HEAD_DEADLINE_S, self.transport.abort)

    def _unblock(self) -> None:
        if self._unread is not None:
            self._unread.cancel()

    def _have_head(self) -> None:
        deadline = self._arriving.pop(self, None)
        if deadline is not None:
            deadline.cancel()


def bound_connections() -> list[Any]:
    """Have every uvicorn that starts in this process bound its connections. No ASGI middleware comes with it."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedConnection.__name__}"
    return []
