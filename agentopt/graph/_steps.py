"""A step whose name and inputs are known only at run time: how a node of a pipeline is recorded.

Unlike a decorated function, it says itself where each input comes from, so its edges are exact even when two earlier
steps gave equal texts.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from agentopt.graph._context import enter_op_path, reset_path, rollout_scope
from agentopt.graph._node import from_record
from agentopt.graph._recording import Operation, operation


class OpenStep:
    """A step that is being recorded; `give` says what it returns, `source` is that for the inputs of later steps."""

    __slots__ = ("_operation", "_output")

    def __init__(self, operation: Operation) -> None:
        self._operation = operation
        self._output: Any = None

    def give(self, output: Any) -> None:
        """Set the step's result."""
        self._output = output
        self._operation.set_output(output)

    def annotate(self, **meta: Any) -> None:
        """Add facts about the call (JSON-able)."""
        self._operation.annotate(**meta)

    @property
    def source(self) -> Any:
        """The result, as an input that is linked to this step; to be asked for when the step has ended."""
        if not self._operation.recorded:
            return self._output
        return from_record(self._operation._live, self._output)


@contextmanager
def open_step(
    name: str, inputs: Mapping[str, Any], *, description: str = "", kind: str = "step"
) -> Generator[OpenStep]:
    """Record what happens in the block as one call of `name`; outside a recording the block just runs."""
    scope = rollout_scope.get()
    token = None if scope is None else enter_op_path(scope, name)
    try:
        with operation(name, kind=kind, inputs=inputs, description=description or None) as op:
            yield OpenStep(op)
    finally:
        if token is not None:
            reset_path(token)
