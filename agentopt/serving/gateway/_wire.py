"""One connection to an engine: what its protocol tells, kept until an exchange takes it.

A reader that does not keep up stops the reading of the socket: at most `_HIGH` bytes and one read of a reply are held.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from agentopt.errors import RunError
from agentopt.serving._types import Address
from agentopt.serving.gateway._patience import Clock

_HIGH = 256 << 10
_HEAD_BYTES = 64 << 10


class UpstreamError(RunError):
    """The engine could not be reached, broke off, fell silent or sent what is not HTTP."""

    def __init__(self, code: str, why: str) -> None:
        super().__init__(why)
        self.code = code
        """engine_died, engine_silent or engine_error."""


class Owner(Protocol):
    """The pool a connection belongs to."""

    clock: Clock
    """For deadlines."""

    def forget(self, wire: Wire) -> None:
        """It is closed."""
        ...


class Wire(asyncio.Protocol):
    """One connection to the engine."""

    def __init__(self, upstream: Owner, key: Address) -> None:
        import httptools

        self.key = key
        self.deadline = float("inf")
        self.idle_since = 0.0
        self.status = 0
        self.headers: dict[str, str] = {}
        self.pieces: list[bytes] = []
        self.held = 0
        self.head = False  # the final status and headers came
        self.whole = False  # the message ended
        self.failed: UpstreamError | None = None
        self.heard = False
        self.used = 0
        self._upstream = upstream
        self._parser: Any = httptools.HttpResponseParser(self)
        self._transport: Any = None
        self._waiter: asyncio.Future[None] | None = None
        self._head_bytes = 0
        self._paused = False
        self._keep = False

    # ---- what the parser tells

    def on_message_begin(self) -> None:
        if self.whole:
            self._keep = False  # the beginning of a reply that nobody asked for: the next one would be taken for it
        else:
            self.status, self.headers, self._head_bytes = 0, {}, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.head:  # what comes later are trailers: nobody wants them
            self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if not self.whole:
            self.status = self._parser.get_status_code()
            self.head = self.status >= 200

    def on_body(self, body: bytes) -> None:
        if not self.whole:
            self.pieces.append(body)
            self.held += len(body)

    def on_message_complete(self) -> None:
        if self.head:
            # a second message behind the first: nobody asked for it, so the connection is not used again
            self._keep = not self.whole and self._parser.should_keep_alive()
            self.whole = True

    # ---- what the transport tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        import httptools

        if self.whole or self.failed is not None or not self.used:
            self._lost(UpstreamError("engine_error", "the engine sent bytes that nobody asked for"))
            return
        self.heard = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._lost(UpstreamError("engine_error", f"the engine sent what is not HTTP: {error}"))
            return
        if not self.head:
            self._head_bytes += len(data)
            if self._head_bytes > _HEAD_BYTES:
                self._lost(UpstreamError("engine_error", "the engine sent endless headers"))
                return
        if self.held > _HIGH and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        if self.head and not self.whole and not self._framed():
            self.whole = True  # a body without a length ends with the connection
            self._keep = False
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.whole:
            reason = "closed the connection" if exc is None else f"broke the connection ({exc})"
            self._lost(UpstreamError("engine_died", f"the engine {reason}"))
        self._upstream.forget(self)
        self._parser = None
        self._wake()

    def _framed(self) -> bool:
        return "content-length" in self.headers or "transfer-encoding" in self.headers

    def _lost(self, error: UpstreamError) -> None:
        if self.failed is None:
            self.failed = error
        self.close()
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            self.deadline = float("inf")  # the timer may run before the exchange does
            waiter.set_result(None)

    # ---- what an exchange does

    def send(self, data: bytes) -> None:
        self.used += 1
        self.head = self.whole = self.heard = False
        if self._transport.is_closing():  # uvloop raises where asyncio's own loop only warns
            self._lost(UpstreamError("engine_died", "the engine closed the connection"))
        else:
            self._transport.write(data)

    async def wait(self, seconds: float) -> None:
        """Until something came, the message ended or the connection failed."""
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        clock = self._upstream.clock
        self.deadline = clock.now + max(seconds, clock.period)  # the next look may come at once
        try:
            await self._waiter
        finally:
            self._waiter = None
            self.deadline = float("inf")

    def silent(self) -> None:
        """The deadline passed."""
        self._lost(UpstreamError("engine_silent", "the engine gave no answer in time"))

    def take(self) -> bytes:
        """What came and was not taken yet."""
        pieces = self.pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self.held = 0
        if self._paused:
            self._paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()
        return data

    @property
    def open(self) -> bool:
        """Another exchange can use it: the reply ended as it should, and the request was sent to its end."""
        if self.failed is not None or not self._keep or self._transport is None or self._transport.is_closing():
            return False
        return not self._transport.get_write_buffer_size()

    def close(self) -> None:
        """Now: nothing that is still to be written matters."""
        if self._transport is not None:
            self._transport.abort()
