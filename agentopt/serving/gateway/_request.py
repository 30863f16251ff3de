"""One request and its reply, as the server hands them to an ASGI application: `receive` and `send`.

Nothing is allocated per piece of a reply but the piece with its length; a client that does not read makes `send` wait.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from agentopt.serving._types import Refusal
from agentopt.serving.gateway._errors import dumps

if TYPE_CHECKING:
    from agentopt.serving.gateway._connection import Connection

HIGH = 64 << 10
"""Bytes of a reply that wait for a slow client, and of a body that wait for the application."""
STATUS = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
"""Status lines."""
_DISCONNECT: dict[str, Any] = {"type": "http.disconnect"}
_NO_BODY = frozenset({204, 304})


class Request:
    """One request and its reply: what an ASGI application gets as `receive` and `send`."""

    __slots__ = (
        "_body",
        "_chunked",
        "_complete",
        "_connection",
        "_expects",
        "_given",
        "_left",
        "_mute",
        "_pending",
        "_waiter",
        "begun",
        "ended",
        "gone",
        "keep_alive",
        "scope",
    )

    def __init__(self, connection: Connection, scope: dict[str, Any], *, keep_alive: bool, expects: bool) -> None:
        self.scope = scope
        self.begun = False
        self.ended = False
        self.gone = False
        self.keep_alive = keep_alive
        self._connection = connection
        self._body = bytearray()
        self._complete = False
        self._given = False
        self._expects = expects
        self._chunked = False
        self._left: int | None = None
        self._mute = False
        self._pending = b""
        self._waiter: asyncio.Future[None] | None = None

    # ---- the connection's side

    def more(self, data: bytes) -> None:
        """A piece of the body."""
        if self.ended:
            return
        self._body += data
        if len(self._body) > HIGH:
            self._connection.pause_reading()
        self._wake()

    def complete(self) -> None:
        """The body is there."""
        self._complete = True
        self._wake()

    def lost(self) -> None:
        """The client is gone."""
        self.gone = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # ---- the application's side

    async def receive(self) -> dict[str, Any]:
        """ASGI: the body in pieces, then a wait for the client to go."""
        if self._expects and not self._complete and not self.begun and not self.gone:
            self._expects = False
            self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not self.gone and not self.ended:
            if not self._given and (self._body or self._complete):
                body = bytes(self._body)
                self._body.clear()
                self._given = self._complete
                self._connection.resume_reading()
                return {"type": "http.request", "body": body, "more_body": not self._complete}
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return _DISCONNECT

    async def send(self, message: Any) -> None:
        """ASGI: the head, then the body in pieces. Waits while the client does not read."""
        connection = self._connection
        if connection.blocked:
            await connection.drain()
        if self.gone:
            return
        if message["type"] == "http.response.body":
            self._piece(message.get("body", b""), message.get("more_body", False))
        else:
            self._head(message["status"], message.get("headers", ()))

    def _head(self, status: int, headers: Any) -> None:
        if self.begun:
            raise RuntimeError("the reply's head was sent twice")
        connection = self._connection
        lines = [STATUS.get(status) or b"HTTP/1.1 %d \r\n" % status, connection.date_line]
        self._mute = self.scope["method"] == "HEAD" or status in _NO_BODY
        for name, value in headers:
            if b"\n" in value or b"\r" in value or b"\n" in name or b"\r" in name:
                raise RuntimeError(f"the reply's header {name!r} holds a line break")
            lowered = name.lower()
            if lowered == b"connection":
                self.keep_alive = self.keep_alive and value.lower() != b"close"
                continue
            if lowered == b"content-length":
                self._left = int(value)
            lines.append(b"%b: %b\r\n" % (name, value))
        if self._left is None and not self._mute:
            if self.scope["http_version"] == "1.1":
                self._chunked = True
                lines.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keep_alive = False  # such a body ends with the connection
        if not self._complete or connection.stopping:
            self.keep_alive = False  # nobody will read the rest of the body
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        self.begun = True
        # One write for the head and what follows at once; where nothing does, the head goes by itself.
        self._pending = b"".join(lines)
        asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        pending, self._pending = self._pending, b""
        if pending and not self.gone:
            self._connection.write(pending)

    def _piece(self, body: bytes, more: bool) -> None:
        if not self.begun or self.ended:
            raise RuntimeError("a piece of a reply came before its head or after its end")
        if self._mute:
            body = b""
        elif self._chunked:
            if body:
                body = b"%x\r\n%b\r\n" % (len(body), body)
            if not more:
                body += b"0\r\n\r\n"
        elif self._left is not None:
            self._left -= len(body)
            if self._left < 0 or (not more and self._left):
                raise RuntimeError("the reply's body has another length than its head says")
        if self._pending:
            body, self._pending = self._pending + body, b""
        connection = self._connection
        if body:
            connection.write(body)
        if not more:
            self.ended = True
            connection.answered(self, whole=self._complete)

    async def run(self, app: Any) -> None:
        """One ASGI call. A reply that was not ended is broken off, so that the client sees it."""
        connection = self._connection
        try:
            await app(self.scope, self.receive, self.send)
        except Exception as error:  # noqa: BLE001  # whatever the application does, other requests go on
            connection.trouble(
                f"{type(error).__name__} in {self.scope['method']} {self.scope['path'][:200]}: {error}", error
            )
            if self._pending:  # the head is not out yet: it can still be another one
                self._pending, self.begun, self._chunked, self._left = b"", False, False, None
            if not self.begun and not self.gone:
                await self._plain(Refusal(500, "the server made a mistake", kind="server_error", code="internal_error"))
        if not self.ended and not self.gone:
            connection.abort()
        self._wake()

    async def _plain(self, refusal: Refusal) -> None:
        body = dumps(refusal.body())
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})
