"""HTTP/1.1 towards the engine: llhttp framing, a pool of idle connections.

Invariants: a connection serves one exchange at a time; one whose exchange did not end cleanly is closed, which is how
the engine learns that nobody waits any more. One coarse timer looks after the waiting times of all connections.
Limits: no redirects, no content encodings, no HTTP/2.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator, Iterable
from functools import cache

from agentopt.serving._types import Address
from agentopt.serving.gateway._patience import Clock, within
from agentopt.serving.gateway._wire import UpstreamError, Wire

_IDLE_SECONDS = (
    4.0  # uvicorn, in front of most engines, closes idle connections after 5 s; being earlier avoids the race
)
_KEPT = 256
_LOOK_SECONDS = 0.5
_STALE_SECONDS = 2.0  # what is closed later than this may have been read: it is not sent again


class _Stale(Exception):
    """A kept connection was closed by the engine before it could have read the request."""


class UpstreamReply:
    """An engine's reply whose head has come. Read it to its end or `close` it.

    Attributes:
        status: HTTP status.
        headers: Lower-case names.
    """

    __slots__ = ("_first", "_idle", "_upstream", "_wire", "headers", "status")

    def __init__(self, upstream: Upstream, wire: Wire, first: float, idle: float) -> None:
        self.status = wire.status
        self.headers = wire.headers
        self._upstream = upstream
        self._wire: Wire | None = wire
        self._first = first
        self._idle = idle

    async def next(self) -> bytes:
        """All that has come and was not read yet, at least one byte; b"" at the end.

        Raises:
            UpstreamError: It broke off (what came before is given first) or was silent too long.
        """
        wire = self._wire
        if wire is None:
            return b""
        while not wire.pieces:
            if wire.whole:
                self._wire = None
                self._upstream.give_back(wire)
                return b""
            if wire.failed is not None:
                self._wire = None
                raise wire.failed
            await wire.wait(self._first)
        self._first = self._idle
        return wire.take()

    @property
    def complete(self) -> bool:
        """The reply has ended, and all of it was read."""
        return self._wire is None or (self._wire.whole and not self._wire.pieces)

    @property
    def chunks(self) -> AsyncIterator[bytes]:
        """The body, as it comes."""
        return self._chunks()

    async def _chunks(self) -> AsyncIterator[bytes]:
        while data := await self.next():
            yield data

    async def read(self, bound: int) -> bytes:
        """The whole body.

        Raises:
            UpstreamError: It broke off or has more than `bound` bytes.
        """
        pieces: list[bytes] = []
        size = 0
        while data := await self.next():
            size += len(data)
            if size > bound:
                self.close()
                raise UpstreamError("engine_error", f"the engine's reply is longer than {bound} bytes")
            pieces.append(data)
        return b"".join(pieces)

    def close(self) -> None:
        """Hang up, unless the reply was read to its end: the engine stops working on it."""
        wire, self._wire = self._wire, None
        if wire is None:
            return
        if wire.whole and not wire.pieces:
            self._upstream.give_back(wire)
        else:
            wire.close()


class Upstream:
    """Connections to engines. One object per event loop; `close` it in that loop."""

    def __init__(self, *, connect_seconds: float = 10.0) -> None:
        self._connect_seconds = connect_seconds
        self._idle: dict[Address, deque[Wire]] = {}
        self._wires: set[Wire] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self.clock = Clock(_LOOK_SECONDS)
        """For waiting times; it stands still with this process."""
        self._now = 0.0  # the loop's time, as of the last look: of connections that the engine closes by its own clock

    async def request(
        self,
        address: Address,
        method: str,
        path: str,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes = b"",
        *,
        first: float = 600.0,
        idle: float = 120.0,
    ) -> UpstreamReply:
        """Send one request; gives the reply as soon as its head has come.

        Args:
            address: Where; its prefix stands before `path`, its token becomes the Authorization header.
            method: For example POST.
            path: Begins with a slash; not escaped here.
            headers: Besides Host, Content-Length and Authorization. Not checked: never a client's own text.
            body: All of it.
            first: Seconds until the head, and then again until the first byte of the body.
            idle: Seconds between two pieces of the body.

        Raises:
            UpstreamError: No connection, no answer, or one that is not HTTP.
        """
        request = _request_bytes(address, method, path, headers, body)
        wire, kept = await self._connection(address)
        try:
            return await self._exchange(wire, kept, request, first, idle)
        except _Stale:  # on a new connection, where that cannot happen again
            wire, _ = await self._connection(address, new=True)
            return await self._exchange(wire, False, request, first, idle)

    async def _exchange(self, wire: Wire, kept: bool, request: bytes, first: float, idle: float) -> UpstreamReply:
        clock = asyncio.get_running_loop().time
        until = clock() + _STALE_SECONDS if kept else 0.0
        try:
            wire.send(request)
            while not wire.head:
                if wire.failed is not None:
                    if not wire.heard and wire.failed.code == "engine_died" and clock() < until:
                        raise _Stale
                    raise wire.failed
                await wire.wait(first)
        except BaseException:
            wire.close()
            raise
        return UpstreamReply(self, wire, first, idle)

    async def _connection(self, address: Address, *, new: bool = False) -> tuple[Wire, bool]:
        """An open connection, and whether it was used before."""
        loop = asyncio.get_running_loop()
        self._now = loop.time()
        self._watch()
        kept = None if new else self._idle.get(address)
        while kept:
            wire = kept.pop()
            if wire.open and self._now - wire.idle_since < _IDLE_SECONDS:
                return wire, True
            wire.close()
        wire = Wire(self, address)
        try:
            async with within(self._connect_seconds):
                if address.socket is not None:
                    await loop.create_unix_connection(lambda: wire, address.socket)
                else:
                    await loop.create_connection(
                        lambda: wire, address.host, address.port, ssl=_tls() if address.tls else None
                    )
        except TimeoutError as error:
            raise UpstreamError("engine_silent", "the engine does not take connections") from error
        except OSError as error:
            raise UpstreamError("engine_died", f"the engine cannot be reached ({error})") from error
        self._wires.add(wire)
        self._now = loop.time()
        self._watch()  # connecting may have taken longer than the timer lives without connections
        return wire, False

    def give_back(self, wire: Wire) -> None:
        """Keep the connection of an exchange that ended cleanly."""
        if self._closed or not wire.open:
            wire.close()
            return
        kept = self._idle.setdefault(wire.key, deque(maxlen=_KEPT))
        if len(kept) == _KEPT:
            kept.popleft().close()
        wire.idle_since = self._now
        kept.append(wire)

    def forget(self, wire: Wire) -> None:
        """It is closed."""
        self._wires.discard(wire)
        kept = self._idle.get(wire.key)
        if kept is not None and wire in kept:
            kept.remove(wire)
            if not kept:
                del self._idle[wire.key]

    def _watch(self) -> None:
        if self._timer is None:
            self.clock.begin()
            self._timer = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._look)

    def _look(self) -> None:
        """Twice a second while there are connections: which waited too long, which were idle too long."""
        self._timer = None
        waited = self.clock.look()
        now = self._now = asyncio.get_running_loop().time()
        for wire in list(self._wires):
            if wire.deadline < waited:
                wire.silent()
        for kept in list(self._idle.values()):
            while kept and now - kept[0].idle_since >= _IDLE_SECONDS:
                kept.popleft().close()
        if self._wires and not self._closed:
            self._watch()

    def close(self) -> None:
        """Close all connections; exchanges under way fail."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for wire in list(self._wires):
            wire.close()


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _request_bytes(address: Address, method: str, path: str, headers: Iterable[tuple[str, str]], body: bytes) -> bytes:
    host = f"[{address.host}]" if ":" in address.host else address.host
    lines = [
        f"{method} {address.prefix}{path} HTTP/1.1",
        f"host: {host}:{address.port}" if address.port else f"host: {host}",
    ]
    if address.token is not None:
        lines.append(f"authorization: Bearer {address.token}")
    lines += [f"{name}: {value}" for name, value in headers]
    if body or method != "GET":
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
