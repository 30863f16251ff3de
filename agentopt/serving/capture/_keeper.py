"""The thread that writes what was captured: parses, redacts, makes traces, deletes what is too old, and bears with a
store that fails.

A store that is full, locked or gone is tried again, first soon and then once a minute; until then at most one batch is
held here and the rest waits in the queue, whose bound is the recorder's. Nothing that happens here reaches a client.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from agentopt.errors import AgentoptError, UserError
from agentopt.graph import Trace
from agentopt.serving._types import Exchange
from agentopt.serving.capture._forget import DAY, forget_old
from agentopt.serving.capture._record import Call, make_call
from agentopt.serving.capture._redact import Redaction
from agentopt.serving.capture._sessions import Capturing, OpenSession, Sessions
from agentopt.store import Forgotten, Store, StoreError

_BATCH = 64
_POLL = 0.2
_SHORT_POLL = 0.05
"""While old exchanges are being deleted, between two batches."""
_BREATH = 0.0001
"""Least seconds between two exchanges: the event loop shares the interpreter with this thread, and goes first."""
_ROWS = 8
"""Traces that are made ready for the store in one go."""
_LONGEST_WAIT = 60.0
_SUMMARY = 10.0
"""Seconds between two writings of the run's summary."""
_SIGN = 3600.0
"""At most so long between two writings, whatever came: the run's row says that this server is alive."""
JSONDict = dict[str, Any]

_FOR_GOOD = ("SQLITE_NOTADB", "SQLITE_CORRUPT", "SQLITE_READONLY", "SQLITE_CANTOPEN")
"""What waiting does not cure: whoever starts a server is told at once. While it runs, these too only warn."""


class Keeper:
    """Owns the store, the open sessions and the thread. Everything public is safe to call from the event loop."""

    def __init__(
        self,
        opener: Callable[[], Store],
        run_id: str,
        config: Mapping[str, Any],
        redaction: Redaction,
        limits: Capturing,
        *,
        days: float | None = None,
        stored: Callable[[Sequence[str]], None],
        warn: Callable[[str], None],
        news: Callable[[str], None],
    ) -> None:
        self._opener = opener
        self._days = days
        self._stored = stored
        """Told of exchanges that are durable."""
        self._forgetting: Iterator[Forgotten] | None = None
        self._forget_at = 0.0
        self._forget_every = limits.forget_every
        self.forgotten = 0
        """Exchanges that were too old."""
        self._run_id = run_id
        self._config = dict(config)
        self._redaction = redaction
        self._tell = {"warning": warn, "news": news}
        self._sessions = Sessions(limits)
        self._pressing = limits.queue // 2
        """Exchanges that wait, from which on they are not kept waiting for the event loop's sake."""
        self._queue: deque[tuple[Exchange, bytes | None, int]] = deque()
        self._ended: list[OpenSession] = []
        self._single: list[Call] = []
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._failures = 0
        self._retry_at = 0.0
        self._summed = 0.0
        self._summary: JSONDict = {}
        self.store: Store | None = None
        self.trouble: str | None = None
        self._put = 0
        self._done = 0
        self.captured = 0
        self.drops: dict[str, int] = {}
        self.tokens = 0
        self.taken_bytes = 0
        """Of the queue, by this thread; the recorder counts what it put in."""

    @property
    def waiting(self) -> int:
        """Exchanges that are not stored yet."""
        return self._put - self._done

    @property
    def queued(self) -> int:
        """Exchanges that this thread has not looked at."""
        return len(self._queue)

    @property
    def sessions(self) -> int:
        """Open sessions."""
        return len(self._sessions)

    def put(self, exchange: Exchange, reply: bytes | None, size: int) -> None:
        """Queue one exchange."""
        self._put += 1
        self._queue.append((exchange, reply, size))

    def drop(self, reason: str, count: int = 1) -> None:
        """Count what is not captured."""
        self.drops[reason] = self.drops.get(reason, 0) + count

    def start(self) -> None:
        """Open the store and start the thread.

        Raises:
            UserError: the file is no store of ours, is damaged or cannot be written, or its folder cannot be made.
                Trouble that passes (a full disk, a lock) only warns.
        """
        try:
            self._open()
        except UserError:
            raise
        except AgentoptError as error:
            code = getattr(error.__cause__, "sqlite_errorname", "")
            if code.startswith(_FOR_GOOD):
                raise UserError(f"--capture: {error}") from error
            self._failed(error)
        self._thread = threading.Thread(target=self._work, name="agentopt-capture", daemon=True)
        self._thread.start()

    def close(self, seconds: float) -> int:
        """Write what is there, at most for so long; gives how many exchanges were lost. A second call does nothing."""
        thread, self._thread = self._thread, None
        if thread is None:
            return 0
        self._closing.set()
        self._wake.set()
        thread.join(seconds)
        return self.waiting

    # ---- the thread

    def _work(self) -> None:
        while True:
            closing = self._closing.is_set()
            now = time.monotonic()
            if self.store is not None or now >= self._retry_at or closing:
                self._turn(closing)
            if closing and (self.trouble is not None or not self.waiting):
                break
            if not self._queue or self.store is None:
                self._wake.wait(_POLL if self._forgetting is None else _SHORT_POLL)
        self._finish()

    def _turn(self, closing: bool) -> None:
        """One batch: everything that is due, written and known to be durable, or held for the next try."""
        try:
            store = self.store or self._open()
            if not self._single:
                for _ in range(min(_BATCH, len(self._queue))):
                    began = time.thread_time()
                    self._take(*self._queue.popleft())
                    self._breathe(time.thread_time() - began)
            self._write(store, everything=closing and not self._queue)
            if self._days is not None and not closing:
                self._forget_some(store, self._days)
            if self._failures:
                self._sum_up(store, time.monotonic(), force=True)  # a file may open and still take no writes
                self._failures = 0
                self._resumed()
        except (AgentoptError, OSError) as error:
            self._failed(error)
        except Exception:  # noqa: BLE001 - a batch without a stored form must not end the capture of all others
            self._discard()

    def _breathe(self, worked: float) -> None:
        """Leave the interpreter to the event loop for as long as this thread has had it, unless too many wait."""
        hurry = self._closing.is_set() or len(self._queue) > self._pressing
        time.sleep(_BREATH if hurry else max(_BREATH, worked))

    def _take(self, exchange: Exchange, reply: bytes | None, size: int) -> None:
        self.taken_bytes += size
        try:
            call = make_call(exchange, reply, self._redaction)
            if exchange.session is None:
                self._single.append(call)
            else:
                key = (None if exchange.key is None else exchange.key.id, exchange.session)
                name = self._redaction.text(exchange.session)
                self._ended += self._sessions.add(key, name, call, time.monotonic())
            self.tokens += 0 if exchange.use is None else exchange.use.total
        except Exception:  # noqa: BLE001 - an exchange that no one foresaw must not end the capture of all others
            self._lost(1)

    def _write(self, store: Store, *, everything: bool) -> None:
        now = time.monotonic()
        self._ended += self._sessions.idle(now)
        sessions = [item for item in self._ended if item.unwritten] + self._sessions.due(now, everything=everything)
        for place, call in enumerate(self._single, start=1):
            store.put_trace(self._run_id, call.id, Trace([call.op(0, {}, None)], name=call.id).to_dict())
            store.put_exchange(self._run_id, call.id, call.id, call.index)
            if place % _ROWS == 0:
                time.sleep(_BREATH)
        costs: list[tuple[OpenSession, list[Call], float, float]] = []
        for session in sessions:
            began = time.monotonic()
            self._strip(store, session, session.unwritten)
            store.put_trace(self._run_id, session.trace_id, session.trace().to_dict())
            new = session.calls[len(session.calls) - session.unwritten :]
            for call in new:
                store.put_exchange(self._run_id, call.id, session.trace_id, {**call.index, "session": session.name})
            costs.append((session, new, began, time.monotonic()))
        store.flush()  # also with nothing to write: it tells of a store that fails, on which feedback waits too
        stored = [call.id for call in self._single] + [call.id for _, new, _, _ in costs for call in new]
        self.captured += len(stored)
        self._done += len(stored)
        self._stored(stored)
        for session, _, began, done in costs:
            self._sessions.written(session, began, done)
        self._single, self._ended = [], []
        for session in sessions:
            # Somebody may have deleted an exchange while the trace that still had it was being written.
            while self._strip(store, session, 0):
                if session.calls:
                    store.put_trace(self._run_id, session.trace_id, session.trace().to_dict())
                    store.flush()
                else:
                    store.drop_trace(session.trace_id)
        self._sum_up(store, now)

    def _strip(self, store: Store, session: OpenSession, unwritten: int) -> bool:
        """Take out of a session what is in the store no longer; whether there was something."""
        written = [call.id for call in session.calls[: len(session.calls) - unwritten]]
        gone = set(written) - store.stored(written)
        if gone:
            self._sessions.strip(session, gone)
        return bool(gone)

    def _forget_some(self, store: Store, days: float) -> None:
        """One batch of what is too old, if it is time."""
        if self._forgetting is None:
            if time.monotonic() < self._forget_at:
                return
            self._forgetting = forget_old(store, time.time() - days * DAY, keep=self._run_id)
        found = next(self._forgetting, None)
        if found is None:
            self._forgetting = None
            self._forget_at = time.monotonic() + self._forget_every
        else:
            self.forgotten += found.exchanges

    def _discard(self) -> None:
        sessions = [*self._ended, *self._sessions.due(0.0, everything=True)]
        self._lost(len(self._single) + sum(session.unwritten for session in sessions))
        for session in sessions:
            session.unwritten = 0
        self._single, self._ended = [], []

    def _lost(self, count: int) -> None:
        self.drop("unreadable", count)
        self._done += count

    def _sum_up(self, store: Store, now: float, *, force: bool = False) -> None:
        summary: JSONDict = {"captured": self.captured, "dropped": dict(self.drops), "tokens": self.tokens}
        if self._days is not None:
            summary["forgotten"] = self.forgotten
        since = now - self._summed
        if force or since >= _SIGN or (summary != self._summary and since >= _SUMMARY):
            store.update_run(self._run_id, summary=summary)
            self._summary, self._summed = summary, now

    def _open(self) -> Store:
        store = self._opener()
        try:
            if store.run(self._run_id) is None:
                store.create_run(self._run_id, self._config)
        except BaseException:
            with suppress(StoreError):
                store.close()
            raise
        self.store = store
        return store

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        wait = min(2.0 ** (self._failures - 1), _LONGEST_WAIT)
        self._retry_at = time.monotonic() + wait
        self._forgetting = None
        store, self.store = self.store, None
        if store is not None:
            with suppress(StoreError):  # it says again what it said before
                store.close()
        first = self.trouble is None
        self.trouble = str(error).replace(", then resume the run", "").replace(", then resume", "")
        if first:
            self._say("warning", f"capture stands still, requests are answered as before: {self.trouble}")

    def _resumed(self) -> None:
        self.trouble = None
        dropped = sum(self.drops.values())
        self._say("news", f"capture goes on; {dropped} exchanges were dropped since the start")

    def _say(self, how: str, text: str) -> None:
        with suppress(RuntimeError):  # of an event loop that has ended meanwhile: nobody listens any more
            self._tell[how](text)

    def _finish(self) -> None:
        store, self.store = self.store, None
        if store is None:
            return
        try:
            self._sum_up(store, 0.0, force=True)
            store.update_run(self._run_id, status="done")
            store.close()
        except StoreError as error:
            self.trouble = str(error)
            self._say("warning", f"the end of the capture could not be written: {error}")
