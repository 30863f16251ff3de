"""The nouns of a trace: one record per call, what it used, what went wrong, and the feedback it gets.

Live records are plain objects with slots; the schema of the file form is in `agentopt.graph.jsonl`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from agentopt.graph._values import decode, encode

EdgeKind = Literal["parameter", "nested", "same", "text", "after", "data"]
"""How one record depends on another.

`parameter` (read a parameter) · `nested` (called the other inside itself) · `data` (a Node was an input or was read) ·
`same` (got the very object the other returned) · `text` (got a text the other returned) · `after` (ran next, nothing
else known).
"""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and calls. Cached calls are counted apart and cost nothing; `tries` counts requests sent, retries too.

    `cached_tokens` is the part of the input that a provider had in its own prompt cache. `cached_input_tokens`,
    `cached_output_tokens` and `cached_cost` (USD, None when a price is unknown) are what the cached calls took when
    they were paid for: nobody pays it again, but it tells what a run of the program takes elsewhere.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    calls: int = 0
    cached_calls: int = 0
    tries: int = 0
    cached_input_tokens: int = 0
    cached_output_tokens: int = 0
    cached_cost: float | None = 0.0

    @property
    def total_tokens(self) -> int:
        """Input plus output tokens of the calls that were really made."""
        return self.input_tokens + self.output_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cached_tokens + other.cached_tokens,
            self.calls + other.calls,
            self.cached_calls + other.cached_calls,
            self.tries + other.tries,
            self.cached_input_tokens + other.cached_input_tokens,
            self.cached_output_tokens + other.cached_output_tokens,
            None if self.cached_cost is None or other.cached_cost is None else self.cached_cost + other.cached_cost,
        )

    def __bool__(self) -> bool:
        return self != _NOTHING_USED

    def to_dict(self) -> dict[str, int | float | None]:
        """Plain JSON data with every count."""
        return {**{name: getattr(self, name) for name in _USAGE_COUNTS}, "cached_cost": self.cached_cost}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; missing counts are 0."""
        cost = data.get("cached_cost", 0.0)
        counts = {name: int(data.get(name, 0)) for name in _USAGE_COUNTS}
        return cls(**counts, cached_cost=None if cost is None else float(cost))


_USAGE_COUNTS = (
    "input_tokens",
    "output_tokens",
    "cached_tokens",
    "calls",
    "cached_calls",
    "tries",
    "cached_input_tokens",
    "cached_output_tokens",
)
_NOTHING_USED = Usage()


@dataclass(frozen=True, slots=True)
class ErrorRecord:
    """An exception as data: what was raised, in which op (the innermost that failed), at which line, from which inputs.

    `op_id` is the id of the failing op in the same trace. `inputs` are short texts, by input name. `trace_text` is the
    traceback without the tracing machinery's own lines.
    """

    type: str
    message: str
    op: str
    op_id: int | None = None
    file: str | None = None
    line: int | None = None
    source_line: str | None = None
    inputs: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    trace_text: str = ""

    @property
    def text(self) -> str:
        """The error as feedback for an optimizer: which op, which line, which inputs, what was raised."""
        lines = [f"{self.op} failed: {self.type}: {self.message}" if self.message else f"{self.op} failed: {self.type}"]
        if self.line is not None:
            lines.append(f"  at {self.file}:{self.line}: {self.source_line or ''}".rstrip(": "))
        lines.extend(f"  {name} = {text}" for name, text in self.inputs)
        lines.extend(f"  note: {note}" for note in self.notes)
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "type": self.type,
            "message": encode(self.message),
            "op": self.op,
            "op_id": self.op_id,
            "file": self.file,
            "line": self.line,
            "source_line": encode(self.source_line),
            "inputs": [[name, encode(text)] for name, text in self.inputs],
            "notes": [encode(note) for note in self.notes],
            "trace_text": encode(self.trace_text),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(
            type=data["type"],
            message=decode(data["message"]),
            op=data["op"],
            op_id=data.get("op_id"),
            file=data.get("file"),
            line=data.get("line"),
            source_line=decode(data.get("source_line")),
            inputs=tuple((name, decode(text)) for name, text in data.get("inputs", ())),
            notes=tuple(decode(note) for note in data.get("notes", ())),
            trace_text=decode(data.get("trace_text", "")),
        )


class OpRecord:
    """One call in a finished trace.

    `inputs` maps input names to recorded values; `sources` maps those inputs that are known to come from another record
    to its id. `parents` are `(id, edge kind)` pairs with smaller ids. `parent_op` is the id of the enclosing op.
    `started` is seconds since the epoch (0.0 and `duration=None` for operators, which are not timed); `duration` is
    seconds; `cost` is USD, None when unknown.
    """

    __slots__ = (
        "_input_names",
        "_input_sources",
        "_input_values",
        "cost",
        "duration",
        "error",
        "id",
        "kind",
        "meta",
        "op",
        "output",
        "parent_op",
        "parents",
        "started",
        "usage",
    )

    def __init__(
        self,
        id: int,
        op: str,
        kind: str = "op",
        *,
        inputs: Mapping[str, Any] | None = None,
        output: Any = None,
        parents: tuple[tuple[int, EdgeKind], ...] = (),
        **fields: Any,
    ) -> None:
        """Fields beyond these: sources, error, parent_op, started, duration, usage, cost, meta."""
        self.id = id
        self.op = op
        self.kind = kind
        self.output = output
        self.parents = parents
        given: Mapping[str, Any] = inputs or {}
        self._input_names = tuple(given)
        self._input_values = tuple(given.values())
        self._input_sources: tuple[tuple[str, int], ...] = tuple(dict(fields.pop("sources", None) or {}).items())
        self.error: ErrorRecord | None = fields.pop("error", None)
        self.parent_op: int | None = fields.pop("parent_op", None)
        self.started: float = fields.pop("started", 0.0)
        self.duration: float | None = fields.pop("duration", None)
        self.usage: Usage | None = fields.pop("usage", None)
        self.cost: float | None = fields.pop("cost", None)
        self.meta: dict[str, Any] | None = fields.pop("meta", None)
        if fields:
            raise TypeError(f"OpRecord has no field {', '.join(fields)}")

    @property
    def inputs(self) -> dict[str, Any]:
        """Input name to recorded value, in the order of the signature (a new dict each time)."""
        return dict(zip(self._input_names, self._input_values, strict=True))

    @property
    def sources(self) -> dict[str, int]:
        """Input name to the id of the record it came from, where that is known (a new dict each time)."""
        return dict(self._input_sources)

    def __repr__(self) -> str:
        return f"OpRecord({self.id}, {self.op!r}, kind={self.kind!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OpRecord) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # records compare by content and are not keys; use .id

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; absent fields are left out."""
        data: dict[str, Any] = {"id": self.id, "op": self.op, "kind": self.kind}
        if self._input_names:
            values = zip(self._input_names, self._input_values, strict=True)
            data["inputs"] = {name: encode(value) for name, value in values}
        data["output"] = encode(self.output)
        if self._input_sources:
            data["sources"] = dict(self._input_sources)
        if self.parents:
            data["parents"] = [list(edge) for edge in self.parents]
        if self.error is not None:
            data["error"] = self.error.to_dict()
        if self.usage is not None:
            data["usage"] = self.usage.to_dict()
        if self.meta:
            data["meta"] = encode(self.meta)
        if self.started:
            data["started"] = self.started
        for name in ("parent_op", "duration", "cost"):
            if (value := getattr(self, name)) is not None:
                data[name] = value
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        error, usage, meta = data.get("error"), data.get("usage"), data.get("meta")
        return cls(
            data["id"],
            data["op"],
            data["kind"],
            inputs=_decoded(data.get("inputs") or {}),
            output=decode(data.get("output")),
            parents=tuple((int(parent), kind) for parent, kind in data.get("parents") or ()),
            sources=data.get("sources"),
            error=None if error is None else ErrorRecord.from_dict(error),
            usage=None if usage is None else Usage.from_dict(usage),
            meta=None if meta is None else decode(meta),
            parent_op=data.get("parent_op"),
            started=data.get("started") or 0.0,
            duration=data.get("duration"),
            cost=data.get("cost"),
        )


def _decoded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: decode(value) for name, value in values.items()}


@dataclass(frozen=True, slots=True)
class TracedParameter:
    """A parameter as one trace saw it."""

    name: str
    kind: str
    value: Any
    description: str | None = None
    constraint: str | None = None


@dataclass(frozen=True, slots=True)
class Feedback:
    """What is said about one record of a trace.

    `target` is the id of a record, or a Node that the trace contains. `score` is any float where larger is better, or
    None; `weight` says how much this item counts beside the others.
    """

    target: Any
    text: str
    score: float | None = None
    weight: float = 1.0
