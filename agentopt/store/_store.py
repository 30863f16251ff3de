"""The store: runs, events, candidates, evaluations, model replies, traces, captured traffic, capsules. One SQLite file.

Speaks plain JSON dicts only and knows nothing of what they mean. Every write goes through one thread per open store;
`put_reply`, `append_event`, `create_run` and `update_run` return when the row is durable, the others are queued and
durable in order (`flush` waits). A read sees everything this store object has queued before. Any number of processes
may read while one writes; writers take turns. `kill -9` at any moment leaves a readable file without the queued rows.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from agentopt.errors import UserError
from agentopt.store._connect import connect, migrate
from agentopt.store._errors import StoreError, store_error
from agentopt.store._traffic import Traffic
from agentopt.store._writer import Row, Statement, Writer

DEFAULT_PATH = ".agentopt/agentopt.db"
JSONDict = dict[str, Any]

_KEY = ("candidate_hash", "dataset_id", "example_id", "repeat", "seed")
_PUT_RUN = Statement("INSERT INTO runs (id, created, updated, status, config, summary)", 6)
_UPDATE_RUN = Statement(
    "UPDATE runs SET updated = ?, status = coalesce(?, status), summary = coalesce(?, summary) WHERE id = ?"
)
_PUT_EVENT = Statement("INSERT INTO events (run_id, time, kind, payload)", 4, numbered=True)
_PUT_CANDIDATE = Statement(
    "INSERT INTO candidates (run_id, hash, payload)",
    3,
    "ON CONFLICT (run_id, hash) DO UPDATE SET payload = excluded.payload",
)
_PUT_EVALUATION = Statement(
    "INSERT OR REPLACE INTO evaluations (run_id, candidate_hash, dataset_id, example_id, repeat, seed, payload)", 7
)
_PUT_REPLY = Statement("INSERT OR REPLACE INTO replies (key, created, model, reply, body)", 5)
_PUT_TRACE = Statement("INSERT OR REPLACE INTO traces (id, run_id, created, body)", 4)
_PUT_CAPSULE = Statement("INSERT OR IGNORE INTO capsules (key, created, payload)", 3)
_REPLACE_CAPSULE = Statement("INSERT OR REPLACE INTO capsules (key, created, payload)", 3)


@dataclass(frozen=True, slots=True)
class RunRow:
    """One run. Times are seconds since the epoch."""

    id: str
    created: float
    updated: float
    status: str
    config: JSONDict
    summary: JSONDict


@dataclass(frozen=True, slots=True)
class EventRow:
    """One event. `seq` grows over the whole file; `time` is seconds since the epoch."""

    seq: int
    time: float
    kind: str
    payload: JSONDict


class _Readers:
    """Reading connections, handed from thread to thread."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.idle: deque[sqlite3.Connection] = deque()
        self.closed = False

    def take(self) -> sqlite3.Connection:
        try:
            return self.idle.pop()
        except IndexError:
            return connect(self.path, write=False)

    def give(self, connection: sqlite3.Connection) -> None:
        if self.closed:
            connection.close()
        else:
            self.idle.append(connection)

    def close(self) -> None:
        self.closed = True
        while self.idle:
            self.idle.pop().close()


def _close(writer: Writer, readers: _Readers) -> None:
    readers.close()
    writer.close()


class Store(Traffic):
    """An open store. Use `Store.open`, and `close` it (or use it as a context manager). Safe to use from any thread."""

    def __init__(self, connection: sqlite3.Connection, path: str) -> None:
        self.path = path
        memory = path == ":memory:"
        self._shared = connection if memory else None
        self._guard = threading.RLock() if memory else nullcontext()
        self._readers = _Readers(path)
        self._writer = Writer(connection, path, self._guard)
        # Also runs at interpreter exit, so rows queued by a program that forgot to close are not lost.
        self._finalizer = weakref.finalize(self, _close, self._writer, self._readers)

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None = None) -> Self:
        """Open or make a store; without a path, the file AGENTOPT_DB names, else `.agentopt/agentopt.db`.

        Raises:
            UserError: the file belongs to another program or to a newer agentopt, or its folder cannot be made.
            StoreError: the file cannot be opened, is damaged or locked.
        """
        name = os.fspath(path) if path is not None else os.environ.get("AGENTOPT_DB") or DEFAULT_PATH
        if name != ":memory:":
            _make_room(Path(name))
        try:
            connection = connect(name, write=True)
        except sqlite3.Error as error:
            raise store_error(error, name) from error
        try:
            migrate(connection, name)
        except BaseException as error:
            connection.close()
            if isinstance(error, sqlite3.Error):
                raise store_error(error, name) from error
            raise
        return cls(connection, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({self.path!r})"

    def close(self) -> None:
        """Write what is queued and close; a second call does nothing.

        Raises:
            StoreError: a queued write had failed.
        """
        if self._finalizer.alive:
            self._finalizer()
            self._writer.check()

    def flush(self) -> None:
        """Return when everything queued so far is durable.

        Raises:
            StoreError: a queued write failed.
        """
        self._writer.put_wait(None)

    def compact(self) -> None:
        """Rewrite the file so that nothing of what was deleted is left in it, and give all free space back.

        Takes as long as copying the file and as much space again; whoever writes meanwhile waits.

        Raises:
            StoreError: another process wrote for too long, or there is too little space.
        """
        self.flush()
        if self._shared is not None:
            return
        try:
            connection = connect(self.path, write=True)
            try:
                connection.execute("VACUUM")
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise store_error(error, self.path) from error

    # ---- replies

    def get_reply(self, key: str) -> JSONDict | None:
        """The cached reply to the request with this key, or None."""
        rows = self._read("SELECT reply FROM replies WHERE key = ?", (_reply_key(key),), settle=False)
        return json.loads(rows[0][0]) if rows else None

    def put_reply(self, key: str, reply: JSONDict, *, model: str, request: JSONDict | None = None) -> None:
        """Cache a reply and return when it is durable: what was paid for is kept before it is used."""
        self._writer.put_wait(_PUT_REPLY, [_reply_row(key, reply, model, request)], prepare=_pack)

    async def aput_reply(self, key: str, reply: JSONDict, *, model: str, request: JSONDict | None = None) -> None:
        """`put_reply` for coroutines: the event loop goes on while concurrent callers share one commit."""
        await self._writer.aput_wait(_PUT_REPLY, [_reply_row(key, reply, model, request)], prepare=_pack)

    # ---- runs and events

    def create_run(self, run_id: str, config: JSONDict, *, status: str = "running") -> None:
        """Add a run.

        Raises:
            UserError: the id is taken.
        """
        now = time.time()
        if self._read("SELECT 1 FROM runs WHERE id = ?", (run_id,)):
            raise UserError(f"The store {self.path} already has a run {run_id!r}; resume it or choose another id.")
        self._writer.put_wait(_PUT_RUN, [(run_id, now, now, status, _dumps(config), "{}")])

    def update_run(self, run_id: str, *, status: str | None = None, summary: JSONDict | None = None) -> None:
        """Change a run's status, its summary, or both; None leaves the value as it is."""
        text = None if summary is None else _dumps(summary)
        self._writer.put_wait(_UPDATE_RUN, [(time.time(), status, text, run_id)])

    def run(self, run_id: str) -> RunRow | None:
        """The run with this id, or the only one whose id begins with it; None when there is none.

        Raises:
            UserError: several runs begin with `run_id`.
        """
        found = self._runs("WHERE id = ?", (run_id,))
        if not found and run_id:
            found = self._runs("WHERE substr(id, 1, ?) = ?", (len(run_id), run_id))
        if len(found) > 1:
            names = ", ".join(row.id for row in found[:5])
            raise UserError(f"{run_id!r} is the beginning of {len(found)} runs ({names}); give more of the id.")
        return found[0] if found else None

    def runs(self) -> list[RunRow]:
        """All runs, oldest first."""
        return self._runs("", ())

    def _runs(self, where: str, values: Row) -> list[RunRow]:
        rows = self._read(
            f"SELECT id, created, updated, status, config, summary FROM runs {where} ORDER BY created, id", values
        )
        return [RunRow(row[0], row[1], row[2], row[3], json.loads(row[4]), json.loads(row[5])) for row in rows]

    def append_event(self, run_id: str, kind: str, payload: JSONDict) -> int:
        """Add an event and return its number."""
        return self._writer.put_wait(_PUT_EVENT, [(run_id, time.time(), kind, _dumps(payload))])

    def events(self, run_id: str, after: int = 0) -> list[EventRow]:
        """The run's events with a number above `after`, in order."""
        rows = self._read(
            "SELECT seq, time, kind, payload FROM events WHERE run_id = ? AND seq > ? ORDER BY seq", (run_id, after)
        )
        return [EventRow(row[0], row[1], row[2], json.loads(row[3])) for row in rows]

    # ---- candidates and evaluations

    def put_candidate(self, run_id: str, hash: str, payload: JSONDict) -> None:
        """Add or replace a candidate."""
        self._writer.put(_PUT_CANDIDATE, [(run_id, hash, _dumps(payload))])

    def candidates(self, run_id: str) -> dict[str, JSONDict]:
        """Hash to payload, in the order in which they were first added."""
        rows = self._read("SELECT hash, payload FROM candidates WHERE run_id = ? ORDER BY rowid", (run_id,))
        return {row[0]: json.loads(row[1]) for row in rows}

    def put_evaluations(self, run_id: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add or replace evaluation rows; each holds candidate_hash, dataset_id, example_id, repeat, seed and more."""
        self._writer.put(_PUT_EVALUATION, [_evaluation_row(run_id, row) for row in rows])

    def evaluations(
        self, run_id: str, candidate_hash: str | None = None, dataset_id: str | None = None
    ) -> list[JSONDict]:
        """The run's evaluation rows, of one candidate and one dataset where given."""
        where, values = "run_id = ?", [run_id]
        if candidate_hash is not None:
            where, values = f"{where} AND candidate_hash = ?", [*values, candidate_hash]
        if dataset_id is not None:
            where, values = f"{where} AND dataset_id = ?", [*values, dataset_id]
        rows = self._read(
            f"SELECT {', '.join(_KEY)}, payload FROM evaluations WHERE {where} ORDER BY rowid", tuple(values)
        )
        return [{**dict(zip(_KEY, row[:5], strict=True)), **json.loads(row[5])} for row in rows]

    # ---- traces and capsules

    def put_trace(self, run_id: str, trace_id: str, payload: JSONDict) -> None:
        """Add or replace a trace (compressed)."""
        self._writer.put(_PUT_TRACE, [(trace_id, run_id, time.time(), _dumps(payload))], prepare=_pack)

    def trace(self, trace_id: str) -> JSONDict | None:
        """The trace with this id, or None."""
        rows = self._read("SELECT body FROM traces WHERE id = ?", (trace_id,))
        return json.loads(zlib.decompress(rows[0][0])) if rows else None

    def traces(self, run_id: str) -> list[str]:
        """The ids of the run's traces, oldest first."""
        rows = self._read("SELECT id FROM traces WHERE run_id = ? ORDER BY created, rowid", (run_id,))
        return [row[0] for row in rows]

    def put_capsule(self, key: str, payload: JSONDict, *, replace: bool = False) -> None:
        """Add a capsule; one that is there stays as it is, unless `replace` says that it is damaged."""
        statement = _REPLACE_CAPSULE if replace else _PUT_CAPSULE
        self._writer.put(statement, [(key, time.time(), _dumps(payload))])

    def get_capsule(self, key: str) -> JSONDict | None:
        """The capsule with this key, or None."""
        rows = self._read("SELECT payload FROM capsules WHERE key = ?", (key,))
        return json.loads(rows[0][0]) if rows else None

    def capsule_keys(self, prefix: str = "") -> list[tuple[str, float]]:
        """The keys that begin with `prefix`, each with the time of its row (seconds since the epoch), oldest first."""
        rows = self._read(
            "SELECT key, created FROM capsules WHERE substr(key, 1, ?) = ? ORDER BY created, key", (len(prefix), prefix)
        )
        return [(row[0], row[1]) for row in rows]

    def _read(self, sql: str, values: Row, *, settle: bool = True) -> list[Row]:
        if not self._finalizer.alive:
            raise StoreError(f"The store {self.path} is closed.")
        if settle and not self._writer.idle:
            self.flush()
        try:
            if self._shared is not None:
                with self._guard:
                    return self._shared.execute(sql, values).fetchall()
            connection = self._readers.take()
            try:
                return connection.execute(sql, values).fetchall()
            finally:
                self._readers.give(connection)
        except sqlite3.Error as error:
            raise store_error(error, self.path) from error


def _make_room(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a store file; set AGENTOPT_DB to a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The folder {path.parent} for the store cannot be made ({error.strerror}); set AGENTOPT_DB to a file "
            "in a folder that can be written."
        ) from error


def _dumps(value: Any) -> str:
    # ASCII: half a surrogate pair in a model's reply has no UTF-8 form.
    return json.dumps(value, separators=(",", ":"))


def _reply_key(key: str) -> bytes:
    try:
        return bytes.fromhex(key) if len(key) == 64 else key.encode()
    except ValueError:
        return key.encode()


def _reply_row(key: str, reply: JSONDict, model: str, request: JSONDict | None) -> Row:
    body = None if request is None else _dumps(request)
    return (_reply_key(key), time.time(), model, _dumps(reply), body)


def _pack(row: Row) -> Row:
    """Compress the last column; done in the writer's thread."""
    body = row[-1]
    return row if body is None else (*row[:-1], zlib.compress(body.encode("ascii"), 6))


def _evaluation_row(run_id: str, row: Mapping[str, Any]) -> Row:
    rest = {name: value for name, value in row.items() if name not in _KEY}
    return (run_id, *(row[name] for name in _KEY), _dumps(rest))
