"""The handle of a pipeline parameter: reads the active pipeline. Running one is the room `agentopt.pipelines`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import FrameType
from typing import Any, cast

from agentopt.errors import UserError
from agentopt.graph._context import active_value
from agentopt.graph._handles import Handle
from agentopt.graph._jsonvalue import normalize
from agentopt.graph._parameters import ParameterSpec, declare
from agentopt.graph._pipeline_value import complete_pipeline, pipeline_inputs, pipeline_problems


class PipelineHandle(Handle):
    """A declared pipeline. `.value` reads the active one, `.inputs` are the arguments that a run takes."""

    __slots__ = ()

    @property
    def value(self) -> dict[str, Any]:
        """The active pipeline; a copy."""
        return cast("dict[str, Any]", active_value(self._spec))

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the arguments; every edited pipeline takes the same ones."""
        return self._spec.variables


def declare_pipeline(
    value: Any,
    *,
    name: str,
    frame: FrameType,
    inputs: Sequence[str] | None = None,
    max_nodes: int = 16,
    with_tools: bool = False,
    description: str = "",
) -> ParameterSpec:
    """Declare a pipeline parameter and return its spec; `frame` is where the user declares it.

    Args:
        value: the pipeline; missing keys are filled in (see `complete_pipeline`).
        name: the parameter's identity.
        frame: the frame of the declaration.
        inputs: the arguments of a run; the placeholders that are no nodes when None.
        max_nodes: how many nodes there may be.
        with_tools: whether nodes may name tools.
        description: what the pipeline is for; optimizers see it.

    Raises:
        UserError: the value is no legal pipeline, or the name is declared with another default.
    """
    where = f"pipeline {name!r}"
    if isinstance(cast("object", max_nodes), bool) or not isinstance(cast("object", max_nodes), int) or max_nodes < 1:
        raise UserError(f"{where}: max_nodes must be a whole number of at least 1, found {max_nodes!r}.")
    complete: Any = complete_pipeline(normalize(value, where))
    found = pipeline_problems(complete)
    if found:
        raise UserError(f"{where}: {found[0]}.")
    taken = pipeline_inputs(complete) if inputs is None else tuple(inputs)
    check = functools.partial(pipeline_problems, inputs=taken, max_nodes=max_nodes, with_tools=with_tools)
    found = check(complete)
    if found:
        raise UserError(f"{where}: {found[0]}.")
    spec = ParameterSpec(
        name,
        "pipeline",
        complete,
        description=description,
        constraint_text=(
            f"at most {max_nodes} nodes; inputs: {', '.join(taken) or 'none'}; the end is reachable from every node, "
            "no orphans, every cycle bounded by a max_visits, placeholders name inputs or nodes that run before"
        ),
        variables=taken,
        max_items=max_nodes,
        check_value=check,
        projection=complete_pipeline,
    )
    return declare(spec, frame)
