"""The one thread that writes. Callers queue rows; whatever is queued when the thread is free shares one commit.

So 64 concurrent callers that each need a durable row wait for one disk sync, not for 64. Rows of one table keep their
order; a batch is one transaction, so readers see all of it or none. A write that fails (disk full, file damaged) fails
every waiter of its batch, and from then on every call raises the same error: nothing after it can be half-stored.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from agentopt.store._errors import StoreError, store_error

MAX_BATCH = 2000  # rows in one transaction
MAX_QUEUED = 20_000  # beyond this many rows callers wait, so that a slow disk does not fill the memory
_CHUNKS = (64, 16, 4, 1)
Row = tuple[Any, ...]
Work = Callable[[Callable[..., sqlite3.Cursor]], int]
"""Several statements that belong together: gets `execute`, gives a number. What it raises fails the store."""


@dataclass(frozen=True, slots=True)
class Statement:
    """An INSERT up to `VALUES` (many rows go in by one call) and its tail; or, with `width` 0, any statement."""

    sql: str
    width: int = 0
    tail: str = ""
    numbered: bool = False
    """True when callers want the row ids, which forces one call per row."""

    def text(self, rows: int) -> str:
        """The statement for this many rows."""
        if not self.width:
            return self.sql
        one = "(" + ",".join("?" * self.width) + ")"
        return f"{self.sql} VALUES {','.join([one] * rows)} {self.tail}"


class _Entry:
    __slots__ = ("done", "last", "prepare", "rows", "statement", "work")

    def __init__(
        self,
        statement: Statement | None,
        rows: Sequence[Row],
        done: Future[int] | tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None,
        prepare: Callable[[Row], Row] | None,
        work: Work | None = None,
    ) -> None:
        self.statement = statement
        self.rows = rows
        self.done = done
        self.prepare = prepare
        self.work = work
        self.last = 0


class Writer:
    """Owns the writing connection and its thread."""

    def __init__(self, connection: sqlite3.Connection, path: str, guard: AbstractContextManager[Any]) -> None:
        self._connection = connection
        self._path = path
        self._guard = guard  # in-memory stores share one connection with their readers
        self._entries: deque[_Entry] = deque()
        self._ready = threading.Condition()
        self._queued = 0
        self._closing = False
        self._failure: StoreError | None = None
        self._thread = threading.Thread(target=self._work, name="agentopt-store-writer", daemon=True)
        self._thread.start()

    def put(
        self,
        statement: Statement,
        rows: Sequence[Row],
        *,
        prepare: Callable[[Row], Row] | None = None,
    ) -> None:
        """Queue rows and return at once. `prepare` is applied to each row in the writer's thread."""
        self._submit(_Entry(statement, rows, None, prepare))

    def put_wait(
        self, statement: Statement | None, rows: Sequence[Row] = (), *, prepare: Callable[[Row], Row] | None = None
    ) -> int:
        """Queue rows and return, once they and everything queued before are durable, the last row id (if numbered)."""
        done: Future[int] = Future()
        self._submit(_Entry(statement, rows, done, prepare))
        return done.result()

    def work_wait(self, work: Work) -> int:
        """Do `work` in a transaction, after the rows queued before it; gives its number when that is durable."""
        done: Future[int] = Future()
        self._submit(_Entry(None, (), done, None, work))
        return done.result()

    async def aput_wait(
        self, statement: Statement, rows: Sequence[Row], *, prepare: Callable[[Row], Row] | None = None
    ) -> None:
        """Like `put_wait`, without blocking the event loop."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._submit(_Entry(statement, rows, (loop, done), prepare), wait=False)
        await done

    @property
    def idle(self) -> bool:
        """True when nothing is queued or being written."""
        return self._queued == 0

    def check(self) -> None:
        """Raise the error of an earlier write that nobody waited for."""
        if self._failure is not None:
            raise StoreError(*self._failure.args)

    def close(self) -> None:
        """Write what is queued, stop the thread, close the connection; a second call does nothing."""
        with self._ready:
            self._closing = True
            self._ready.notify_all()
        if threading.current_thread() is not self._thread:  # a garbage collection may run this anywhere
            self._thread.join()

    def _submit(self, entry: _Entry, *, wait: bool = True) -> None:
        with self._ready:
            self.check()
            if self._closing:
                raise StoreError(f"The store {self._path} is closed.")
            while wait and self._queued > MAX_QUEUED:
                self._ready.wait()
                self.check()
            self._entries.append(entry)
            self._queued += max(1, len(entry.rows))
            if len(self._entries) == 1:
                self._ready.notify()

    # ---- the writer's thread

    def _work(self) -> None:
        try:
            self._work_until_closed()
        finally:
            with self._guard:
                self._connection.close()

    def _work_until_closed(self) -> None:
        while True:
            with self._ready:
                while not self._entries:
                    if self._closing:
                        return
                    self._ready.wait()
                batch: list[_Entry] = []
                rows = 0
                while self._entries and rows < MAX_BATCH:
                    entry = self._entries.popleft()
                    rows += max(1, len(entry.rows))
                    batch.append(entry)
            failure = self._failure
            if failure is None:
                try:
                    self._write(batch)
                except sqlite3.Error as error:
                    failure = self._failure = store_error(error, self._path)
                except Exception as error:  # noqa: BLE001 - a row that cannot be written must reach whoever waits
                    text = f"The store {self._path} failed: {type(error).__name__}: {error}."
                    failure = self._failure = StoreError(text)
            with self._ready:
                self._queued -= rows
                self._ready.notify_all()
            _answer(batch, failure)

    def _write(self, batch: Iterable[_Entry]) -> None:
        groups: dict[Statement, list[_Entry]] = {}
        works: list[tuple[_Entry, Work]] = []
        for entry in batch:
            if entry.work is not None:
                works.append((entry, entry.work))
            if entry.statement is not None:
                if entry.prepare is not None:
                    entry.rows = [entry.prepare(row) for row in entry.rows]
                groups.setdefault(entry.statement, []).append(entry)
        if not groups and not works:
            return
        with self._guard:
            execute = self._connection.execute
            execute("BEGIN IMMEDIATE")
            try:
                for statement, entries in groups.items():
                    if statement.numbered:
                        for entry in entries:
                            entry.last = execute(statement.text(1), entry.rows[0]).lastrowid or 0
                    else:
                        _insert(execute, statement, [row for entry in entries for row in entry.rows])
                for entry, work in works:
                    entry.last = work(execute)
                execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    execute("ROLLBACK")
                raise


def _insert(execute: Callable[..., sqlite3.Cursor], statement: Statement, rows: list[Row]) -> None:
    """Write rows with few calls: each call gives the interpreter lock away and has to win it back."""
    start = 0
    while start < len(rows):
        count = next(size for size in _CHUNKS if size <= len(rows) - start) if statement.width else 1
        values = [value for row in rows[start : start + count] for value in row]
        execute(statement.text(count), values)
        start += count


def _answer(batch: Iterable[_Entry], failure: StoreError | None) -> None:
    waiting: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for entry in batch:
        done = entry.done
        if isinstance(done, Future):
            if failure is None:
                done.set_result(entry.last)
            else:
                done.set_exception(StoreError(*failure.args))
        elif done is not None:
            waiting.setdefault(done[0], []).append(done[1])
    for loop, futures in waiting.items():
        try:
            loop.call_soon_threadsafe(_settle, futures, failure)
        except RuntimeError:
            continue  # the loop was closed meanwhile: nobody waits any more


def _settle(futures: Iterable[asyncio.Future[None]], failure: StoreError | None) -> None:
    for future in futures:
        if future.done():  # its task was cancelled
            continue
        if failure is None:
            future.set_result(None)
        else:
            future.set_exception(StoreError(*failure.args))
