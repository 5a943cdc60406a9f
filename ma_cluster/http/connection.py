"""What one connection may take of the server before there is a request, and after one was refused.

uvicorn alone waits for headers for ever and keeps them all, and listens to a refused body for as long as it comes.
Serve's proxy calls `bound_connections` where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it: in a Ray that we
start, and in the image of deploy/.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

HEAD_DEADLINE_S = 15.0
"""Time for a request's headers to arrive, and for those of the next where a body still comes that was refused, seconds;
the connection is closed after it."""
ANSWER_DEADLINE_S = 120.0
"""Time to take an answer that does not fit the sockets' buffers, seconds; the connection is closed after it. What was
asked for behind it has a place meanwhile."""
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
        self._unread: asyncio.TimerHandle | None = None
        self._unwanted: asyncio.TimerHandle | None = None
        self._unanswered: deque[RequestResponseCycle] = deque()
        super().connection_made(transport)
        self._expect_head()
        if len(self._arriving) > WAITING:
            next(iter(self._arriving)).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._have_head()
        self._unblock()
        self._stop_waiting()
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
        answered = self.cycle is not None and self.cycle.response_complete
        if answered and self._unwanted is None:  # what came is of a body that was refused, and uvicorn waits for more
            self._unwanted = self.loop.call_later(HEAD_DEADLINE_S, self.transport.abort)

    def on_message_begin(self) -> None:
        self._received = self._body = 0
        self._expect_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._have_head()
        self._stop_waiting()
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

    def _stop_waiting(self) -> None:
        if self._unwanted is not None:
            self._unwanted.cancel()
            self._unwanted = None

    def _have_head(self) -> None:
        deadline = self._arriving.pop(self, None)
        if deadline is not None:
            deadline.cancel()


def bound_connections() -> list[Any]:
    """Have every uvicorn that starts in this process bound its connections. No ASGI middleware comes with it."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedConnection.__name__}"
    return []
