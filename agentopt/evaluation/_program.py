"""Programs: what is run, with which arguments, and which parameters it declares."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentopt.evaluation._data import Example
from agentopt.graph import ParameterSpec


@dataclass
class Program:
    """A target and what is known of it."""

    target: Callable[..., Any]
    name: str
    parameters: Mapping[str, ParameterSpec]
    signature: inspect.Signature
    module: str

    def tunable(self, tune: Sequence[str] = (), freeze: Sequence[str] = ()) -> dict[str, ParameterSpec]:
        """The parameters an optimizer may change."""
        raise NotImplementedError

    async def run(self, example: Example, timeout: float | None = None) -> Any:
        """Run the target on one example."""
        raise NotImplementedError


def load_program(target: str | Callable[..., Any]) -> Program:
    """Load `file.py:func`, `pkg.mod:func`, a callable or a Module."""
    raise NotImplementedError
