"""Toolbox: the list of tools an agent is given, which optimizers may describe anew, recode, extend and shrink.

A tool without source is a function of the program and runs in this process, `@ao.tool(effects=True)` honoured. A tool
with source, created or changed by an optimizer, runs through the `CodeRunner` in force, never in this process.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Protocol, cast

from agentopt.errors import RunError, UserError
from agentopt.graph import _context
from agentopt.graph._calls import StepInfo, _call, _call_async
from agentopt.graph._code import ALLOWED_MODULES, CodeError, CodeUnit, Used, describe_use
from agentopt.graph._context import active_value, peek_value
from agentopt.graph._handles import CLASSES, Handle, _declared
from agentopt.graph._jsonvalue import JSONValue
from agentopt.graph._parameters import ParameterSpec
from agentopt.graph._tool_values import OwnTool, ToolSet, arguments_problem, own_tool


class ToolError(RunError):
    """A call that names no tool or does not fit it; the text is meant for the model that made the call."""


class ToolRequest(Protocol):
    """One call that a model wants (`agentopt.models.ToolCall`)."""

    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def arguments(self) -> Mapping[str, Any]: ...
    @property
    def raw(self) -> str | None: ...


class ToolRequests(Protocol):
    """A reply that may hold such calls (`agentopt.Reply`)."""

    @property
    def text(self) -> str: ...
    @property
    def tool_calls(self) -> Sequence[ToolRequest]: ...


class Toolbox(Handle):
    """The active tools: `complete(tools=toolbox)` offers them, `call` runs one, `turns` answers a whole reply."""

    __slots__ = ()

    @property
    def value(self) -> list[dict[str, Any]]:
        """The active tools as `{"name", "description", "parameters", "source", "examples"}`; a copy."""
        return cast("list[dict[str, Any]]", active_value(self._spec))

    @property
    def names(self) -> list[str]:
        """The names of the active tools."""
        return [item["name"] for item in self.value]

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The active tools as a chat API takes them."""
        value = self.value
        for spec in self.reads(value):
            active_value(spec)
        return self.for_model(cast("JSONValue", value))

    @property
    def uses(self) -> tuple[Used, ...]:
        """The names of the program that the code of created tools may see."""
        return self._set.uses

    def visible(self, tool: str) -> tuple[Used, ...]:
        """`uses`, and for a function decorated with `@ao.tool(uses=...)` its own: what code of `tool` may see."""
        return self._set.visible(tool)

    def only(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """`tools`, those named; a name that is not active is left out."""
        return [tool for tool in self.tools if tool["function"]["name"] in names]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.tools)

    def __contains__(self, item: object) -> bool:
        return item in self.names

    def __str__(self) -> str:
        """The active tools as lines, for agents that list them in a prompt."""
        shown = [tool["function"] for tool in self.tools]
        return "\n".join(
            f"- {tool['name']}({', '.join(tool['parameters'].get('properties', ()))}): {tool['description']}"
            for tool in shown
        )

    def __format__(self, format_spec: str) -> str:
        return format(str(self), format_spec)

    # what the language model client asks

    def for_model(self, value: JSONValue) -> list[dict[str, Any]]:
        """`value` in the form of a chat API; reads are left to the caller."""
        return [
            {
                "type": "function",
                "function": {
                    "name": item["name"],
                    "description": self._description(item),
                    "parameters": item["parameters"],
                },
            }
            for item in cast("list[dict[str, Any]]", value)
        ]

    def reads(self, value: Any) -> list[ParameterSpec]:
        """The other parameters that `for_model(value)` looks at: descriptions that belong to a decorated tool."""
        found = [self._own_description(item) for item in cast("list[dict[str, Any]]", value)]
        return [spec for spec in found if spec is not None]

    def _description(self, item: Mapping[str, Any]) -> str:
        spec = self._own_description(item)
        return item["description"] if spec is None else str(peek_value(spec))

    def _own_description(self, item: Mapping[str, Any]) -> ParameterSpec | None:
        # As long as the toolbox leaves a decorated tool's docstring alone, `NAME.description` says what is shown.
        own = self._set.own.get(item["name"])
        if own is None or own.info is None or own.info.description is None or item["description"] != own.description:
            return None
        return own.info.description.spec

    # running

    def call(self, tool: str, args: Mapping[str, Any] | None = None) -> Any:
        """Run one tool, recorded as a tool call.

        Raises:
            ToolError: there is no such tool, or the arguments do not fit; the text is meant for the model.
            CodeError: created or changed code failed; the text is meant for the model too.
            EffectsRefused: the tool has effects and may not run in a rollout.
            UserError: the tool is an async function of the program; use `acall`.
        """
        own, info, arguments = self._prepared(tool, args, waits=False)
        if own is not None and inspect.iscoroutinefunction(own.fn):
            raise UserError(f"toolbox {self.name!r}: {tool} is an async function; use `await toolbox.acall(...)`.")
        return _call(info, (), arguments) if own is None or own.info is None else own.fn(**arguments)

    async def acall(self, tool: str, args: Mapping[str, Any] | None = None) -> Any:
        """`call`, without blocking the event loop while created code runs; also for async functions."""
        own, info, arguments = self._prepared(tool, args, waits=True)
        if own is None or own.info is None:
            return await _call_async(info, (), arguments)
        result = own.fn(**arguments)
        return await result if inspect.isawaitable(result) else result

    def turns(self, reply: ToolRequests) -> list[dict[str, Any]]:
        """Run what `reply` asks for; the chat messages to go on with: the assistant's turn and one turn a call.

        A call that cannot be made, or created code that fails, is answered with the error's text. An exception of a
        function of the program is raised.
        """
        return [_assistant(reply), *(self._turn(request) for request in reply.tool_calls)]

    async def aturns(self, reply: ToolRequests) -> list[dict[str, Any]]:
        """`turns`, with `acall`; the calls run one after the other."""
        return [_assistant(reply), *[await self._aturn(request) for request in reply.tool_calls]]

    def _turn(self, request: ToolRequest) -> dict[str, Any]:
        try:
            return _answer(request, self.call(request.name, _arguments(request)))
        except (ToolError, CodeError) as error:
            return _answer(request, f"error: {error}")

    async def _aturn(self, request: ToolRequest) -> dict[str, Any]:
        try:
            return _answer(request, await self.acall(request.name, _arguments(request)))
        except (ToolError, CodeError) as error:
            return _answer(request, f"error: {error}")

    @property
    def _set(self) -> ToolSet:
        # The declaration's check is a method of the set, so that a handle made from a spec alone finds it.
        return cast("ToolSet", cast("Any", self._spec.check_value).__self__)

    def _prepared(
        self, tool: str, args: Mapping[str, Any] | None, *, waits: bool
    ) -> tuple[OwnTool | None, StepInfo, dict[str, Any]]:
        """Who runs the call (None: sandboxed code), how it is recorded, and the arguments."""
        tools = self._set
        value = cast("list[dict[str, Any]]", peek_value(self._spec))
        item = next((item for item in value if item["name"] == tool), None)
        if item is None:
            known = ", ".join(item["name"] for item in value) or "none"
            raise ToolError(f"there is no tool {tool!r}; the tools are: {known}")
        own = tools.own.get(tool)
        if item["source"] and not (own is not None and _held_back(own)):
            unit, problems = tools.unit(tool, item["source"])
            if unit is None or problems:
                raise CodeError(tool, "CodeError", "; ".join(problems))
            own, signature = None, unit.signature
            fn = _sandboxed(unit, waits=waits)
        elif own is None:
            raise ToolError(f"the tool {tool!r} has no code")
        else:
            signature, fn = own.signature, own.fn
        arguments = dict(args or {})
        problem = arguments_problem(signature, arguments)
        if problem:
            raise ToolError(f"{tool}: {problem}")
        if own is not None and own.info is not None:
            active_value(self._spec)  # the tool records its own call; this read belongs to the caller
        return own, self._info(tool, str(item["description"]), signature, fn), arguments

    def _info(self, tool: str, description: str, signature: inspect.Signature, fn: Callable[..., Any]) -> StepInfo:
        def body(**given: Any) -> Any:
            active_value(self._spec)  # inside the call's own record
            return fn(**given)

        parameters = signature.parameters
        return StepInfo(
            tool,
            "tool",
            body,
            doc=description,
            names=tuple(parameters),
            defaults={name: p.default for name, p in parameters.items() if p.default is not p.empty},
        )


CLASSES["tools"] = Toolbox


def _sandboxed(unit: CodeUnit, *, waits: bool) -> Callable[..., Any]:
    def run(**given: Any) -> Any:
        return unit.arun(unit.source, (), given) if waits else unit.run(unit.source, (), given)

    return run


def _held_back(own: OwnTool) -> bool:
    """Whether a tool with effects must not run here: its stand-in does, also when its code was changed."""
    if own.info is None or not own.info.effects or _context.effects_allowed():
        return False
    return _context.current_rollout() is not None or _context.rollouts_active()


def _arguments(request: ToolRequest) -> Mapping[str, Any]:
    if request.raw is not None:
        raise ToolError(f"{request.name}: the arguments are no JSON object: {request.raw!r:.120}")
    return request.arguments


def _assistant(reply: ToolRequests) -> dict[str, Any]:
    calls = [
        {
            "id": request.id,
            "type": "function",
            "function": {
                "name": request.name,
                "arguments": json.dumps(dict(request.arguments)) if request.raw is None else request.raw,
            },
        }
        for request in reply.tool_calls
    ]
    return {"role": "assistant", "content": reply.text, **({"tool_calls": calls} if calls else {})}


def _answer(request: ToolRequest, result: Any) -> dict[str, Any]:
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
    return {"role": "tool", "tool_call_id": request.id, "content": text}


def toolbox(
    tools: Sequence[Callable[..., Any]],
    *,
    name: str,
    max_tools: int = 12,
    uses: Sequence[object] = (),
    description: str = "",
) -> Toolbox:
    """Declare the tools of an agent as one parameter. Frozen: it is tuned only when `--tune` names it.

    Args:
        tools: functions with a docstring, plain or decorated with `@ao.tool`; async ones too. They run in this process
            as long as nobody changes their code.
        name: the parameter's identity.
        max_tools: how many tools there may be at most.
        uses: names (or modules, functions and registered dataclasses themselves) that created and changed code may see.
        description: what the tools are for; optimizers see it.

    Raises:
        UserError: something is no tool, one of `uses` cannot cross into the sandbox, or the name is declared with
            other tools.
    """
    frame = sys._getframe(1)
    where = f"toolbox {name!r}"
    if isinstance(cast("object", max_tools), bool) or not isinstance(cast("object", max_tools), int) or max_tools < 1:
        raise UserError(f"{where}: max_tools must be a whole number of at least 1, found {max_tools!r}.")
    if not isinstance(cast("object", tools), Sequence) or isinstance(tools, str):
        raise UserError(f"{where}: expected a list of functions, found {tools!r:.60}.")
    found = [own_tool(fn, where) for fn in tools]
    own = {tool.name: tool for tool in found}
    if len(own) < len(found):
        names = [tool.name for tool in found]
        raise UserError(f"{where}: two tools have the name {next(n for n in names if names.count(n) > 1)!r}.")
    visible = tuple(_use(use, frame, where) for use in uses)
    tool_set = ToolSet(own, visible, max_tools)
    spec = ParameterSpec(
        name,
        "tools",
        [tool.entry() for tool in found],
        description=description,
        constraint_text=(
            f"at most {max_tools} tools; code is a whole def with a docstring, named arguments and literal defaults; "
            f"visible names besides builtins and standard modules: {', '.join(use.name for use in visible) or 'none'}"
        ),
        max_items=max_tools,
        frozen=True,
        check_value=tool_set.problems,
    )
    handle = _declared(Toolbox, spec, frame)
    if handle.spec is not spec:  # declared before, with the same texts: the functions must be the same ones too
        before = handle._set.own
        if any(before[key].origin != tool.origin for key, tool in own.items()):
            raise UserError(
                f"{where} is declared twice with different functions, at {handle.spec.place} and "
                f"{frame.f_code.co_filename}:{frame.f_lineno}; give one of them another name."
            )
        handle.spec.check_value = tool_set.problems  # a module that was loaded again has new function objects
    return handle


def _use(use: object, frame: FrameType, where: str) -> Used:
    if not isinstance(use, str):
        return describe_use(str(getattr(use, "__name__", "")), use, where)
    for scope in (frame.f_locals, frame.f_globals):
        if use in scope:
            return describe_use(use, scope[use], where)
    if use in ALLOWED_MODULES:
        return Used(use, "module", use)
    raise UserError(f"{where}: uses names {use!r}, which is not defined there yet; define it above the toolbox.")
