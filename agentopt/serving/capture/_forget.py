"""Forgetting: exchanges leave the store, by age or because somebody asks for it, and their traces without them remain.

Everything is done in small batches, each a whole of its own: a server captures on between two of them, and whoever is
killed there leaves a store in which traces, exchanges and feedback agree.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from agentopt.graph import OpRecord, Trace
from agentopt.store import Forgotten, Store

JSONDict = dict[str, Any]
DAY = 86_400.0
_BATCH = 64
"""Exchanges in one transaction."""
_BATCH_BYTES = 1 << 20
"""Of the (compressed) traces that one transaction may have to write anew."""
_LOOK = 2000
"""Exchanges that are looked up at a time."""
_SILENT = 2 * DAY
"""A server that runs says so in its run every hour; one that was silent for so long has ended."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which exchanges: those to which all that is given applies."""

    before: float | None = None
    """Stored before this time, seconds since the epoch."""
    session: str | None = None
    key: str | None = None
    requests: tuple[str, ...] = ()
    run: str | None = None

    def find(self, store: Store) -> list[tuple[str, str, int]]:
        """Id, trace, and bytes of the trace; oldest first."""
        ids = self.requests or None
        return store.captured_ids(run_id=self.run, before=self.before, session=self.session, key=self.key, ids=ids)


def forget(store: Store, chosen: Chosen) -> Iterator[Forgotten]:
    """Delete what is chosen, a batch each time the next item is asked for."""
    for batch in _batches(chosen.find(store)):
        yield store.forget(batch, without)
    # What was said of exchanges that were not kept themselves.
    if chosen.requests and chosen == Chosen(requests=chosen.requests):
        yield store.forget(chosen.requests, without)
    if chosen.key is not None and chosen == Chosen(chosen.before, key=chosen.key):
        yield store.forget_feedback(chosen.key, chosen.before)


def forget_old(store: Store, before: float, *, keep: str = "") -> Iterator[Forgotten]:
    """Delete all that was captured before that time, and runs of servers that are empty then; not the run `keep`.

    Free pages are given back too, where the file is made for that.
    """
    for run_id in store.traffic_runs():
        while found := store.captured_ids(run_id=run_id, before=before, limit=_LOOK):
            for batch in _batches(found):
                yield store.forget(batch, without)
        while (left := store.forget_leftovers(run_id, before)) != Forgotten():
            yield left
    yield store.forget_empty_runs(before, silent=min(before, time.time() - _SILENT), keep=keep)
    while store.release():
        yield Forgotten()


def _batches(found: Sequence[tuple[str, str, int]]) -> Iterator[list[str]]:
    batch: list[str] = []
    traces: dict[str, int] = {}
    for exchange_id, trace_id, size in found:
        if batch and (len(batch) >= _BATCH or sum(traces.values()) > _BATCH_BYTES):
            yield batch
            batch, traces = [], {}
        batch.append(exchange_id)
        traces[trace_id] = size
    if batch:
        yield batch


def without(payload: JSONDict, gone: set[str]) -> JSONDict | None:
    """A captured trace without the calls of these requests; None when it has no other call.

    Raises:
        UserError: it is no trace.
    """
    trace = Trace.from_dict(payload)
    kept = [op for op in trace.ops if op.kind != "lm" or (op.meta or {}).get("request_id") not in gone]
    calls = [op for op in kept if op.kind == "lm"]
    if not calls:
        return None
    places = {op.id: place for place, op in enumerate(kept)}
    return Trace([_moved(op, places, calls) for op in kept], name=trace.name).to_dict()


def _moved(op: OpRecord, places: dict[int, int], calls: Sequence[OpRecord]) -> OpRecord:
    """The record in its new place; that of the session says what its last call says, which may be another one now."""
    output, error, began, duration = op.output, op.error, op.started, op.duration
    if op.kind == "agent":
        output, error, began = calls[-1].output, calls[-1].error, calls[0].started
        duration = max(call.started + (call.duration or 0.0) for call in calls) - began
    return OpRecord(
        places[op.id],
        op.op,
        op.kind,
        inputs=op.inputs,
        output=output,
        parents=tuple((places[parent], kind) for parent, kind in op.parents if parent in places),
        parent_op=None if op.parent_op is None else places.get(op.parent_op),
        error=error,
        usage=op.usage,
        started=began,
        duration=duration,
        cost=op.cost,
        meta=op.meta,
    )
