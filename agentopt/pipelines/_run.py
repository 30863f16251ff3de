"""Runs a pipeline parameter: one language model call after another, each a recorded step named after its node.

The unit is one run. The active pipeline is read when the run begins and stays the same to its end; every node's step
reads the parameter, so feedback on an answer reaches the pipeline through the nodes that took part in it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Self, cast

from agentopt import models
from agentopt.errors import UserError
from agentopt.graph import (
    PIPELINE_END,
    OpenStep,
    PipelineHandle,
    Toolbox,
    active_value,
    declare_pipeline,
    open_step,
    pipeline_problems,
)
from agentopt.pipelines._walk import Walk


class _Signature:
    """`__signature__` of instances only: inspecting the class shows its constructor."""

    def __get__(self, instance: Pipeline | None, owner: type) -> inspect.Signature:
        if instance is None:
            raise AttributeError("__signature__")
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Signature([inspect.Parameter(name, kind) for name in instance.inputs])


class Pipeline(PipelineHandle):
    """An agent as data: nodes that prompt a language model, joined by edges and routes. A tunable parameter.

    `await pipeline(question=...)` gives the last node's text; `await pipeline.run(question=...)` gives everything; both
    take the inputs by name or in order. A Pipeline at module level is a target: `agentopt tune file.py:pipeline`.
    """

    __slots__ = ("_checked", "_rounds", "_tools")

    __signature__ = _Signature()

    def __init__(
        self,
        value: Mapping[str, Any],
        *,
        name: str,
        tools: Toolbox | None = None,
        inputs: Sequence[str] | None = None,
        max_nodes: int = 16,
        max_tool_rounds: int = 4,
        description: str = "",
    ) -> None:
        """Declare the pipeline parameter `name`.

        Args:
            value: `{"nodes": {node: {"prompt": ...} or a text}, "edges": {node: [next, ...]}, "root": node}`. Without
                edges the nodes form a chain; without a root the first node is it; keys of a node have defaults.
            name: the parameter's identity; node calls are recorded as `NAME.NODE`.
            tools: what nodes may call; a node names its tools.
            inputs: the arguments of a run; the placeholders that are no nodes when not given.
            max_nodes: how many nodes an edited pipeline may have.
            max_tool_rounds: how often a node may call tools before it has to answer.
            description: what the pipeline is for; optimizers see it.

        Raises:
            UserError: the value is no legal pipeline, or the name is declared with another default.
        """
        if isinstance(cast("object", max_tool_rounds), bool) or max_tool_rounds < 0:
            raise UserError(f"pipeline {name!r}: max_tool_rounds must be at least 0, found {max_tool_rounds!r}.")
        spec = declare_pipeline(
            value,
            name=name,
            frame=_caller(),
            inputs=inputs,
            max_nodes=max_nodes,
            with_tools=tools is not None,
            description=description,
        )
        super().__init__(spec)
        object.__setattr__(self, "_tools", tools)
        object.__setattr__(self, "_rounds", max_tool_rounds)
        object.__setattr__(self, "_checked", [])

    _tools: Toolbox | None
    _rounds: int
    _checked: list[Any]

    @classmethod
    def from_agents(cls, path: str | Path, *, name: str, **options: Any) -> Self:
        """The pipeline that a `solution.json` of the "agents" project describes; `options` as for `Pipeline`.

        What could not be taken over is shown as a warning, a line each; `load_agents` gives it as data.

        Raises:
            UserError: a file or a key is missing or has another form than expected.
        """
        from agentopt.pipelines._import import load_agents

        imported = load_agents(path)
        imported.warn()
        if options.get("tools") is None:
            imported = imported.without_tools()
        chosen: dict[str, Any] = {"inputs": imported.inputs, "description": imported.description, **options}
        return cls(imported.value, name=name, **chosen)

    @property
    def tools(self) -> Toolbox | None:
        """The toolbox that nodes name tools of."""
        return self._tools

    # running

    async def __call__(self, *args: Any, **inputs: Any) -> str:
        """The last node's text."""
        return cast("str", (await self.run(*args, **inputs))["output"])

    async def run(self, *args: Any, **inputs: Any) -> dict[str, Any]:
        """Walk from the root to the end.

        Returns:
            `{"output": the last node's text, "path": [node, ...], node: its latest text, ...}`.

        Raises:
            UserError: an input is missing or unknown, or the active pipeline is not legal.
        """
        given = self._bound(args, inputs)
        with open_step(self.name, given, description=self.spec.description) as step:
            value = self._legal(self.value)
            walk = Walk(value, given)
            node = cast("str", value["root"])
            while node != PIPELINE_END:
                node = await self._visit(walk, node)
            step.annotate(path=walk.path)
            step.give(walk.sources[walk.path[-1]])
        return {"output": walk.texts[walk.path[-1]], "path": walk.path, **walk.texts}

    def run_sync(self, *args: Any, **inputs: Any) -> dict[str, Any]:
        """`run` for synchronous code; also works where a loop is running (it blocks that loop meanwhile)."""
        return models.run_sync(lambda: self.run(*args, **inputs))

    def _bound(self, args: tuple[Any, ...], inputs: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return dict(self.__signature__.bind(*args, **inputs).arguments)
        except TypeError as error:
            takes = ", ".join(self.inputs) or "no inputs"
            raise UserError(f"pipeline {self.name!r}: {error}; it takes {takes}.") from None

    def _legal(self, value: dict[str, Any]) -> dict[str, Any]:
        """`value`, checked once: a candidate may come from a file, and an unbounded cycle must not be walked."""
        if not self._checked or self._checked[0] != value:
            problems = pipeline_problems(value, self.inputs)
            if problems:
                raise UserError(f"pipeline {self.name!r}: {problems[0]}.")
            self._checked[:] = [value]
        return value

    async def _visit(self, walk: Walk, node: str) -> str:
        """Run one node; the name of the next one."""
        definition = walk.nodes[node]
        with open_step(f"{self.name}.{node}", walk.read(node), description=definition["description"]) as step:
            active_value(self.spec)  # this step depends on the pipeline: that edge is what backward follows
            text = await self._answer(walk, node, step)
            step.give(text)
            walk.visited(node, text, text)
            following = await self._next(walk, node)
            step.annotate(visit=walk.path.count(node), next=following)
        walk.sources[node] = step.source
        return following

    async def _answer(self, walk: Walk, node: str, step: OpenStep) -> str:
        definition = walk.nodes[node]
        system, user = walk.prompt(node)
        lm = models.lm(definition["lm"])
        tools = self._offered(definition["tools"], step)
        if not tools or self._tools is None:
            return (await lm.complete(system=system or None, user=user)).text
        turns: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": user})
        for _ in range(self._rounds):
            reply = await lm.complete(turns, tools=tools)
            if not reply.tool_calls:
                return reply.text
            turns.extend(await _called(self._tools, reply, [tool["function"]["name"] for tool in tools]))
        turns.append({"role": "user", "content": "No more tool calls are possible. Answer now."})
        return (await lm.complete(turns)).text

    def _offered(self, names: Sequence[str], step: OpenStep) -> list[dict[str, Any]]:
        """The node's tools that exist now: another edit may have deleted one."""
        if not names or self._tools is None:
            return []
        tools = self._tools.only(names)
        missing = [name for name in names if name not in {tool["function"]["name"] for tool in tools}]
        if missing:
            step.annotate(missing_tools=missing)
        return tools

    async def _next(self, walk: Walk, node: str) -> str:
        options = walk.options(node)
        route = walk.nodes[node]["route"]
        if len(options) == 1 or route["kind"] == "next":
            return options[0]
        if route["kind"] == "field":
            return walk.by_field(node, options)
        lm = models.lm(walk.nodes[node]["lm"])
        try:
            return (await lm.complete(user=walk.question(node, options), choices=options)).text
        except models.LMBadReply:
            return options[0]  # a model that cannot choose goes straight on

    def to_mermaid(self) -> str:
        """The active pipeline as a Mermaid flowchart, for reports and notebooks."""
        value = self.value
        lines = ["flowchart TD"]
        for node, definition in value["nodes"].items():
            label = f"{node}: {definition['description']}" if definition["description"] else node
            lines.append(f'    n_{node}["{label.replace(chr(34), "#quot;")}"]')
        lines.append('    n_end(["end"])')
        for node, later in value["edges"].items():
            route = value["nodes"][node]["route"]
            for to in later:
                cases = [case for case, target in route["cases"].items() if target == to]
                label = " or ".join(cases) if route["kind"] == "field" else route["kind"] if len(later) > 1 else ""
                arrow = f'-->|"{label.replace(chr(34), "#quot;")}"|' if label else "-->"
                lines.append(f"    n_{node} {arrow} n_{to}")
        return "\n".join(lines)


async def _called(toolbox: Toolbox, reply: models.Reply, offered: Sequence[str]) -> list[dict[str, Any]]:
    """The turns that answer a reply's tool calls; only tools that the node was offered are run."""
    wanted = tuple(call for call in reply.tool_calls if call.name in offered)
    if wanted:
        return await toolbox.aturns(replace(reply, tool_calls=wanted))
    names = ", ".join(call.name for call in reply.tool_calls)
    return [
        {"role": "assistant", "content": reply.text},
        {"role": "user", "content": f"There is no tool {names}; the tools are: {', '.join(offered)}."},
    ]


def _caller() -> FrameType:
    """The frame that declares the pipeline: the first one outside this room."""
    frame = sys._getframe(1)
    room = __name__.rpartition(".")[0]
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith(room):
        frame = frame.f_back
    return frame
