"""Metrics: how good an output is, and in words why not better."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from agentopt.evaluation._data import Example
from agentopt.evaluation._rows import Score

if TYPE_CHECKING:
    from agentopt.graph import Trace


@runtime_checkable
class Metric(Protocol):
    """Anything with a name that scores one output."""

    name: str
    needs_expected: bool
    """True when an example without an expected answer cannot be scored."""

    async def __call__(self, output: Any, expected: Any, example: Example, trace: Trace | None) -> Score:
        """The score of `output`; larger is better."""
        ...


MetricSpec = str | Metric | Callable[..., Any]


def resolve_metric(spec: MetricSpec, output_field: str | None = None) -> Metric:
    """The metric that `spec` names."""
    raise NotImplementedError
