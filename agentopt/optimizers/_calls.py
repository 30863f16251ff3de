"""Recorded calls of one function, and trying another version of the function on them in the sandbox.

The unit is one call as a trace holds it: inputs by name, output or error, and what was said about its run.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentopt.errors import UserError
from agentopt.graph import CodeError, CodeTimeout, Reference, WorkerDied, encode_crossing
from agentopt.optimizers._feedback import cut, feedback_text, shown

if TYPE_CHECKING:
    from agentopt.evaluation import Rollout
    from agentopt.graph import Candidate, CodeUnit, ErrorRecord, OpRecord, Trace

_MANY = 64
"""Calls of one run that are looked at; a loop's hundreds of calls say no more."""
_ENOUGH = 3
"""Calls that may go wrong before the rest need not be tried."""


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """One call of a function in one run."""

    op: str
    inputs: Mapping[str, Any]
    output: Any
    error: ErrorRecord | None
    score: float
    """Of the run that the call belongs to."""
    feedback: str
    failed_run: bool

    @property
    def rank(self) -> tuple[bool, float]:
        """Most informative first: calls that raised, then those of the worst runs."""
        return self.error is None, self.score

    def text(self, limit: int) -> str:
        """The call as a line: `f(x=1) -> 2`, or what it raised."""
        given = ", ".join(f"{name}={cut(shown(value), limit)}" for name, value in self.inputs.items())
        if self.error is None:
            return f"{self.op}({given}) -> {cut(shown(self.output), limit)}"
        error = self.error
        place = f" at `{error.source_line}`" if error.source_line and error.op == self.op else ""
        return f"{self.op}({given}) raised {error.type}: {cut(error.message, limit)}{place}"


def calls_of(rollouts: Sequence[Rollout], name: str) -> list[RecordedCall]:
    """Every different call of the function behind the parameter `name`, most informative first."""
    found: dict[str, RecordedCall] = {}
    for rollout in rollouts:
        if rollout.trace is None:
            continue
        text = feedback_text(rollout)
        failed = bool(rollout.row.error) or rollout.row.score < 1.0
        for op in _callers(rollout.trace, name)[:_MANY]:
            own = op.error if op.error is not None and op.error.op_id in (None, op.id) else None
            call = RecordedCall(op.op, op.inputs, op.output, own or op.error, rollout.row.score, text, failed)
            key = f"{call.text(2000)}|{failed}"
            known = found.get(key)
            if known is None or call.rank < known.rank:
                found[key] = call
    return sorted(found.values(), key=lambda call: call.rank)


def _callers(trace: Trace, name: str) -> list[OpRecord]:
    """The records whose function read the code parameter `name`."""
    places = {op.id for op in trace.ops if op.kind == "parameter" and op.op == name}
    return [op for op in trace.ops if any(kind == "parameter" and number in places for number, kind in op.parents)]


def arguments(signature: inspect.Signature, inputs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]] | None:
    """Positional and named arguments of a recorded call; None when the record does not have them all as plain data."""
    rest = dict(inputs)
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += [rest.pop(key) for key in list(rest) if key.startswith(f"{name}_")] or rest.pop(name, ())
        elif parameter.kind is parameter.VAR_KEYWORD:
            named.update(rest.pop(name) if name in rest else rest)
        elif name not in rest:
            return None
        elif parameter.kind is parameter.KEYWORD_ONLY:
            named[name] = rest.pop(name)
        else:
            positional.append(rest.pop(name))
    values = [*positional, *named.values()]
    return None if any(not _can_cross(value) for value in values) else (positional, named)


def _can_cross(value: Any) -> bool:
    if isinstance(value, Reference):
        return False
    try:
        encode_crossing(value, "input")
    except UserError:
        return False
    return True


def try_calls(unit: CodeUnit, source: str, calls: Sequence[RecordedCall], child: Candidate, limit: int) -> list[str]:
    """Compile `source` and run it on up to `limit` recorded inputs in the sandbox; what went wrong, one line each.

    The worker is the one of `child`, the candidate that would have this code. Raising what the recorded call of a
    good run raised as well is no problem: some functions refuse wrong input by raising.
    """
    found: list[str] = []
    tried: set[str] = set()
    with child.active():
        for call in calls:
            bound = arguments(unit.signature, call.inputs)
            if bound is None:
                continue
            key = json.dumps([encode_crossing(part, "input") for part in (*bound[0], bound[1])], sort_keys=True)
            if key in tried:
                continue
            tried.add(key)
            problem, fatal = _try(unit, source, call, bound)
            if problem:
                found.append(problem)
            if fatal or len(found) >= _ENOUGH or len(tried) >= limit:
                break
        if not tried:
            problem = _compiles(unit, source)
            if problem:
                found.append(problem)
    return found


def _try(unit: CodeUnit, source: str, call: RecordedCall, bound: tuple[list[Any], dict[str, Any]]) -> tuple[str, bool]:
    """What one call shows to be wrong ('' for nothing), and whether trying further calls is a waste of time.

    Only what the code did is caught: a sandbox that does not work is not the model's fault, and ends the run.
    """
    given = cut(", ".join(f"{name}={shown(value)}" for name, value in call.inputs.items()), 300)
    try:
        unit.run(source, tuple(bound[0]), bound[1])
    except CodeError as error:
        expected = call.error is not None and not call.failed_run and call.error.type == error.type
        fatal = isinstance(error, (CodeTimeout, WorkerDied))
        return ("", False) if expected else (f"run on ({given}) it failed: {cut(str(error), 600)}", fatal)
    return "", False


def _compiles(unit: CodeUnit, source: str) -> str:
    from agentopt.graph import code_runner

    try:
        code_runner().compile(source, unit.name, unit.uses)
    except CodeError as error:
        return f"it cannot be defined: {cut(str(error), 600)}"
    return ""
