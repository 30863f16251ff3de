"""Live records: what exists while a program runs, before a trace is made of it.

One context variable holds the innermost open op (the frame). It is what makes recordings, threads, tasks and
stop_tracing blocks independent of each other: there is no registry. Records refer to their parents and never the other
way round, so dropping the last Node or the Recording frees everything behind it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, Final

from agentopt.graph._records import EdgeKind, ErrorRecord, Usage
from agentopt.graph._values import freeze

if TYPE_CHECKING:
    from agentopt.graph._recording import Recording

next_id: Final[Callable[[], int]] = itertools.count(1).__next__  # atomic in CPython, so ids are unique across threads


class Op:
    """What all records of one operator, function or parameter have in common."""

    __slots__ = ("constraint", "description", "kind", "name", "names", "parameter_kind")

    def __init__(
        self,
        name: str,
        names: tuple[str, ...] = (),
        *,
        kind: str = "op",
        description: str | None = None,
        constraint: str | None = None,
        parameter_kind: str = "value",
    ) -> None:
        self.name = name
        self.names = names
        self.kind = kind
        self.description = description
        self.constraint = constraint
        self.parameter_kind = parameter_kind


class Rec:
    """A finished record with nothing special about it: operators, plain values, parameter leaves.

    `inputs` holds frozen values and, for inputs that are Nodes, their records. `scope` is the `open_id` of the op it
    happened in, 0 for none (a number, because a reference would make a cycle).
    """

    __slots__ = ("id", "inputs", "op", "scope", "value")

    def __init__(self, op: Op, inputs: tuple[Any, ...], value: Any, scope: int) -> None:
        self.id = next_id()
        self.op = op
        self.inputs = inputs
        self.value = value
        self.scope = scope


Edge = tuple["Rec | LiveOp", EdgeKind, "str | None"]


class LiveOp:
    """A call that is open or finished: also the frame in which reads and nested calls are collected."""

    __slots__ = (
        "_clock",
        "children",
        "cost",
        "duration",
        "edges",
        "error",
        "failed_at",
        "id",
        "inputs",
        "meta",
        "op",
        "open_id",
        "parent",
        "reads",
        "recording",
        "scope",
        "started",
        "strings",
        "tracing",
        "usage",
        "value",
    )

    def __init__(
        self, op: Op, inputs: tuple[Any, ...], parent: LiveOp | None, recording: Recording | None, tracing: bool = True
    ) -> None:
        self.op = op
        self.inputs = inputs
        self.parent = parent
        self.recording = recording
        self.tracing = tracing
        self.open_id = next_id()
        self.id: int | None = None  # given when the op ends, so that ids are in topological order
        self.scope = 0 if parent is None else parent.open_id
        self.value: Any = None
        self.error: ErrorRecord | None = None
        self.failed_at: LiveOp | None = None
        self.edges: list[Edge] = []
        self.reads: dict[int, tuple[Rec | LiveOp, EdgeKind]] = {}
        self.children: list[LiveOp] | None = None  # finished siblings-to-be, for `text` and `after` edges
        self.strings: tuple[str, ...] | None = None
        self.usage: Usage | None = None
        self.cost: float | None = None
        self.meta: dict[str, Any] | None = None
        self.duration: float | None = None
        self.started = time.time()
        self._clock = time.perf_counter()

    def finish(self, value: Any) -> None:
        """End the op with the frozen `value`: reads become edges and the op gets its id."""
        self.value = value
        self.duration = time.perf_counter() - self._clock
        for entry, kind in list(self.reads.values()):
            self.edges.append((entry, kind, None))
        self.reads = {}
        self.children = None
        self.id = next_id()
        parent, self.parent = self.parent, None
        recording, self.recording = self.recording, None
        if parent is not None and parent.id is None:
            if parent.op is not ROOT:
                parent.edges.append((self, "nested", None))
            if recording is not None:
                if parent.children is None:
                    parent.children = []
                parent.children.append(self)
        if recording is not None:
            recording.collect(self)


ROOT: Final = Op("root", kind="root")
current: ContextVar[LiveOp | None] = ContextVar("agentopt_frame", default=None)
STOPPED: Final = LiveOp(Op("stop_tracing", kind="root"), (), None, None, tracing=False)


class stop_tracing:
    """Inside this block nothing is recorded and operations on Nodes give plain values.

    Blocks nest, and each one acts on its own thread or task alone.
    """

    __slots__ = ("_tokens",)

    def __init__(self) -> None:
        self._tokens: list[Token[LiveOp | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(current.set(STOPPED))

    def __exit__(self, *exc: object) -> None:
        reset(self._tokens.pop())


def reset(token: Token[LiveOp | None]) -> None:
    """Restore the frame; a generator that is closed from another context has nothing to restore there."""
    try:
        current.reset(token)
    except ValueError:
        return


def entry_of(value: object) -> Rec | LiveOp | None:
    """The record behind a Node, None for any other value."""
    get = getattr(type(value), "__entry__", None)
    return None if get is None else get(value)


def note_read(entry: Rec | LiveOp, kind: EdgeKind) -> None:
    """Note in the open op, if there is one, that it depends on `entry`."""
    frame = current.get()
    if frame is not None and frame.tracing and frame.id is None:
        frame.reads.setdefault(id(entry), (entry, kind))


def note_parameter_read(
    name: str,
    value: Any,
    *,
    kind: str = "value",
    description: str | None = None,
    constraint: str | None = None,
) -> None:
    """Record that the open op read parameter `name` and got `value`; without an open op or recording nothing happens.

    A read inside a recording but outside every op is attached to the recording's root.
    """
    frame = current.get()
    if frame is None or not frame.tracing or frame.id is not None:
        return
    recording = frame.recording
    frozen = freeze(value)
    if recording is not None:
        known = recording.leaves.get(name)
        if known is not None and known.value == frozen:
            frame.reads.setdefault(id(known), (known, "parameter"))
            return
    op = Op(name, kind="parameter", description=description, constraint=constraint, parameter_kind=kind)
    leaf = Rec(op, (), frozen, 0)
    if recording is not None:
        recording.leaves[name] = leaf
        recording.hold(value, leaf)
    frame.reads[id(leaf)] = (leaf, "parameter")
