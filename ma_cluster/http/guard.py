"""What is asked of a request before anything is read of its body, and how much of a body is read.

In this order: a place (429), Host and Origin (403), token (401), media type (415), announced length (413); then the
body, which must arrive whole, within its limit and its deadline (413, 400). The routes get it at once, or not at all.

Before there is a request, connection.py bounds what one connection may take.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
