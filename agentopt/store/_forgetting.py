"""Deleting captured exchanges: each batch is one transaction that leaves traces, exchanges and feedback in agreement.

`secure_delete` overwrites what is deleted. Free pages go back to the file system a few at a time, in a file that was
made for that (`auto_vacuum`); in an older one they are used again, until `Store.compact` rewrites it.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

JSONDict = dict[str, Any]
Execute = Callable[..., sqlite3.Cursor]
Cut = Callable[[JSONDict, set[str]], JSONDict | None]
"""(trace, ids of exchanges) -> the trace without them; None when nothing is left."""
_PAGES = 256
"""Given back at a time: more than one batch makes free."""


@dataclass(frozen=True, slots=True)
class Forgotten:
    """How much was deleted."""

    exchanges: int = 0
    traces: int = 0
    """Deleted, or written anew without what was deleted."""
    feedback: int = 0
    runs: int = 0

    def __add__(self, other: Forgotten) -> Forgotten:
        return Forgotten(
            self.exchanges + other.exchanges,
            self.traces + other.traces,
            self.feedback + other.feedback,
            self.runs + other.runs,
        )


def forget(execute: Execute, ids: Sequence[str], cut: Cut) -> Forgotten:
    """Delete these exchanges, what was said of them, and their part of the traces."""
    execute("PRAGMA secure_delete = ON")
    given = (json.dumps(list(ids)),)
    chosen = "IN (SELECT value FROM json_each(?))"
    traces: dict[str, set[str]] = {}
    for exchange_id, trace_id in execute(f"SELECT id, trace_id FROM exchanges WHERE id {chosen}", given).fetchall():
        traces.setdefault(trace_id, set()).add(exchange_id)
    exchanges = 0
    for trace_id, gone in traces.items():
        exchanges += _forget_in(execute, trace_id, gone, cut)
    exchanges += execute(f"DELETE FROM exchanges WHERE id {chosen}", given).rowcount
    feedback = execute(f"DELETE FROM feedback WHERE exchange_id {chosen}", given).rowcount
    return Forgotten(exchanges, len(traces), feedback)


def _forget_in(execute: Execute, trace_id: str, gone: set[str], cut: Cut) -> int:
    """Cut them out of one trace; gives how many exchanges besides had to go because the trace cannot be read."""
    rest: JSONDict | None = None
    besides = 0
    if gone != {trace_id}:  # one without a session is alone in its trace, which has its id
        row = execute("SELECT body FROM traces WHERE id = ?", (trace_id,)).fetchone()
        try:
            rest = None if row is None else cut(json.loads(zlib.decompress(row[0])), gone)
        except Exception:  # noqa: BLE001 - what cannot be read cannot be cut: all of it goes
            besides = execute("DELETE FROM exchanges WHERE trace_id = ?", (trace_id,)).rowcount
    if rest is None:
        execute("DELETE FROM traces WHERE id = ?", (trace_id,))
    else:
        body = zlib.compress(json.dumps(rest, separators=(",", ":")).encode("ascii"), 6)
        execute("UPDATE traces SET body = ? WHERE id = ?", (body, trace_id))
    return besides


def drop_trace(execute: Execute, trace_id: str) -> Forgotten:
    """Delete one trace."""
    execute("PRAGMA secure_delete = ON")
    return Forgotten(traces=execute("DELETE FROM traces WHERE id = ?", (trace_id,)).rowcount)


def forget_leftovers(execute: Execute, run_id: str, before: float, limit: int) -> Forgotten:
    """Delete a run's old feedback and old traces that no exchange belongs to (any more)."""
    execute("PRAGMA secure_delete = ON")
    feedback = execute(
        "DELETE FROM feedback WHERE seq IN (SELECT seq FROM feedback WHERE run_id = ? AND time < ? AND NOT EXISTS"
        " (SELECT 1 FROM exchanges WHERE id = feedback.exchange_id) ORDER BY seq LIMIT ?)",
        (run_id, before, limit),
    ).rowcount
    # A trace is written just before the exchanges in it: of one this old, all exchanges were old and are gone.
    traces = execute(
        "DELETE FROM traces WHERE id IN (SELECT id FROM traces WHERE run_id = ? AND created < ? ORDER BY created"
        " LIMIT ?)",
        (run_id, before - 60, limit),
    ).rowcount
    return Forgotten(traces=traces, feedback=feedback)


def forget_feedback(execute: Execute, key: str, before: float | None) -> Forgotten:
    """Delete what a key said of exchanges that are not there."""
    execute("PRAGMA secure_delete = ON")
    feedback = execute(
        "DELETE FROM feedback WHERE json_extract(payload, '$.key') = ? AND time < coalesce(?, time + 1)"
        " AND NOT EXISTS (SELECT 1 FROM exchanges WHERE id = feedback.exchange_id)",
        (key, before),
    ).rowcount
    return Forgotten(feedback=feedback)


def forget_empty_runs(execute: Execute, before: float, silent: float, keep: str) -> Forgotten:
    """Delete old runs of servers that have nothing (any more). One that runs says so every hour: `silent` is later."""
    runs = execute(
        "DELETE FROM runs WHERE json_extract(config, '$.kind') = 'serve' AND created < ? AND id <> ?"
        " AND (status <> 'running' OR updated < ?)"
        " AND NOT EXISTS (SELECT 1 FROM exchanges WHERE run_id = runs.id)"
        " AND NOT EXISTS (SELECT 1 FROM feedback WHERE run_id = runs.id)"
        " AND NOT EXISTS (SELECT 1 FROM traces WHERE run_id = runs.id)",
        (before, keep, silent),
    ).rowcount
    return Forgotten(runs=runs)


def release(execute: Execute) -> int:
    """Give some free pages back to the file system; gives how many pages may still go that way."""
    if int(execute("PRAGMA auto_vacuum").fetchone()[0]) != 2:
        return 0
    free = int(execute("PRAGMA freelist_count").fetchone()[0])
    for _ in range(min(free, _PAGES)):
        execute("PRAGMA incremental_vacuum(1)")  # with a larger number, Python's module still asks for one page only
    return max(0, free - _PAGES)
