"""The store's part for captured traffic: exchanges with the trace they are in, and feedback on them.

Plain JSON dicts, as everywhere in the store. `put_exchange` is queued; `aput_feedback` and all that deletes return when
it is durable.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from agentopt.store import _forgetting as forgetting
from agentopt.store._forgetting import Cut, Execute, Forgotten
from agentopt.store._writer import Row, Statement, Writer

JSONDict = dict[str, Any]

_PUT_EXCHANGE = Statement("INSERT OR REPLACE INTO exchanges (id, run_id, trace_id, created, payload)", 5)
_PUT_FEEDBACK = Statement("INSERT INTO feedback (run_id, exchange_id, time, payload)", 4)
_EXCHANGE = ("id", "run_id", "trace_id", "created")
_FEEDBACK = ("seq", "run_id", "exchange_id", "time")


class Traffic(ABC):
    """What `Store` inherits; it gives the writer and `_read`."""

    _writer: Writer

    @abstractmethod
    def _read(self, sql: str, values: Row, *, settle: bool = True) -> list[Row]:
        """Rows of a query."""

    def put_exchange(self, run_id: str, exchange_id: str, trace_id: str, payload: JSONDict) -> None:
        """Add or replace an exchange: what is known of it beside the trace that holds it."""
        row = (exchange_id, run_id, trace_id, time.time(), _dumps(payload))
        self._writer.put(_PUT_EXCHANGE, [row])

    def exchange(self, exchange_id: str) -> JSONDict | None:
        """The exchange with this id (id, run_id, trace_id, created and its payload), or None."""
        found = self._exchanges("WHERE id = ?", (exchange_id,))
        return found[0] if found else None

    def exchanges(self, run_id: str | None = None, *, rated: bool = False) -> list[JSONDict]:
        """Exchanges, oldest first: of one run where given, and with `rated` only those that have feedback."""
        tests: list[str] = []
        if run_id is not None:
            tests.append("run_id = ?")
        if rated:
            tests.append("id IN (SELECT exchange_id FROM feedback)")
        where = f"WHERE {' AND '.join(tests)}" if tests else ""
        return self._exchanges(where, () if run_id is None else (run_id,))

    def _exchanges(self, where: str, values: Row) -> list[JSONDict]:
        rows = self._read(f"SELECT {', '.join(_EXCHANGE)}, payload FROM exchanges {where} ORDER BY created, id", values)
        return [{**json.loads(row[4]), **dict(zip(_EXCHANGE, row[:4], strict=True))} for row in rows]

    async def aput_feedback(self, run_id: str, exchange_id: str, payload: JSONDict) -> None:
        """Add what was said of an exchange, and return when it is durable; the event loop goes on meanwhile."""
        await self._writer.aput_wait(_PUT_FEEDBACK, [(run_id, exchange_id, time.time(), _dumps(payload))])

    def feedback(self, exchange_id: str | None = None, *, run_id: str | None = None) -> list[JSONDict]:
        """Feedback in order (seq, run_id, exchange_id, time and its payload), of one exchange or run where given."""
        given = {"exchange_id": exchange_id, "run_id": run_id}
        tests = {name: value for name, value in given.items() if value is not None}
        where = f"WHERE {' AND '.join(f'{name} = ?' for name in tests)}" if tests else ""
        rows = self._read(
            f"SELECT {', '.join(_FEEDBACK)}, payload FROM feedback {where} ORDER BY seq", tuple(tests.values())
        )
        return [{**json.loads(row[4]), **dict(zip(_FEEDBACK, row[:4], strict=True))} for row in rows]

    # ---- deleting

    def captured_ids(
        self,
        *,
        run_id: str | None = None,
        before: float | None = None,
        session: str | None = None,
        key: str | None = None,
        ids: Sequence[str] | None = None,
        limit: int = -1,
    ) -> list[tuple[str, str, int]]:
        """Exchanges to which all that is given applies, oldest first: id, its trace, and the bytes of that.

        Args:
            run_id: captured in this run.
            before: stored before this time (seconds since the epoch).
            session: of sessions with this name.
            key: asked with the key of this id.
            ids: one of these exchanges.
            limit: at most so many; all when negative.
        """
        tests = {
            "e.run_id = ?": run_id,
            "e.created < ?": before,
            "json_extract(e.payload, '$.session') = ?": session,
            "json_extract(e.payload, '$.key') = ?": key,
            "e.id IN (SELECT value FROM json_each(?))": None if ids is None else _dumps(list(ids)),
        }
        chosen = {test: value for test, value in tests.items() if value is not None}
        where = f"WHERE {' AND '.join(chosen)}" if chosen else ""
        rows = self._read(
            "SELECT e.id, e.trace_id, coalesce(length(t.body), 0) FROM exchanges e LEFT JOIN traces t"
            f" ON t.id = e.trace_id {where} ORDER BY e.created, e.id LIMIT ?",
            (*chosen.values(), limit),
        )
        return [(row[0], row[1], row[2]) for row in rows]

    def stored(self, exchange_ids: Sequence[str]) -> set[str]:
        """Those of these exchanges that are in the store; what is queued is not."""
        if not exchange_ids:
            return set()
        rows = self._read(
            "SELECT id FROM exchanges WHERE id IN (SELECT value FROM json_each(?))",
            (_dumps(list(exchange_ids)),),
            settle=False,
        )
        return {row[0] for row in rows}

    def traffic_runs(self) -> list[str]:
        """The runs in which something was captured."""
        rows = self._read(
            "SELECT run_id FROM exchanges UNION SELECT run_id FROM feedback"
            " UNION SELECT id FROM runs WHERE json_extract(config, '$.kind') = 'serve'",
            (),
        )
        return sorted(row[0] for row in rows)

    def forget(self, exchange_ids: Sequence[str], cut: Cut) -> Forgotten:
        """Delete exchanges, what was said of them, and their part of the traces: all in one transaction.

        Args:
            exchange_ids: those that are not there are passed over; what was said of them goes too.
            cut: gives a trace without the exchanges with these ids, None when nothing is left. One that it cannot read
                is deleted with all its exchanges.
        """
        return self._forget(lambda execute: forgetting.forget(execute, exchange_ids, cut))

    def forget_leftovers(self, run_id: str, before: float, limit: int = 200) -> Forgotten:
        """Delete so much of a run's feedback and traces from before that time as belongs to no exchange.

        Its exchanges from before that time must have been deleted first.
        """
        return self._forget(lambda execute: forgetting.forget_leftovers(execute, run_id, before, limit))

    def drop_trace(self, trace_id: str) -> None:
        """Delete one trace; what else there is of it stays."""
        self._forget(lambda execute: forgetting.drop_trace(execute, trace_id))

    def forget_feedback(self, key: str, before: float | None = None) -> Forgotten:
        """Delete what this key said (before that time) of exchanges that are not in the store."""
        return self._forget(lambda execute: forgetting.forget_feedback(execute, key, before))

    def forget_empty_runs(self, before: float, *, silent: float, keep: str = "") -> Forgotten:
        """Delete runs of servers from before that time with nothing in them; of unended ones those silent so long."""
        return self._forget(lambda execute: forgetting.forget_empty_runs(execute, before, silent, keep))

    def release(self) -> bool:
        """Give a few free pages back to the file system; whether there are more."""
        return self._writer.work_wait(forgetting.release) > 0

    def _forget(self, work: Callable[[Execute], Forgotten]) -> Forgotten:
        found = Forgotten()

        def inside(execute: Execute) -> int:
            nonlocal found
            found = work(execute)
            return forgetting.release(execute)

        self._writer.work_wait(inside)
        return found


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
