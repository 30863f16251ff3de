"""A recorded run as the backward pass walks it: one visit per call of the program, linked to the calls before it.

The unit is one trace. A visit is a call of a step, tool, agent or bundled function; the language model calls made
inside it belong to it. Visits are known by node NAME and call index, never by position, so runs of different length and
branch can be put side by side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentopt.optimizers._feedback import cut, error_text, shown

if TYPE_CHECKING:
    from agentopt.evaluation import Rollout
    from agentopt.graph import OpRecord, Trace

_LEAVES = frozenset({"parameter", "value"})
_CALLS_SHOWN = 2


@dataclass(frozen=True, slots=True)
class Visit:
    """One call of one node."""

    id: int
    """The record's id in its trace."""
    node: str
    call_index: int
    """0 for the first call of this node in this run."""
    kind: str
    inputs: Mapping[str, Any]
    output: Any
    error: str = ""
    reads: tuple[str, ...] = ()
    """Tunable parameters that this call read itself."""
    ops: tuple[int, ...] = ()
    """Records that belong to this visit, its own included."""
    asked: tuple[tuple[str, str], ...] = ()
    """(last user turn, reply) of its language model calls."""
    previous: tuple[int, ...] = ()
    """Ids of the visits that this one depends on."""

    @property
    def result(self) -> str:
        """What came out, as text."""
        return f"failed: {self.error}" if self.error else shown(self.output)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The visits of one run in time order (a caller ends after what it calls)."""

    visits: tuple[Visit, ...] = ()
    last: int | None = None
    """Id of the visit that gave the run's output."""

    def reading(self) -> list[Visit]:
        """The visits that read a tunable parameter, in time order."""
        return [visit for visit in self.visits if visit.reads]

    def render(self, limit: int) -> str:
        """One line a visit, within `limit` characters; repeated calls of one node are folded."""
        for size in (600, 300, 160, 80, 40):
            text = "\n".join(_lines(self.visits, size))
            if len(text) <= limit:
                return text
        return cut(text, limit)


def trajectory_of(rollout: Rollout, names: Collection[str], owners: Collection[str], program: str) -> Trajectory:
    """The trajectory of one rollout.

    Args:
        rollout: the run; without a trace it is one visit that read everything.
        names: the tunable parameters.
        owners: those of them whose parts run as calls named `OWNER.PART` (pipelines); such a call counts as having read
            its owner.
        program: the node name of the run as a whole.
    """
    trace = rollout.trace
    if trace is None or not len(trace):
        row = rollout.row
        error = error_text(row.error) if row.error else ""
        whole = Visit(0, program, 0, "root", rollout.example.inputs, row.output, error, tuple(names), (0,))
        return Trajectory((whole,), 0)
    return _Builder(trace, names, owners, program).trajectory()


@dataclass(slots=True)
class _Part:
    op: OpRecord
    ops: list[int] = field(default_factory=list[int])
    reads: dict[str, None] = field(default_factory=dict[str, None])
    previous: dict[int, None] = field(default_factory=dict[int, None])
    asked: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])


class _Builder:
    def __init__(self, trace: Trace, names: Collection[str], owners: Collection[str], program: str) -> None:
        self._trace = trace
        self._names = frozenset(names)
        self._owners = tuple(owners)
        self._program = program
        self._home: dict[int, int] = {}

    def trajectory(self) -> Trajectory:
        parts: dict[int, _Part] = {}
        ops = self._trace.ops
        for op in ops:
            if op.kind not in _LEAVES:
                self._home[op.id] = self._unit(op)
        for number in sorted(set(self._home.values())):
            parts[number] = _Part(ops[number])
        for number, home in self._home.items():
            self._add(parts[home], ops[number])
        counts: Counter[str] = Counter()
        visits: list[Visit] = []
        for part in parts.values():
            visits.append(self._visit(part, counts))
        output = self._trace.output_id
        return Trajectory(tuple(visits), None if output is None else self._home.get(output))

    def _unit(self, op: OpRecord) -> int:
        """The record whose visit `op` belongs to: itself, or for a language model call the call that made it."""
        while op.kind == "lm" and op.parent_op is not None:
            op = self._trace.ops[op.parent_op]
        return op.id

    def _add(self, part: _Part, op: OpRecord) -> None:
        part.ops.append(op.id)
        own = part.op.id
        for number, kind in op.parents:
            parent = self._trace.ops[number]
            if parent.kind == "parameter":
                if parent.op in self._names:
                    part.reads[parent.op] = None
                continue
            home = self._home.get(number)
            if home is not None and home < own and kind != "after":
                part.previous[home] = None
        if op.kind == "lm" and len(part.asked) < _CALLS_SHOWN:
            part.asked.append((_question(op), _answer(op)))

    def _visit(self, part: _Part, counts: Counter[str]) -> Visit:
        op = part.op
        node = self._program if op.kind == "root" else op.op
        for owner in self._owners:
            if node.startswith(f"{owner}."):
                part.reads[owner] = None
        call = counts[node]
        counts[node] += 1
        # An error is told where it arose, not again by every caller it passed through.
        error = op.error.text if op.error is not None and op.error.op_id in (None, *part.ops) else ""
        if op.error is not None and not error:
            error = f"{op.error.op} inside it failed"
        return Visit(
            op.id, node, call, op.kind, op.inputs, op.output, error, tuple(part.reads), tuple(part.ops),
            tuple(part.asked), tuple(part.previous),
        )  # fmt: skip


def _question(op: OpRecord) -> str:
    user = op.inputs.get("user")
    if isinstance(user, str) and user:
        return user
    messages = (op.meta or {}).get("messages")
    if isinstance(messages, Sequence) and messages:
        last: Any = messages[-1]  # pyright: ignore[reportUnknownVariableType]
        if isinstance(last, Mapping):
            return str(last.get("content", ""))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    return ""


def _answer(op: OpRecord) -> str:
    if op.error is not None:
        return f"failed: {op.error.message or op.error.type}"
    output: Any = op.output
    return str(output.get("text", output)) if isinstance(output, Mapping) else str(output)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


def _lines(visits: Sequence[Visit], size: int) -> list[str]:
    if len(visits) > 1:  # the run as a whole says nothing that its calls do not say
        visits = [visit for visit in visits if visit.kind != "root" or visit.reads or visit.error]
    shown_of: Counter[str] = Counter()
    left: Counter[str] = Counter(visit.node for visit in visits)
    lines: list[str] = []
    for visit in visits:
        shown_of[visit.node] += 1
        left[visit.node] -= 1
        if shown_of[visit.node] <= _CALLS_SHOWN or left[visit.node] == 0:
            lines.append(line_of(visit, size))
        elif shown_of[visit.node] == _CALLS_SHOWN + 1:
            lines.append(f"... {left[visit.node]} more calls of {visit.node}")
    return lines


def line_of(visit: Visit, size: int) -> str:
    """One visit on one line, each value within `size` characters."""
    call = f" (call {visit.call_index + 1})" if visit.call_index else ""
    given = ", ".join(f"{name}={cut(shown(value), size)}" for name, value in visit.inputs.items())
    return f"{visit.node}{call}({given}) -> {cut(visit.result, size)}"
