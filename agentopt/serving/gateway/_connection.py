"""One client's connection: HTTP/1.1 as llhttp reads it, strictly, and one ASGI call a request.

What a client can do to a server without being asked who it is, is bounded here: bytes and lines of a head, the time it
takes to send one, requests sent ahead, a reply that is never read. All times are looked after by one coarse timer of
the server, which compares `deadline`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, cast

from agentopt.serving._types import Refusal
from agentopt.serving.gateway._errors import dumps
from agentopt.serving.gateway._request import HIGH, STATUS, Request

if TYPE_CHECKING:
    from agentopt.serving.gateway._server import Server

_NEVER = float("inf")
_AHEAD = 8  # requests that may wait behind the one being answered
_DISCARD = 64 << 20
_LINGER_SECONDS = 5.0


class Connection(asyncio.Protocol):
    """The protocol object of one client's connection."""

    def __init__(self, server: Server) -> None:
        self.deadline = server.now + server.limits.head_seconds
        self.stalled = _NEVER
        """When a client that does not read its replies is cut off; apart from `deadline`, which every request moves."""
        self.blocked = False
        """The client does not read its reply."""
        self._server = server
        self._transport: Any = None
        self._parser: Any = None
        self._client: tuple[str, int] | None = None
        self._local: tuple[str, int] | None = None
        self._in_head = True
        self._head_bytes = 0  # as the parser reported them
        self._fed = 0  # as they came: an unfinished line is in no report
        self._url = b""
        self._fields: list[tuple[bytes, bytes]] = []
        self._refusal: Refusal | None = None
        self._reading: Request | None = None
        self._active: Request | None = None
        self._ahead: deque[Request] = deque()
        self._paused = False
        self._deaf = False  # nothing more is read as HTTP: the connection ends after what is being answered
        self._discarded = 0
        self._drained: asyncio.Event | None = None

    # ---- what the transport tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._transport.set_write_buffer_limits(high=HIGH)
        self._client = _name(transport.get_extra_info("peername"))
        self._local = _name(transport.get_extra_info("sockname"))
        self._new_parser()
        self._server.arrived(self)

    def _new_parser(self) -> None:
        import httptools

        self._parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        import httptools

        if self._deaf:
            self._discarded += len(data)
            if self._discarded > _DISCARD:
                self.abort()
            return
        begun = self._in_head
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._declined(data[offer.args[0] :])
        except httptools.HttpParserError as error:
            self._refuse(self._refusal or Refusal(400, f"this is not HTTP/1.1: {error}", code="bad_request"))
        else:
            if begun and self._in_head:
                self._fed += len(data)
                if self._fed > self._server.limits.head_bytes:
                    self._refuse(_too_large())

    def _declined(self, rest: bytes) -> None:
        """A client offered another protocol (some do with their first request): go on in HTTP/1.1."""
        if self._deaf:
            return
        method = self._parser.get_method()
        if method == b"CONNECT":
            self._refuse(Refusal(405, "this is not a proxy", code="method_not_allowed"))
            return
        kept = [field for name, value in self._fields if (field := _without_offer(name, value)) is not None]
        head = b"".join(
            [b"%b %b HTTP/1.1\r\n" % (method, self._url), *(b"%b: %b\r\n" % field for field in kept), b"\r\n"]
        )
        self._new_parser()
        self.data_received(head + rest)

    def eof_received(self) -> bool:
        # Whoever ends its side waits for nothing more; what is written already still goes out, but not for ever.
        self.deadline = self._server.now + self._server.limits.stalled_seconds
        for request in (self._active, self._reading, *self._ahead):
            if request is not None:
                request.lost()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.left(self)
        self._parser = None
        self.resume_writing()
        for request in (self._active, self._reading, *self._ahead):
            if request is not None:
                request.lost()
        self._ahead.clear()
        self._active = self._reading = None

    def pause_writing(self) -> None:
        self.blocked = True
        self.stalled = self._server.now + self._server.limits.stalled_seconds

    def resume_writing(self) -> None:
        self.blocked = False
        self.stalled = _NEVER
        if self._drained is not None:
            self._drained.set()
            self._drained = None

    async def drain(self) -> None:
        """Until the client has read enough, or is gone."""
        while self.blocked:
            if self._drained is None:
                self._drained = asyncio.Event()
            await self._drained.wait()

    # ---- what the parser tells

    def on_message_begin(self) -> None:
        self._in_head = True
        self._head_bytes = self._fed = 0
        self._url = b""
        self._fields = []
        if self._active is None:
            self.deadline = self._server.now + self._server.limits.head_seconds

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            self._refusal = Refusal(400, "trailers are not taken", code="bad_request")
            raise ValueError("trailers")
        self._count(len(name) + len(value) + 4)
        self._fields.append((name.lower(), value))
        if len(self._fields) > self._server.limits.head_fields:
            self._refusal = _too_large()
            raise ValueError("fields")

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._server.limits.head_bytes:
            self._refusal = _too_large()
            raise ValueError("head")

    def on_headers_complete(self) -> None:
        if self._parser.should_upgrade():
            return
        self._in_head = False
        version = self._parser.get_http_version()
        self._refusal = _odd_head(version, self._url, self._fields)
        if self._refusal is not None:
            raise ValueError("head")
        if len(self._ahead) >= _AHEAD:
            self._refusal = Refusal(400, "too many requests were sent ahead", code="bad_request")
            raise ValueError("ahead")
        target, _, query = self._url.partition(b"?")
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "method": self._parser.get_method().decode("ascii"),
            "scheme": "http",
            "path": target.decode("latin-1"),
            "raw_path": target,
            "query_string": query,
            "root_path": "",
            "headers": self._fields,
            "client": self._client,
            "server": self._local,
        }
        expects = version == "1.1" and any(
            name == b"expect" and value.lower() == b"100-continue" for name, value in self._fields
        )
        keep = version == "1.1" and self._parser.should_keep_alive()
        request = self._reading = Request(self, scope, keep_alive=keep, expects=expects)
        if self._active is None:
            self._start(request)
        else:
            self._ahead.append(request)
            self.pause_reading()

    def on_body(self, body: bytes) -> None:
        if self._reading is not None:
            self._reading.more(body)

    def on_message_complete(self) -> None:
        if self._reading is not None:
            self._reading.complete()
            if self._reading is self._active:
                self.deadline = _NEVER
            self._reading = None

    # ---- what happens to requests

    def _start(self, request: Request) -> None:
        self._active = request
        # A backstop: the application has its own, shorter time for the body.
        self.deadline = (
            _NEVER if self._reading is not request else self._server.now + self._server.limits.body_seconds + 5
        )
        self._server.run(request)

    def answered(self, request: Request, *, whole: bool) -> None:
        """The reply is written; go on with the next request, wait for one, or close."""
        self._active = None
        self._server.answered += 1
        if self._transport.is_closing():
            return
        if request.keep_alive and self._ahead:
            self._start(self._ahead.popleft())
            if not self._ahead:
                self.resume_reading()
        elif request.keep_alive and not self.stopping:
            limits = self._server.limits
            patience = limits.head_seconds if self._in_head else limits.keep_alive_seconds
            if self._unsent:  # a slow line is not an idle one
                patience = max(patience, limits.stalled_seconds)
            self.deadline = self._server.now + patience
            self.resume_reading()
        elif whole:
            self.deadline = self._server.now + self._server.limits.stalled_seconds
            self._transport.close()
        else:
            self._linger()

    def _linger(self) -> None:
        """Close without a reset: a client that is still sending its body gets to read the reply first."""
        self._deaf = True
        self._reading = None
        self.deadline = self._server.now + _LINGER_SECONDS
        self.resume_reading()
        if self._transport.can_write_eof() and not self._transport.is_closing():
            self._transport.write_eof()

    def _refuse(self, refusal: Refusal) -> None:
        """What came is not a request: say so in its turn, and close."""
        self._deaf = True
        broken, self._reading = self._reading, None
        if broken is not None and not broken.begun:  # its body is wrong: whatever was made of it, this is the reply
            broken.lost()
            if broken is self._active:
                self._active = None
            else:
                self._ahead.remove(broken)
        if self._ahead:
            self._ahead[-1].keep_alive = False
        elif self._active is not None:
            self._active.keep_alive = False
        else:
            body = dumps(refusal.body())
            head = b"%bcontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            self.write(head % (STATUS[refusal.status] + self.date_line, len(body)) + body)
            self._linger()

    def overdue(self) -> None:
        """The deadline passed, or nothing of a reply was read for too long."""
        if not self.blocked and self._active is None and not self._deaf and self._in_head and self._fed:
            self._refuse(Refusal(408, "the request did not come in time", code="request_timeout"))
        else:
            self.abort()

    @property
    def spare(self) -> bool:
        """Nothing is being answered, and what was answered has gone out."""
        return self._active is None and not self._unsent

    @property
    def stopping(self) -> bool:
        """The server takes no more requests on this connection."""
        return self._server.stopping

    @property
    def date_line(self) -> bytes:
        """The header Date."""
        return self._server.date_line

    def stop(self) -> None:
        """Close as soon as nothing is being answered, and what was answered has gone out."""
        if self._active is not None:
            return
        if self._unsent and not self._deaf:
            self.deadline = self._server.now + self._server.limits.stalled_seconds
            self._transport.close()
        else:
            self.abort()

    @property
    def _unsent(self) -> int:
        """Bytes of replies that the client's side has not taken yet."""
        return self._transport.get_write_buffer_size()

    def trouble(self, line: str, error: BaseException) -> None:
        """An application's mistake, for the log."""
        self._server.trouble(line, error)

    def write(self, data: bytes) -> None:
        """Bytes for the client."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def abort(self) -> None:
        """Close now."""
        self._transport.abort()

    def refuse_all(self) -> None:
        """Too many connections: an error without a request."""
        self._refuse(Refusal(503, "the server has too many connections open", kind="server_error", code="overloaded"))

    def pause_reading(self) -> None:
        """Leave what the client sends in its socket."""
        if not self._paused and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on."""
        if self._paused and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()


def _without_offer(name: bytes, value: bytes) -> tuple[bytes, bytes] | None:
    """A header without the offer of another protocol; None when nothing else is in it."""
    if name != b"connection":
        return None if name in (b"upgrade", b"http2-settings") else (name, value)
    kept = [one for one in value.split(b",") if one.strip().lower() not in (b"upgrade", b"http2-settings", b"")]
    return (name, b",".join(kept)) if kept else None


def _name(address: object) -> tuple[str, int] | None:
    """Host and port; a peer on a Unix socket has neither."""
    if not isinstance(address, tuple):
        return None
    parts = cast("tuple[object, ...]", address)
    return str(parts[0]), int(str(parts[1]))


def _too_large() -> Refusal:
    return Refusal(431, "the request line and headers are too long", code="headers_too_long")


def _odd_head(version: str, url: bytes, fields: list[tuple[bytes, bytes]]) -> Refusal | None:
    """What llhttp lets through and two servers might read differently."""
    if version not in ("1.0", "1.1"):
        return Refusal(505, f"HTTP/{version} is not spoken here", code="bad_request")
    if not url.startswith(b"/") and url != b"*":
        return Refusal(400, "the request target must be a path", code="bad_request")
    names = [name for name, _ in fields]
    if names.count(b"host") > 1 or (version == "1.1" and b"host" not in names):
        return Refusal(400, "exactly one header Host is needed", code="bad_request")
    codings = [value.strip().lower() for name, value in fields if name == b"transfer-encoding"]
    if codings and (codings != [b"chunked"] or b"content-length" in names or version == "1.0"):
        return Refusal(400, "Transfer-Encoding may only be 'chunked', without Content-Length", code="bad_request")
    if any(b"\r" in value or b"\n" in value or b"\0" in value for _, value in fields):
        return Refusal(400, "a header holds a line break", code="bad_request")
    return None
