"""The finished record of one run: immutable, topologically ordered, JSON round-trip."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self

from agentopt.errors import UserError
from agentopt.graph._live import Edge, LiveOp, Rec, entry_of
from agentopt.graph._records import EdgeKind, ErrorRecord, OpRecord, TracedParameter, Usage
from agentopt.graph._values import ATOMS, freeze, kind_of

FORMAT: Final = "agentopt.trace"
VERSION: Final = 1


class Trace:
    """One run as data. Record ids are 0, 1, 2 … in topological order: parents come before what depends on them."""

    def __init__(
        self,
        ops: Sequence[OpRecord],
        *,
        name: str | None = None,
        output_id: int | None = None,
        live_ids: Iterable[int] = (),
    ) -> None:
        """`live_ids` maps the Nodes of this process to records; a trace from a file has none.

        Raises:
            UserError: a record is out of order, or refers to one that does not come before it.
        """
        self._ops = tuple(ops)
        self.name = name
        self._live_ids = array("q", live_ids)
        self.output_id = len(self._ops) - 1 if output_id is None and self._ops else output_id
        for place, op in enumerate(self._ops):
            if op.id != place or any(not 0 <= parent < place for parent, _ in op.parents):
                raise UserError(
                    f"trace {name or ''!r}: record number {place} has id {op.id} and parents "
                    f"{[parent for parent, _ in op.parents][:5]}; ids must be 0, 1, 2 … and parents smaller than the id"
                )
        if self.output_id is not None and not 0 <= self.output_id < len(self._ops):
            raise UserError(f"trace {name or ''!r}: output_id {self.output_id} is not the id of a record")

    @property
    def ops(self) -> Sequence[OpRecord]:
        """All records, parents first."""
        return self._ops

    def __len__(self) -> int:
        return len(self._ops)

    def __repr__(self) -> str:
        return f"Trace({self.name!r}, {len(self._ops)} records)"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Trace)
            and (self.name, self.output_id) == (other.name, other.output_id)
            and self._ops == other._ops
        )

    __hash__ = None  # type: ignore[assignment]  # compared by content

    @cached_property
    def parameters(self) -> Mapping[str, TracedParameter]:
        """The parameters this run read, by name, with the values it got (the last one, if a name gave several)."""
        found: dict[str, TracedParameter] = {}
        for op in self._ops:
            if op.kind == "parameter":
                meta = op.meta or {}
                found[op.op] = TracedParameter(
                    op.op, meta.get("kind", "value"), op.output, meta.get("description"), meta.get("constraint")
                )
        return MappingProxyType(found)

    @property
    def output(self) -> Any:
        """What the run returned (the recorded value), None for an empty trace."""
        return None if self.output_id is None else self._ops[self.output_id].output

    @property
    def error(self) -> ErrorRecord | None:
        """The error that ended the run, None when it ended well."""
        return None if self.output_id is None else self._ops[self.output_id].error

    @cached_property
    def usage(self) -> Usage:
        """Tokens and calls of all records."""
        total = Usage()
        for op in self._ops:
            if op.usage is not None:
                total += op.usage
        return total

    @cached_property
    def cost(self) -> float | None:
        """USD of all records; None when a call with usage has no known price."""
        if any(op.cost is None and op.usage is not None and op.usage.calls for op in self._ops):
            return None
        return float(sum(op.cost for op in self._ops if op.cost is not None))

    def find(self, op: str | None = None, *, kind: str | None = None) -> list[OpRecord]:
        """Records with this op name and kind, in order."""
        return [item for item in self._ops if (op is None or item.op == op) and (kind is None or item.kind == kind)]

    def id_of(self, target: object) -> int:
        """The id of a Node's record in this trace; an int is checked and given back.

        Raises:
            UserError: the trace has no such record.
        """
        if isinstance(target, int):
            if 0 <= target < len(self._ops):
                return target
            raise UserError(
                f"record {target} is not in the trace {self.name or ''!r}, which has {len(self._ops)} records"
            )
        entry = entry_of(target)
        if entry is None:
            raise UserError(f"a feedback target is a record id or a Node, not {type(target).__name__}")
        live = -1 if entry.id is None else entry.id
        place = bisect_left(self._live_ids, live)
        if place < len(self._live_ids) and self._live_ids[place] == live:
            return place
        raise UserError(f"this Node is not in the trace {self.name or ''!r}: it was not used inside the recording")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data: `format`, `version`, `name`, `output_id`, `ops`."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "output_id": self.output_id,
            "ops": [op.to_dict() for op in self._ops],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            UserError: the data is not a trace of this version.
        """
        if data.get("format") != FORMAT or data.get("version") != VERSION:
            raise UserError(
                f"expected format {FORMAT!r} version {VERSION}, "
                f"found {data.get('format')!r} version {data.get('version')!r}"
            )
        try:
            ops = [OpRecord.from_dict(item) for item in data["ops"]]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the trace data has a record that cannot be read: {error}") from error
        return cls(ops, name=data.get("name"), output_id=data.get("output_id"))

    def save(self, path: str | Path) -> Path:
        """Write `*.trace.jsonl`: a header line, then one record a line."""
        from agentopt.graph.jsonl import write_trace

        return write_trace(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace file. A half-written file gives its whole records and a warning that names the line.

        Raises:
            UserError: the file is missing or is not a trace.
        """
        from agentopt.graph.jsonl import read_trace

        return read_trace(path)


def build_trace(
    entries: Iterable[Rec | LiveOp],
    *,
    name: str | None = None,
    root: LiveOp | None = None,
    output_given: bool = False,
    output: Rec | LiveOp | None = None,
) -> Trace:
    """Make a trace of live records and everything they depend on. Linear in records and edges."""
    found: dict[int, Rec | LiveOp] = {}
    collected = [entry for entry in entries if entry.id is not None]
    _gather(collected, found)
    if output is not None:
        _gather([output], found)
    root_edges: tuple[Edge, ...] | None = None
    top = [] if root is None else [e for e in collected if type(e) is LiveOp and e.scope == root.open_id]
    called = [entry for entry in top if entry.op.kind != "op"]
    # What the run gave, unless set_output says otherwise: the last call, or for a run of Nodes alone the last record.
    final = output if output is not None else (called or collected or [None])[-1]
    if root is not None:
        own: list[Edge] = [*root.edges, *((entry, kind, None) for entry, kind in list(root.reads.values()))]
        if own or output_given or root.usage or root.cost or root.error or len(called) > 1:
            nested: list[Edge] = [(entry, "nested", None) for entry in top]
            if final is not None and type(final) is Rec and not output_given:
                own.append((final, "data", None))
            root_edges = (*own, *nested)
            _gather([entry for entry, _, _ in own], found)
    order = sorted(found)
    place = {live: number for number, live in enumerate(order)}
    opened: dict[int, int] = {}
    for number, live in enumerate(order):
        entry = found[live]
        if type(entry) is LiveOp:
            opened[entry.open_id] = number
    if root is not None and root_edges is not None:
        opened[root.open_id] = len(order)
    ops = [
        _op_record(number, entry, place, opened)
        if isinstance(entry, LiveOp)
        else _plain_record(number, entry, place, opened)
        for number, entry in enumerate(found[live] for live in order)
    ]
    output_id = None if final is None or final.id is None else place[final.id]
    if root is not None and root_edges is not None:
        output_id = len(order)
        ops.append(_op_record(output_id, root, place, opened, root_edges))
        if not output_given and root.error is None and final is not None:
            ops[-1].output = freeze(final.value)
    return Trace(ops, name=name, output_id=output_id, live_ids=order)


def _gather(start: Iterable[Rec | LiveOp], found: dict[int, Rec | LiveOp]) -> None:
    stack = list(start)
    while stack:
        entry = stack.pop()
        if entry.id is None or entry.id in found:
            continue
        found[entry.id] = entry
        for value in entry.inputs:
            if type(value) is Rec or type(value) is LiveOp:
                stack.append(value)
        if type(entry) is LiveOp:
            stack.extend(edge[0] for edge in entry.edges)


def _plain_record(number: int, entry: Rec, place: dict[int, int], opened: dict[int, int]) -> OpRecord:
    op = entry.op
    value = entry.value
    record = _blank(number, op.name, op.kind, value if type(value) in ATOMS else freeze(value))
    if entry.inputs:
        _set_inputs(record, op.names, entry.inputs, place)
        sources = record._input_sources
        if sources:
            origins = {origin: None for _, origin in sources}
            parents: list[tuple[int, EdgeKind]] = [(origin, "data") for origin in origins]
            record.parents = tuple(parents)
    if entry.scope:
        record.parent_op = opened.get(entry.scope)
    if op.kind == "parameter":
        facts = {"kind": op.parameter_kind, "description": op.description, "constraint": op.constraint}
        record.meta = {key: value for key, value in facts.items() if value is not None}
    return record


def _blank(number: int, op: str, kind: str, output: Any) -> OpRecord:
    """An OpRecord without the checks of its constructor: a long trace makes hundreds of thousands."""
    record = OpRecord.__new__(OpRecord)
    record.id = number
    record.op = op
    record.kind = kind
    record.output = output
    record.parents = ()
    record._input_names = record._input_values = record._input_sources = ()
    record.error = record.parent_op = record.duration = record.usage = record.cost = record.meta = None
    record.started = 0.0
    return record


def _set_inputs(record: OpRecord, names: tuple[str, ...], inputs: tuple[Any, ...], place: dict[int, int]) -> None:
    values: list[Any] = []
    sources: list[tuple[str, int]] = []
    for name, value in zip(names, inputs, strict=True):
        kind = kind_of(value)
        if kind in ATOMS:
            values.append(value)
            continue
        if kind is Rec or kind is LiveOp:
            if value.id is not None:
                sources.append((name, place[value.id]))
            value = value.value
        values.append(value if type(value) in ATOMS else freeze(value))
    record._input_names = names
    record._input_values = tuple(values)
    record._input_sources = tuple(sources)


def _op_record(
    number: int,
    live: LiveOp,
    place: dict[int, int],
    opened: dict[int, int],
    edges: Sequence[Edge] | None = None,
) -> OpRecord:
    record = _blank(number, live.op.name, live.op.kind, freeze(live.value))
    _set_inputs(record, live.op.names, live.inputs, place)
    parents: dict[tuple[int, EdgeKind], None] = {(source, "data"): None for _, source in record._input_sources}
    sources = list(record._input_sources)
    named = {name for name, _ in sources}
    for entry, kind, name in live.edges if edges is None else edges:
        if entry.id is None or entry.id not in place:
            continue
        parent = place[entry.id]
        parents[parent, kind] = None
        if name is not None and name not in named:
            named.add(name)
            sources.append((name, parent))
    record.parents = tuple(parents)
    record._input_sources = tuple(sources)
    record.parent_op = opened.get(live.scope)
    record.started, record.duration = live.started, live.duration
    record.usage, record.cost, record.meta = live.usage, live.cost, live.meta and dict(live.meta)
    if live.error is not None:
        failed = number if live.failed_at is live else opened.get(live.failed_at.open_id) if live.failed_at else None
        record.error = replace(live.error, op_id=failed)
    return record
