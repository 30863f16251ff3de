"""Feedback backward through a trace: the minimal subgraph that links a parameter to what the feedback is about.

The subgraph of a parameter is every record on a path from it to a target, plus the direct inputs of those records as a
frontier (Trace's minimal subgraph, arXiv 2406.16218, section 3). One reverse sweep marks what the targets depend on; a
subgraph's members are found when they are first asked for, by one forward walk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from agentopt.errors import UserError
from agentopt.graph._records import Feedback, OpRecord, TracedParameter
from agentopt.graph._trace import Trace


class _Flow:
    """What one `backward` call shares between its subgraphs."""

    def __init__(self, trace: Trace, feedback: tuple[Feedback, ...]) -> None:
        self.trace = trace
        self.feedback = feedback
        self.targets = {int(item.target) for item in feedback}
        ops = trace.ops
        self.reaches = bytearray(len(ops))  # 1: some target depends on this record
        for target in self.targets:
            self.reaches[target] = 1
        for number in range(max(self.targets, default=-1), -1, -1):
            if self.reaches[number]:
                for parent, _ in ops[number].parents:
                    self.reaches[parent] = 1

    @cached_property
    def children(self) -> list[list[int] | None]:
        """For each record those that depend on it directly and that a target depends on."""
        found: list[list[int] | None] = [None] * len(self.trace)
        for op in self.trace.ops:
            if self.reaches[op.id]:
                for parent, _ in op.parents:
                    known = found[parent]
                    if known is None:
                        found[parent] = [op.id]
                    elif known[-1] != op.id:
                        known.append(op.id)
        return found

    def downstream(self, leaves: Iterable[int]) -> list[int]:
        children = self.children
        stack = list(leaves)
        seen = set(stack)
        while stack:
            for child in children[stack.pop()] or ():
                if child not in seen:
                    seen.add(child)
                    stack.append(child)
        return sorted(seen)


class Subgraph:
    """What backward found for a parameter: a lazy view of the trace."""

    def __init__(self, flow: _Flow, names: tuple[str, ...], leaves: tuple[int, ...]) -> None:
        self._flow = flow
        self._names = names
        self._leaves = leaves

    @property
    def trace(self) -> Trace:
        """The trace this is a view of."""
        return self._flow.trace

    @property
    def parameter(self) -> str:
        """The parameter's name (the first one's, for a union)."""
        return self._names[0]

    @cached_property
    def _members(self) -> list[int]:
        return self._flow.downstream(self._leaves)

    @cached_property
    def ops(self) -> Sequence[OpRecord]:
        """The records on paths from the parameter to a target, parents first, without the parameter's own."""
        leaves = set(self._leaves)
        return tuple(self.trace.ops[number] for number in self._members if number not in leaves)

    @cached_property
    def parameters(self) -> Mapping[str, TracedParameter]:
        """The parameter of this subgraph (for a union: all of them), with the values this run used."""
        return {name: self.trace.parameters[name] for name in self._names}

    @cached_property
    def inputs(self) -> Sequence[OpRecord]:
        """The frontier: direct inputs of the ops that do not depend on the parameter, other parameters included."""
        members = set(self._members)
        frontier = {parent for op in self.ops for parent, _ in op.parents if parent not in members}
        return tuple(self.trace.ops[number] for number in sorted(frontier))

    @cached_property
    def feedback(self) -> tuple[Feedback, ...]:
        """The feedback items whose target depends on the parameter, in the order given."""
        members = set(self._members)
        return tuple(item for item in self._flow.feedback if item.target in members)

    @property
    def outputs(self) -> Sequence[OpRecord]:
        """The records that the feedback is about, parents first."""
        return tuple(self.trace.ops[number] for number in sorted({int(item.target) for item in self.feedback}))

    @property
    def output(self) -> OpRecord:
        """The last of `outputs`."""
        return self.outputs[-1]

    def union(self, *others: Subgraph) -> Subgraph:
        """One subgraph for several parameters of the same `backward` call.

        Raises:
            UserError: the subgraphs come from different backward calls.
        """
        if any(other._flow is not self._flow for other in others):
            raise UserError("only subgraphs of one backward call can be joined")
        joined = (self, *others)
        names = dict.fromkeys(name for item in joined for name in item._names)
        leaves = dict.fromkeys(leaf for item in joined for leaf in item._leaves)
        return Subgraph(self._flow, tuple(names), tuple(leaves))

    def __repr__(self) -> str:
        return f"Subgraph({', '.join(self._names)})"


def backward(trace: Trace, feedbacks: Iterable[Feedback] | Feedback) -> dict[str, Subgraph]:
    """Send feedback backward: parameter name to its minimal subgraph, for every parameter some target depends on.

    Several items may be about one record or about different ones; nothing is merged and nothing stays on the graph, so
    calling again with other feedback gives an independent answer. Time and memory are linear in records and edges.

    Raises:
        UserError: a target is not in the trace, or a text is not a string.
    """
    items = [feedbacks] if isinstance(feedbacks, Feedback) else list(feedbacks)
    checked: list[Feedback] = []
    for item in items:
        if not isinstance(item.text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UserError(f"feedback text must be a string, not {type(item.text).__name__}")
        checked.append(Feedback(trace.id_of(item.target), item.text, item.score, item.weight))
    flow = _Flow(trace, tuple(checked))
    leaves: dict[str, list[int]] = {}
    for op in trace.ops:
        if op.kind == "parameter" and flow.reaches[op.id]:
            leaves.setdefault(op.op, []).append(op.id)
    return {name: Subgraph(flow, (name,), tuple(ids)) for name, ids in leaves.items()}
