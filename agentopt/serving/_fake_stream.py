"""One streamed reply of the fake engine: words at their times, a full socket waited for, and the faults on the way."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agentopt.serving._fake_wire import Shape

STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"server: fake\r\nset-cookie: engine=1\r\ntransfer-encoding: chunked\r\n\r\n"
)
GARBAGE = b"\x00\x01 this is no HTTP \xff\xfe\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Script:
    """How one reply goes; the object `fake` of a request's body, over what the engine was started with."""

    text: str | None = None
    """Instead of repeating the last message."""
    chunks: int = 0
    """Words of the reply, repeated until there are so many; 0: as they are."""
    rate: float = 0.0
    """Words per second; 0: at once."""
    wait: float = 0.0
    """Seconds before anything is answered."""
    tool: dict[str, Any] | None = None
    """A tool call, {"name", "arguments"}, at the end of the reply (chat)."""
    stamp: bool = False
    """Each word of a stream is when it was sent: "@" and nanoseconds of the monotonic clock."""
    status: int = 0
    """Answer with this error."""
    garbage: bool = False
    """Answer with bytes that are no HTTP."""
    not_json: bool = False
    """Answer 200 with a body that is no JSON, or a stream whose events are none."""
    die_after: int | None = None
    """The connection breaks after so many words; 0: before the head. A whole reply breaks in its middle."""
    hang_after: int | None = None
    """Nothing more comes after so many words; 0: not even the head."""
    hold_after: int | None = None
    """Nothing more comes after so many words until `FakeEngine.go_on()`, or `POST /control` with {"go_on": true}."""
    exit_after: int | None = None
    """The process ends (status 9) after so many words. Only with --control."""
    no_done: bool = False
    """The stream ends properly but without its last event."""
    split: bool = False
    """Each event is written in three parts, cut inside characters and line ends."""


class Stream:
    """Writes one reply; `done` is called when it ended properly, never after `stop`."""

    def __init__(self, transport: asyncio.Transport, shape: Shape, words: list[str], script: Script) -> None:
        self._transport = transport
        self._shape = shape
        self._words = words
        self._script = script
        self._loop = asyncio.get_running_loop()
        self._place = 0
        self._full = False
        self._timer: asyncio.Handle | None = None
        self._start = self._loop.time()
        self._held = self._gone = False
        self.done: Callable[[int], None] = lambda _: None
        self.hold: Callable[[Callable[[], None]], None] = lambda _: None
        """Given what goes on with the reply, to be called when it may."""

    def start(self) -> None:
        """Head, opening, then words."""
        if self._fault():
            return
        self._transport.write(STREAM_HEAD)
        self._send(self._shape.opening())
        self._holding()
        self._pump()

    def stop(self) -> None:
        """The connection is gone."""
        if self._timer is not None:
            self._timer.cancel()
        self._full = self._gone = True

    def pause(self) -> None:
        """The socket is full."""
        self._full = True

    def resume(self) -> None:
        """The socket takes bytes again."""
        self._full = False
        if self._timer is None:
            self._pump()

    def _holding(self) -> None:
        if self._script.hold_after == self._place:
            self._held = True
            self.hold(self._go_on)

    def _go_on(self) -> None:
        self._held = False
        if not self._gone:
            self._pump()

    def _send(self, data: bytes) -> None:
        if not data:
            return
        if self._script.not_json:
            data = b"data: {not json\n\n"
        parts = [data]
        if self._script.split:
            third = max(1, len(data) // 3)
            parts = [part for part in (data[:third], data[third:-1], data[-1:]) if part]
        for part in parts:
            self._transport.write(b"%x\r\n%b\r\n" % (len(part), part))

    def _pump(self) -> None:
        """Everything that is due; then a timer for the next word."""
        self._timer = None
        rate = self._script.rate
        while self._place < len(self._words):
            if self._full or self._held:
                return
            if rate:
                due = self._start + (self._place + 1) / rate
                if self._loop.time() < due:
                    self._timer = self._loop.call_at(due, self._pump)
                    return
            word = f" @{time.monotonic_ns()}" if self._script.stamp else self._words[self._place]
            self._send(self._shape.piece(word))
            self._place += 1
            if self._fault():
                return
            self._holding()
            if not rate and self._place % 64 == 0:  # others get their turn
                self._timer = self._loop.call_soon(self._pump)
                return
        if not self._held:
            self._close()

    def _fault(self) -> bool:
        if self._script.exit_after == self._place:
            os._exit(9)
        if self._script.die_after == self._place:
            # What was written goes out first: the transport's buffer is empty unless the socket is full.
            self._transport.close() if self._place else self._transport.abort()
            return True
        return self._script.hang_after == self._place

    def _close(self) -> None:
        events = self._shape.closing(len(self._words), "".join(self._words))
        if self._script.no_done:
            events = events[:-1]
        for one in events:
            self._send(one)
        self._transport.write(b"0\r\n\r\n")
        self.done(len(self._words))
