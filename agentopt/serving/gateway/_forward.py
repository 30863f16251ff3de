"""One exchange under way: the reply as the client gets it, and the engine's reply carried over to it.

Everything that can end an exchange early (the client hangs up, its key is revoked, its time is up, the server stops)
goes through `Flight.stop`, which cancels whatever the exchange is waiting for. Leaving the engine's reply unread closes
the connection to the engine, which stops working on it.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, cast

from agentopt.serving._types import Exchange, Refusal
from agentopt.serving.gateway._client import UpstreamReply
from agentopt.serving.gateway._errors import broken, dumps, error_body, error_event, error_headers
from agentopt.serving.gateway._events import Events, tail_usage
from agentopt.serving.gateway._limits import Limits
from agentopt.serving.gateway._wire import UpstreamError

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_TYPE = re.compile(r"[A-Za-z0-9.+-]{1,64}/[A-Za-z0-9.+-]{1,64}(; ?charset=[A-Za-z0-9-]{1,32})?\Z")
_TAIL = 64 << 10
_ERROR_BYTES = 1 << 20
_SHOWN = 2000
_EVENT = 512  # bytes; what is shorter is one event
_OWN_STATUSES = frozenset({400, 404, 413, 415, 422, 429})


class Flight:
    """An exchange between its first byte and its last, so that others can end it."""

    __slots__ = ("deadline", "exchange", "landed", "stopped", "task")

    def __init__(self, exchange: Exchange, task: asyncio.Task[Any], deadline: float) -> None:
        self.exchange = exchange
        self.task = task
        self.deadline = deadline
        self.stopped: str | None = None
        self.landed = False

    def stop(self, code: str) -> None:
        """End it: `code` is one of `Exchange.error`'s reasons. The first reason counts."""
        if self.stopped is None and not self.landed:
            self.stopped = code
            self.task.cancel()


class Answer:
    """The reply to one request, on its way to the client."""

    __slots__ = (
        "_headers",
        "_keep",
        "_kept",
        "_send",
        "begun",
        "ended",
        "events",
        "exchange",
        "finish",
        "last",
        "limits",
        "written",
    )

    def __init__(self, exchange: Exchange, send: Send, limits: Limits, headers: list[tuple[bytes, bytes]]) -> None:
        self.exchange = exchange
        self.limits = limits
        self.begun = False
        self.ended = False
        self.events: Events | None = None
        """Set while the body is server-sent events."""
        self.last = b""
        self.written = 0
        """Events that were sent, or pieces of another body: about the tokens of a stream."""
        self.finish: Callable[[str, bytes], bytes] | None = None
        """Of the choice: what is done to a reply that is not streamed."""
        self._send = send
        self._headers = headers
        self._kept: list[bytes] | None = None
        self._keep = 0

    def add(self, *headers: tuple[bytes, bytes]) -> None:
        """Headers for whatever the reply will be."""
        self._headers += headers

    def keep(self) -> None:
        """The body is wanted by an observer."""
        self._kept, self._keep = [], self.limits.kept_bytes

    @property
    def kept(self) -> bytes | None:
        """The body as it was sent, if it was to be kept and was not too long."""
        return None if self._kept is None else b"".join(self._kept)

    async def begin(self, status: int, content_type: str, length: int | None, *more: tuple[bytes, bytes]) -> None:
        """Status and headers."""
        self.exchange.status = status
        headers = [
            (b"content-type", content_type.encode("latin-1")),
            (b"x-request-id", self.exchange.id.encode()),
            (b"cache-control", b"no-store"),
            *self._headers,
            *more,
        ]
        if length is not None:
            headers.append((b"content-length", b"%d" % length))
        headers += [
            (name.lower().encode("latin-1"), clean(value).encode("latin-1", "replace"))
            for name, value in self.exchange.notes.items()
        ]
        self.begun = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def piece(self, data: bytes, *, last: bool = False) -> None:
        """A piece of the body, not empty; with `last` the body is complete."""
        exchange = self.exchange
        exchange.chunks += 1
        exchange.bytes_out += len(data)
        # A client that reads slowly gets many events in one piece.
        self.written += 1 if len(data) < _EVENT else data.count(b"\n\n") or 1
        self.last = data
        if self._kept is not None:
            self._keep -= len(data)
            if self._keep < 0:
                self._kept = None
            else:
                self._kept.append(data)
        self.ended = last
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})

    async def end(self) -> None:
        """The body is complete."""
        self.ended = True
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def whole(self, status: int, content_type: str, body: bytes, *more: tuple[bytes, bytes]) -> None:
        """A reply that is known in full."""
        await self.begin(status, content_type, len(body), *more)
        await self.piece(body, last=True)

    async def fail(self, refusal: Refusal) -> None:
        """An error: as JSON, or as the last event of a stream; a plain body that has begun is broken off."""
        if not self.begun:
            body = error_body(self.exchange.route, refusal)
            await self.whole(refusal.status, "application/json", body, *error_headers(refusal))
        elif self.events is not None and not self.ended:
            separator = b"\n\n" if self.events.open else b""
            await self.piece(separator + error_event(self.exchange.route, refusal, self.last), last=True)


def clean(value: str) -> str:
    """A header's value without what would end it."""
    return "".join(character if character.isprintable() else " " for character in value)[:1000]


async def carry(reply: UpstreamReply, answer: Answer, *, cut_usage: bool) -> None:
    """The engine's reply, to the client.

    Raises:
        Refusal: The engine refused; the client is told in our words where they are not meant for it.
        UpstreamError: The engine broke off.
    """
    if reply.status != 200:
        refusal = await _refused(reply)
        # the engine's own codes are for the client: a log's and a metric's must be few
        answer.exchange.error = "engine_refused" if reply.status in _OWN_STATUSES else refusal.code
        raise refusal
    kind = reply.headers.get("content-type", "application/json")
    kind = kind if _TYPE.match(kind) else "application/json"
    if kind.startswith("text/event-stream"):
        await _carry_events(reply, answer, kind, cut_usage)
    else:
        await _carry_body(reply, answer, kind)


async def _carry_events(reply: UpstreamReply, answer: Answer, kind: str, cut_usage: bool) -> None:
    exchange = answer.exchange
    events = Events(cut_usage=cut_usage, bound=answer.limits.event_bytes)
    # The head waits for the first bytes: an engine that dies before them leaves a proper status, not a broken stream.
    data = await reply.next()
    exchange.first = time.monotonic()
    await answer.begin(200, kind, None)
    answer.events = events
    feed, piece, following = events.feed, answer.piece, reply.next
    try:
        while data:
            out = feed(data)
            if reply.complete:
                await _last(answer, events, out)
                return
            if out:
                await piece(out)
            data = await following()
    except UpstreamError:
        if not answer.last.rstrip().endswith(b"data: [DONE]"):
            raise
    finally:
        exchange.use = events.use
    await _last(answer, events, b"")


async def _last(answer: Answer, events: Events, out: bytes) -> None:
    """What is left, and the end."""
    out += events.rest()
    answer.exchange.use = events.use
    if out:
        await answer.piece(out, last=True)
    else:
        await answer.end()


async def _carry_body(reply: UpstreamReply, answer: Answer, kind: str) -> None:
    """Held back until it is complete, unless it is long."""
    exchange, bound = answer.exchange, answer.limits.whole_bytes
    pieces: list[bytes] = []
    size = 0
    tail = b""
    while data := await reply.next():
        if exchange.first is None:
            exchange.first = time.monotonic()
        size += len(data)
        tail = (tail + data)[-_TAIL:]
        if answer.begun:
            await answer.piece(data)
            continue
        pieces.append(data)
        if size > bound:
            await answer.begin(200, kind, _length(reply))
            for held in pieces:
                await answer.piece(held)
            pieces.clear()
    if answer.begun:
        exchange.use = tail_usage(tail)
        await answer.end()
        return
    body = b"".join(pieces)
    if not (body.lstrip().startswith(b"{") and body.rstrip().endswith(b"}")):
        raise UpstreamError("engine_error", "the engine's reply is not a JSON object")
    exchange.use = tail_usage(body)
    if answer.finish is not None:
        body = answer.finish(exchange.route, body)
    await answer.whole(200, kind, body)


def _length(reply: UpstreamReply) -> int | None:
    text = reply.headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() else None


async def _refused(reply: UpstreamReply) -> Refusal:
    """What the client is told when the engine answers with another status than 200."""
    status = reply.status
    try:
        body = await reply.read(_ERROR_BYTES)
    except UpstreamError:
        if status in _OWN_STATUSES:
            return Refusal(status, f"the engine refused the request with status {status}", code="engine_refused")
        raise
    if status in _OWN_STATUSES:
        message, kind, code, param = _engine_error(body)
        wait = reply.headers.get("retry-after", "")
        return Refusal(
            status,
            message or f"the engine refused the request with status {status}",
            kind=kind or ("rate_limit_error" if status == 429 else "invalid_request_error"),
            code=code or "engine_refused",
            param=param,
            retry_after=int(wait) if wait.isascii() and wait.isdigit() and len(wait) < 6 else None,
        )
    if status == 503:
        return Refusal(
            503, "the engine is too busy; try again shortly", kind="server_error", code="engine_busy", retry_after=2
        )
    return broken("engine_error")


def _engine_error(body: bytes) -> tuple[str, str | None, str | None, str | None]:
    """Message, type, code and param of an engine's error: OpenAI's form, Anthropic's, or FastAPI's detail."""
    try:
        read: object = json.loads(body)
    except (ValueError, RecursionError):
        return "", None, None, None
    outer = cast("dict[str, Any]", read) if isinstance(read, dict) else {}
    found: object = outer.get("error", outer)
    if isinstance(found, str):
        return found[:_SHOWN], None, None, None
    error = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    message = error.get("message") or error.get("detail") or ""
    text = message if isinstance(message, str) else dumps(message).decode()
    kind, code, param = (
        value if isinstance(value := error.get(name), str) else None for name in ("type", "code", "param")
    )
    return text[:_SHOWN], _snake(kind), code, param


def _snake(kind: str | None) -> str | None:
    """VLLM names some errors by Python's classes; clients look for OpenAI's names."""
    return kind if kind is not None and kind.islower() else None


def charged(exchange: Exchange, written: int) -> int:
    """Tokens that count for the key: the engine's count, else an estimate, so that hanging up early is not free."""
    if exchange.use is not None:
        return exchange.use.total
    if exchange.first is None and not (exchange.sent and exchange.error == "client_gone"):
        return 0
    return written + exchange.bytes_in // 4
