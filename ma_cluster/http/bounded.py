"""What one connection may take before there is a request: uvicorn alone waits for headers for ever, and keeps them all.

Serve's proxy calls `bound_connections` where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it: in a Ray that we
start, and in the image of deploy/.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_DEADLINE_S = 15.0
"""Time for a request's headers to arrive, seconds; the connection is closed after it."""
HEAD_BYTES = 64 * 2**10
"""Of a request without its body. What chunks cost in framing comes on top."""
WAITING = 512
"""Connections whose headers are arriving at a time; one more ends the oldest."""
_FRAMING = 8  # bytes for a body's byte, where each comes in a chunk of its own


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's connection, with these limits. Whoever passes them is not answered: nothing is known of a request."""

    _arriving: dict[BoundedConnection, asyncio.TimerHandle] = {}  # noqa: RUF012 - of all connections, the oldest first

    def connection_made(self, transport: Any) -> None:
        self._received = self._body = 0
        super().connection_made(transport)
        self._expect_head()
        if len(self._arriving) > WAITING:
            next(iter(self._arriving)).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._have_head()
        super().connection_lost(exc)

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

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        super().on_body(body)

    def _expect_head(self) -> None:
        if self not in self._arriving:
            self._arriving[self] = self.loop.call_later(HEAD_DEADLINE_S, self.transport.abort)

    def _have_head(self) -> None:
        deadline = self._arriving.pop(self, None)
        if deadline is not None:
            deadline.cancel()


def bound_connections() -> list[Any]:
    """Have every uvicorn that starts in this process bound its connections. No ASGI middleware comes with it."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedConnection.__name__}"
    return []
