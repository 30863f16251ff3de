"""The tool optimizer: choose an operation first, then carry it out with the words made for it.

The unit is one operation on one tool: improve the description and schema, create, edit the code, delete. The tools of
an `ao.toolbox` take all four; of an `@ao.tool` the description and the code can be changed where they are tuned. Code
is tried in the sandbox before it is proposed: on its unit examples, twice each, and on recorded calls.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import anyio.to_thread

from agentopt.errors import RunError, UserError
from agentopt.graph import (
    CreateTool,
    DeleteTool,
    EditToolCode,
    EditToolDescription,
    SetCode,
    SetText,
    Toolbox,
    apply_edits,
    code_unit,
    run_examples,
)
from agentopt.optimizers._calls import calls_of, try_calls
from agentopt.optimizers._feedback import cut, shown
from agentopt.optimizers._legal import current_value, strip_fence
from agentopt.optimizers._memory import render_memory
from agentopt.optimizers._repair import Draft
from agentopt.optimizers._reply import resolve_name
from agentopt.optimizers.symbolic._gradients import suggestion_lines, suggestions_for
from agentopt.optimizers.symbolic._prompt import losses_text
from agentopt.optimizers.symbolic._show import tool_text
from agentopt.optimizers.symbolic._trajectory import line_of
from agentopt.optimizers.symbolic._work import TEXT, Work, fields_of, object_schema, words_of

if TYPE_CHECKING:
    from agentopt.graph import Edit, JSONValue, ParameterSpec
    from agentopt.optimizers._protocol import Update

SOURCE = "symbolic.tool"
KINDS = frozenset({"tools", "tool_text", "code"})
OPERATIONS = ("improve_description", "create", "edit_code", "delete")
_TRIED = 4
"""Recorded calls that new code is run on."""
_NEW = "new_tool"


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool that may be changed, and through which parameters."""

    name: str
    text: str
    toolbox: ParameterSpec | None = None
    description: ParameterSpec | None = None
    code: ParameterSpec | None = None

    @property
    def operations(self) -> tuple[str, ...]:
        """What can be done to it."""
        if self.toolbox is not None:
            return ("improve_description", "edit_code", "delete")
        own = (("improve_description", self.description), ("edit_code", self.code))
        return tuple(name for name, spec in own if spec is not None)


class ToolOptimizer:
    """Edits of tools, one operation at a time."""

    kind = "tool"

    def applies(self, specs: Mapping[str, ParameterSpec]) -> bool:
        """Whether there is a tool to edit."""
        return any(spec.kind in KINDS for spec in specs.values())

    async def update(self, work: Work, place: int) -> Update | None:
        """One operation on one tool, within the learning rate; None when none is wanted or none is legal.

        Raises:
            CallsUsedUp: the limit on calls is reached.
            LMError: the model cannot be reached at present.
            BudgetExhausted: the budget does not cover the call.
        """
        specs = [spec for spec in work.context.specs.values() if spec.kind in KINDS]
        gradients = suggestions_for(work.gradients, [spec.name for spec in specs])
        if not gradients:
            return None
        tools = tools_of(work)
        boxes = [spec for spec in specs if spec.kind == "tools"]
        limit = work.options.text_chars
        fields = {
            "tools": cut("\n\n".join(tool.text for tool in tools), 2 * limit) or "(none)",
            "calls": _tool_calls(work, {tool.name for tool in tools}, limit // 2),
            "suggestions": suggestion_lines(gradients, limit),
            "losses": losses_text(work, limit // 2),
            "past": render_memory(work.context.history, 600),
        }
        chosen = await self._choose(work, place, fields, (tools, boxes))
        if chosen is None:
            return None
        operation, tool, box = chosen
        fields |= {"tool": tool.text, "name": tool.name, "rate": work.rate_text(1)}
        fields["form"] = work.templates[f"symbolic.form.{operation}"].text
        return await work.propose(
            work.messages(f"tool.{operation}", fields),
            source=SOURCE,
            schema=_FORMS[operation],
            read=partial(_READERS[operation], tool, box),
            place=place,
            parts=(operation, tool.name),
            trial=partial(_trial, work),
        )

    async def _choose(
        self,
        work: Work,
        place: int,
        fields: Mapping[str, str],
        known: tuple[Sequence[Tool], Sequence[ParameterSpec]],
    ) -> tuple[str, Tool, ParameterSpec | None] | None:
        """The operation, the tool it is for, and the toolbox where there is one."""
        tools, boxes = known
        offered = [name for name in OPERATIONS if any(name in tool.operations for tool in tools)]
        if boxes:
            offered = [name for name in OPERATIONS if name in offered or name == "create"]
        schema = object_schema(
            analysis=TEXT, operation={"type": "string", "enum": [*offered, "none"]}, tool={"type": "string"}
        )
        given = {
            **fields,
            "operations": "\n".join(work.templates[f"symbolic.tool.about.{name}"].text for name in offered),
        }
        messages = work.messages("tool", given)
        reply = await work.answer(SOURCE, messages, schema, "choose", work.context.iteration, place=place)
        found = fields_of(reply, ["operation"])
        operation = str(found.get("operation", "")).strip() if found is not None else ""
        if operation == "none":
            return None
        if found is None or operation not in offered:
            work.drop(SOURCE, f"the answer names no operation of {', '.join(offered)}, none: {cut(str(reply), 120)}")
            return None
        box = next(iter(boxes), None)
        if operation == "create":
            return operation, Tool(_NEW, "", toolbox=box), box
        fitting = [tool for tool in tools if operation in tool.operations]
        name = resolve_name(str(found.get("tool", "")), [tool.name for tool in fitting])
        tool = next((tool for tool in fitting if tool.name == name), fitting[0] if len(fitting) == 1 else None)
        if tool is None:
            names = ", ".join(tool.name for tool in fitting)
            work.drop(SOURCE, f"{operation} of {found.get('tool')!r:.80}: there is no such tool; expected {names}")
            return None
        return operation, tool, tool.toolbox


def tools_of(work: Work) -> list[Tool]:
    """Every tool that may be changed."""
    context = work.context
    found: list[Tool] = []
    decorated: dict[str, dict[str, ParameterSpec]] = {}
    for spec in context.specs.values():
        value = current_value(context, spec)
        if spec.kind == "tools":
            found.extend(Tool(str(entry["name"]), tool_text(entry), spec) for entry in value)
        elif spec.kind in ("tool_text", "code"):
            name = spec.name.rpartition(".")[0] or spec.name
            decorated.setdefault(name, {})[spec.kind] = spec
    for name, specs in decorated.items():
        text, code = specs.get("tool_text"), specs.get("code")
        lines = [f"tool {name}: {current_value(context, text)}" if text is not None else f"tool {name}"]
        if code is not None:
            lines.append(f"  code:\n{current_value(context, code)}")
        found.append(Tool(name, "\n".join(lines), description=text, code=code))
    return found


def _tool_calls(work: Work, names: set[str], limit: int) -> str:
    """The recorded calls of these tools in the failing cases, and tool calls that went wrong otherwise."""
    lines: dict[str, None] = {}
    for case in work.cases:
        for visit in case.trajectory.visits:
            if visit.node in names or visit.kind == "tool":
                lines[line_of(visit, 300)] = None
    return cut("\n".join(f"- {line}" for line in lines), limit) or "(none recorded)"


# --- reading answers -------------------------------------------------------------------------------------------------

_FORMS: Mapping[str, dict[str, Any]] = {
    "improve_description": object_schema(analysis=TEXT, description=TEXT, parameters=TEXT),
    "create": object_schema(
        analysis=TEXT,
        name=TEXT,
        description=TEXT,
        source=TEXT,
        examples={"type": "array", "items": object_schema(args=TEXT, expected=TEXT)},
    ),
    "edit_code": object_schema(analysis=TEXT, source=TEXT),
    "delete": object_schema(analysis=TEXT, delete={"type": "boolean"}),
}


def _read_description(tool: Tool, box: ParameterSpec | None, reply: Any) -> Draft:
    found = fields_of(reply, ["description", "parameters"])
    if found is None:
        return Draft(unreadable='expected a JSON object with "description" and "parameters"')
    reason = str(found.get("analysis", ""))
    text = found.get("description")
    description = text.strip() if isinstance(text, str) and text.strip() else None
    if box is None:
        if description is None or tool.description is None:
            return Draft(rationale=reason)
        return Draft([SetText(tool.description.name, description)], reason)
    schema = _data(found.get("parameters")) or None
    if schema is not None and not isinstance(schema, Mapping):
        return Draft([], reason, [f"{tool.name}: 'parameters' must be the JSON text of an object schema, or empty"])
    if description is None and schema is None:
        return Draft(rationale=reason)
    parameters = cast("Mapping[str, JSONValue] | None", schema)
    return Draft([EditToolDescription(box.name, tool.name, description, parameters)], reason)


def _read_create(tool: Tool, box: ParameterSpec | None, reply: Any) -> Draft:
    found = fields_of(reply, ["source", "name"])
    if found is None or box is None:
        return Draft(unreadable='expected a JSON object with "name", "description", "source" and "examples"')
    reason = str(found.get("analysis", ""))
    name, source = str(found.get("name") or "").strip(), strip_fence(str(found.get("source") or ""))
    description = str(found.get("description") or "").strip()
    examples, problems = _examples(found.get("examples"))
    if not examples and not problems:
        problems = ['the new tool needs at least one unit example: {"args": {...}, "expected": ...}']
    if problems:
        return Draft([], reason, [f"{name}: {problem}" for problem in problems])
    return Draft([CreateTool(box.name, name, description, source, tuple(examples))], reason)


def _examples(value: Any) -> tuple[list[JSONValue], list[str]]:
    found: list[JSONValue] = []
    items = cast("list[Any]", value) if isinstance(value, list) else []
    for place, item in enumerate(items, start=1):
        entry: Mapping[str, Any] = cast("Mapping[str, Any]", item) if isinstance(item, Mapping) else {}
        args = _data(entry.get("args"))
        if not isinstance(args, Mapping) or "expected" not in entry:
            return [], [f'example {place} must be {{"args": {{...}}, "expected": ...}} with JSON values']
        found.append({"args": dict(cast("Mapping[str, JSONValue]", args)), "expected": _data(entry["expected"])})
    return found, []


def _data(value: Any) -> Any:
    """A JSON value that came as text; a text that is no JSON stays a text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _read_code(tool: Tool, box: ParameterSpec | None, reply: Any) -> Draft:
    source = strip_fence(words_of(reply, "source"))
    found = fields_of(reply, ["analysis"])
    reason = str(found.get("analysis", "")) if found is not None else ""
    if not source:
        return Draft(rationale=reason) if reason else Draft(unreadable='expected a JSON object with "source"')
    if box is not None:
        return Draft([EditToolCode(box.name, tool.name, source)], reason)
    if tool.code is None:
        return Draft(rationale=reason)
    return Draft([SetCode(tool.code.name, source)], reason)


def _read_delete(tool: Tool, box: ParameterSpec | None, reply: Any) -> Draft:
    found = fields_of(reply, ["delete"])
    if found is None:
        return Draft(unreadable='expected a JSON object with "delete" true or false')
    edits: list[Edit] = [DeleteTool(box.name, tool.name)] if box is not None and found.get("delete") is True else []
    return Draft(edits, str(found.get("analysis", "")))


_READERS = {
    "improve_description": _read_description,
    "create": _read_create,
    "edit_code": _read_code,
    "delete": _read_delete,
}


# --- trying code -----------------------------------------------------------------------------------------------------


async def _trial(work: Work, edit: Edit) -> list[str]:
    """What running new code shows to be wrong with it; the sandbox blocks, so it runs beside the event loop."""
    if isinstance(edit, (CreateTool, EditToolCode)):
        return await anyio.to_thread.run_sync(_try_tool, work, edit)
    if isinstance(edit, SetCode):
        return await anyio.to_thread.run_sync(_try_code, work, edit)
    return []


def _try_tool(work: Work, edit: CreateTool | EditToolCode) -> list[str]:
    context = work.context
    spec = context.specs[edit.name]
    child = apply_edits(context.parent, [edit], context.specs)
    box = Toolbox(spec)
    with child.active():
        found = run_examples(child.get(edit.name), edit.tool, box.uses)
        for args in [] if found else _recorded(work, edit.tool):
            given = ", ".join(f"{name}={cut(shown(value), 80)}" for name, value in args.items())
            try:
                first, second = box.call(edit.tool, args), box.call(edit.tool, args)
            except (RunError, UserError) as error:
                return [f"{edit.tool}({given}), a recorded call, failed: {cut(str(error), 400)}"]
            if repr(first) != repr(second):
                return [f"{edit.tool}({given}) gave two different results; it must give the same result each time"]
    return found


def _recorded(work: Work, tool: str) -> list[dict[str, Any]]:
    """Arguments that the tool was called with, most informative cases first, each once; JSON values only."""
    found: dict[str, dict[str, Any]] = {}
    for case in work.cases:
        for visit in case.trajectory.visits:
            if visit.node != tool or visit.kind != "tool":
                continue
            try:
                key = json.dumps(dict(visit.inputs), sort_keys=True)
            except (TypeError, ValueError):
                continue
            found.setdefault(key, dict(visit.inputs))
    return list(found.values())[:_TRIED]


def _try_code(work: Work, edit: SetCode) -> list[str]:
    context = work.context
    unit = code_unit(context.specs[edit.name])
    if unit is None:
        return []
    child = apply_edits(context.parent, [edit], context.specs)
    return try_calls(unit, edit.source, calls_of(context.rollouts, edit.name), child, _TRIED)
