"""Recordings: the live, run-scoped collection of records, and the one primitive that writes a call into it."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import Token
from typing import Any, Self

from agentopt.graph._edges import link
from agentopt.graph._errors import describe
from agentopt.graph._live import ROOT, LiveOp, Op, Rec, current, entry_of, reset
from agentopt.graph._records import Usage
from agentopt.graph._trace import Trace, build_trace
from agentopt.graph._values import ATOMS, freeze


class Recording:
    """What one `record()` block collects. Threads and tasks that inherit the context write into it together.

    A recording inside another one collects on its own: the outer one does not get the inner one's calls.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self.leaves: dict[str, Rec] = {}
        self._entries: list[Rec | LiveOp] = []
        self._held: dict[int, tuple[object, Rec | LiveOp]] = {}
        self._root = LiveOp(ROOT, (), None, self)
        self._token: Token[LiveOp | None] | None = None
        self._output_given = False

    def __enter__(self) -> Self:
        if self._token is not None or self._root.id is not None:
            raise RuntimeError("a Recording is used once; call record() again for another one")
        self._token = current.set(self._root)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._root.error, self._root.failed_at = describe(error, self._root)
        if self._token is not None:
            reset(self._token)
        root = self._root
        root.recording = (
            None  # calls of leftover tasks are not written any more, and nothing refers back to the recording
        )
        root.finish(root.value)
        self._held.clear()

    def set_output(self, value: Any) -> None:
        """Say what the recorded run returned; the trace's output is then the root record with this value."""
        self._output_given = True
        entry = entry_of(value)
        if entry is not None:
            self._root.edges.append((entry, "data", None))
        self._root.value = freeze(value) if entry is None else entry.value

    @property
    def trace(self) -> Trace:
        """A finished, immutable trace of all calls that have ended so far."""
        return build_trace(list(self._entries), name=self.name, root=self._root, output_given=self._output_given)

    @property
    def ops(self) -> list[Any]:
        """The records collected so far, as in `trace.ops`."""
        return list(self.trace.ops)

    # what the live records call

    def collect(self, entry: Rec | LiveOp) -> None:
        """Keep a finished record."""
        self._entries.append(entry)

    def hold(self, value: object, entry: Rec | LiveOp) -> None:
        """Keep a non-atomic value that `entry` gave, so that a later call that gets the same object is linked to it."""
        if type(value) not in ATOMS:
            self._held[id(value)] = (value, entry)

    def held(self, value: object) -> Rec | LiveOp | None:
        """The record that gave this very object, None if there is none."""
        known = self._held.get(id(value))
        return None if known is None else known[1]


def record(name: str | None = None) -> Recording:
    """Give a new recording: the block under `with` writes into it, and its `trace` is the result."""
    return Recording(name)


def current_recording() -> Recording | None:
    """The recording that calls made here would be written to, None when there is none or tracing is stopped."""
    frame = current.get()
    return None if frame is None else frame.recording


class Operation:
    """One call being written into a recording. As a context manager it is open from enter to exit, awaits included.

    Generators use it in pieces: `enter()`/`leave(token)` around every resume, then `finish()`. An exception that leaves
    the block (or is given to `fail`) becomes the record's error.
    """

    __slots__ = ("_given", "_live", "_output", "_token")

    def __init__(self, live: LiveOp) -> None:
        self._live = live
        self._output: Any = None
        self._given: Any = None
        self._token: Token[LiveOp | None] | None = None

    @property
    def recorded(self) -> bool:
        """True: this call is written down."""
        return True

    def set_output(self, value: Any) -> None:
        """The call's result; containers are copied when this is called."""
        entry = entry_of(value)
        if entry is not None:
            self._live.edges.append((entry, "data", None))
        self._given = value
        self._output = freeze(value) if entry is None else entry.value

    def report(self, usage: Usage | None = None, cost: float | None = None) -> None:
        """Add tokens and USD to this call."""
        add_usage(self._live, usage, cost)

    def annotate(self, **meta: Any) -> None:
        """Add facts about the call (JSON-able): model, messages, request key, seed and the like."""
        if self._live.meta is None:
            self._live.meta = {}
        self._live.meta.update((name, freeze(value)) for name, value in meta.items())

    def enter(self) -> Token[LiveOp | None]:
        """Make this the innermost open op of the current context."""
        return current.set(self._live)

    def leave(self, token: Token[LiveOp | None]) -> None:
        """Undo `enter`."""
        reset(token)

    def finish(self) -> None:
        """End the call; a second time does nothing."""
        live = self._live
        if live.id is not None:
            return
        recording = live.recording
        if recording is not None and live.error is None:
            recording.hold(self._given, live)
        live.finish(self._output)

    def fail(self, error: BaseException) -> None:
        """End the call with an error."""
        self._live.error, self._live.failed_at = describe(error, self._live)
        self.finish()

    def __enter__(self) -> Self:
        self._token = self.enter()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._token is not None:
            self.leave(self._token)
        if error is None:
            self.finish()
        else:
            self.fail(error)


class _Unrecorded(Operation):
    """What `operation` gives outside a recording: every method does nothing."""

    __slots__ = ()

    def __init__(self) -> None:
        pass

    @property
    def recorded(self) -> bool:
        """False: nothing is written down."""
        return False

    def set_output(self, value: Any) -> None:
        pass

    def report(self, usage: Usage | None = None, cost: float | None = None) -> None:
        pass

    def annotate(self, **meta: Any) -> None:
        pass

    def enter(self) -> Token[LiveOp | None]:
        return current.set(current.get())

    def finish(self) -> None:
        pass

    def fail(self, error: BaseException) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        pass


_UNRECORDED = _Unrecorded()
_ops: dict[tuple[str, str, tuple[str, ...]], Op] = {}


def operation(
    op: str, *, kind: str = "op", inputs: Mapping[str, Any] | None = None, description: str | None = None
) -> Operation:
    """Open a call in the active recording; outside one, give an object whose methods do nothing.

    To be used as `with operation("search", kind="tool", inputs={"query": q}) as op: ...; op.set_output(found)`. Inputs
    are copied now, and the edges to earlier calls are found now.
    """
    frame = current.get()
    if frame is None or frame.recording is None:
        return _UNRECORDED
    values: Mapping[str, Any] = inputs or {}
    names = tuple(values)
    key = (op, kind, names)
    shared = _ops.get(key)
    if shared is None or shared.description != description:
        shared = Op(op, names, kind=kind, description=description)
        if len(_ops) < 10_000:  # names made at run time must not pile up
            _ops[key] = shared
    originals = tuple(values.values())
    frozen: list[Any] = []
    for value in originals:
        entry = entry_of(value)
        frozen.append(freeze(value) if entry is None else entry)
    live = LiveOp(shared, tuple(frozen), frame, frame.recording)
    link(live, originals)
    return Operation(live)


def add_usage(live: LiveOp, usage: Usage | None, cost: float | None) -> None:
    """Add tokens and USD to a live record."""
    if usage is not None:
        live.usage = usage if live.usage is None else live.usage + usage
    if cost is not None:
        live.cost = cost if live.cost is None else live.cost + cost


def report_usage(tokens: int | None = None, usd: float | None = None) -> None:
    """Tell of tokens and USD that agentopt cannot see; they count for the innermost open call and for every meter."""
    usage = Usage(input_tokens=tokens or 0, calls=1)
    frame = current.get()
    if frame is not None and frame.recording is not None:
        add_usage(frame, usage, usd)
    from agentopt.graph._context import meter_add  # _context reads records, so it is imported late

    meter_add(usage, usd)
