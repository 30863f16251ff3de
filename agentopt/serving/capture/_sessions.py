"""Sessions: the exchanges of one run of a client's agent, gathered into one trace while they come in.

A trace is written anew as it grows, but at a bounded cost: a session whose trace took long to write waits longer for
the next time. A session ends when nothing came for a while, when it has become too long (what follows is a trace of its
own), or when there are too many; nobody has to close one.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from agentopt.graph import OpRecord, Trace
from agentopt.serving.capture._record import Call, link

JSONDict = dict[str, Any]
_SHARE = 20.0
"""A session's trace is written again when so many times as long as the last writing took have passed."""


@dataclass(slots=True)
class Capturing:
    """Bounds of capture. What goes beyond is dropped and counted, or written as a trace of its own."""

    queue: int = 2000
    """Exchanges that wait to be written."""
    queue_bytes: int = 64 << 20
    """Their requests and replies together."""
    exchange_bytes: int = 2 << 20
    """The request and reply of one exchange; one that is longer is dropped."""
    session_idle: float = 1800.0
    """Seconds without an exchange after which a session is over."""
    sessions: int = 1000
    """Open ones; the one that was idle longest ends first."""
    sessions_bytes: int = 128 << 20
    """What all open sessions hold in memory."""
    session_calls: int = 200
    """Exchanges in one trace."""
    session_bytes: int = 8 << 20
    """Of one trace."""
    remembered: int = 20_000
    """Newest exchanges whose feedback is taken even where the exchange itself was not stored."""
    forget_every: float = 3600.0
    """Seconds from the end of one deletion of what is too old to the next."""


@dataclass(slots=True)
class OpenSession:
    """One trace that may still grow."""

    trace_id: str
    name: str
    key: tuple[str | None, str]
    calls: list[Call] = field(default_factory=list[Call])
    unwritten: int = 0
    """Calls at the end of `calls` that are not stored yet."""
    size: int = 0
    seen: float = 0.0
    not_before: float = 0.0

    def trace(self) -> Trace:
        """All calls in order of arrival, inside one call of the client's agent."""
        ordered = sorted(self.calls, key=lambda call: call.started)
        places = {call.id: place for place, call in enumerate(ordered)}
        root = len(ordered)
        ops = [call.op(place, places, root) for place, call in enumerate(ordered)]
        began, ended = ordered[0].started, max(call.ended for call in ordered)
        ops.append(
            OpRecord(
                root,
                "session",
                "agent",
                output=ordered[-1].output,
                parents=tuple((place, "nested") for place in range(root)),
                started=began,
                duration=ended - began,
                error=ordered[-1].error,
                meta={"session": self.name},
            )
        )
        return Trace(ops, name=f"session {self.name}")


class Sessions:
    """The open ones, the one that was idle longest first. Used by the writing thread alone."""

    def __init__(self, limits: Capturing) -> None:
        self._limits = limits
        self._open: OrderedDict[tuple[str | None, str], OpenSession] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._open)

    def add(self, key: tuple[str | None, str], name: str, call: Call, now: float) -> list[OpenSession]:
        """Put the call into its session; gives the sessions that ended by that and are to be written."""
        ended: list[OpenSession] = []
        session = self._open.get(key)
        if session is not None and self._full(session, call):
            ended.append(self._close(key))
            session = None
        if session is None:
            session = self._open[key] = OpenSession(f"ses_{secrets.token_hex(16)}", name, key)
        link(call, session.calls[-8:])
        session.calls.append(call)
        session.unwritten += 1
        session.size += call.size
        self._bytes += call.size
        session.seen = now
        self._open.move_to_end(key)
        while len(self._open) > 1 and (
            len(self._open) > self._limits.sessions or self._bytes > self._limits.sessions_bytes
        ):
            ended.append(self._close(next(iter(self._open))))
        return ended

    def idle(self, now: float) -> list[OpenSession]:
        """Sessions that ended because nothing came."""
        over = [key for key, session in self._open.items() if now - session.seen > self._limits.session_idle]
        return [self._close(key) for key in over]

    def due(self, now: float, *, everything: bool = False) -> list[OpenSession]:
        """Open sessions whose trace is to be written now."""
        return [item for item in self._open.values() if item.unwritten and (everything or now >= item.not_before)]

    def strip(self, session: OpenSession, gone: Collection[str]) -> None:
        """Take calls out of a session that were deleted from the store: they must not be written again."""
        size = sum(call.size for call in session.calls if call.id in gone)
        session.calls = [call for call in session.calls if call.id not in gone]
        for call in session.calls:
            call.parents = [parent for parent in call.parents if parent.id not in gone]
            call.after = None if call.after is None or call.after.id in gone else call.after
        session.size -= size
        if self._open.get(session.key) is session:
            self._bytes -= size

    @staticmethod
    def written(session: OpenSession, began: float, now: float) -> None:
        """The trace as it is now is stored; that took from `began` to `now`."""
        session.unwritten = 0
        session.not_before = now + _SHARE * (now - began)

    def _full(self, session: OpenSession, call: Call) -> bool:
        limits = self._limits
        return len(session.calls) >= limits.session_calls or session.size + call.size > limits.session_bytes

    def _close(self, key: tuple[str | None, str]) -> OpenSession:
        session = self._open.pop(key)
        self._bytes -= session.size
        return session
