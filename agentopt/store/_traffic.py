"""The store's part for captured traffic: exchanges with the trace they are in, and feedback on them.

Plain JSON dicts, as everywhere in the store. `put_exchange` is queued; `aput_feedback` returns when the row is durable.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from typing import Any

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


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
