"""Edits of a toolbox: create, describe, recode and delete a tool; and how a tool's unit examples are run.

The tool part of agent symbolic learning (arXiv 2406.18532). `check` is static; `run_examples` runs the code in the
sandbox, twice, so that a tool that fails or answers differently each time is seen before it is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from agentopt.errors import UserError
from agentopt.graph._code import CodeError, CodeUnit, Used
from agentopt.graph._context import RolloutScope, rollout_scope
from agentopt.graph._jsonvalue import JSONValue, canonical, normalize
from agentopt.graph._parameters import ParameterSpec, suggestion
from agentopt.graph._structured import EditError, StructuredEdit
from agentopt.graph._tool_values import arguments_problem, clean_source, full_unit, read_source, schema_of


@dataclass(frozen=True, slots=True)
class _ToolEdit(StructuredEdit):
    """Shared by the edits of one tool."""

    kinds: ClassVar[frozenset[str]] = frozenset({"tools"})
    tool: str


def _items(value: Any) -> list[dict[str, Any]]:
    items = cast("list[Any]", value) if isinstance(value, list) else []
    return [dict(cast("Mapping[str, Any]", item)) for item in items if isinstance(item, Mapping)]


def _found(items: Sequence[Mapping[str, Any]], tool: str) -> int:
    names = [str(item.get("name")) for item in items]
    if tool not in names:
        known = ", ".join(names) or "none"
        raise EditError(f"there is no tool {tool!r}{suggestion(tool, names)}; the tools are {known}")
    return names.index(tool)


def _read(source: str, tool: str) -> CodeUnit:
    unit, problems = read_source(source, tool)
    if unit is None or problems:
        raise EditError(f"the source of {tool!r}: {problems[0]}")
    return unit


@dataclass(frozen=True, slots=True)
class CreateTool(_ToolEdit):
    """Add a tool: a whole `def` with a docstring. Its schema is derived from the signature when none is given."""

    kind: ClassVar[str] = "create_tool"
    description: str
    source: str
    examples: tuple[JSONValue, ...] = ()
    parameters: Mapping[str, JSONValue] | None = None

    def change(self, value: Any, spec: ParameterSpec | None) -> JSONValue:
        """The toolbox with the tool at its end."""
        items = _items(value)
        if any(item.get("name") == self.tool for item in items):
            raise EditError(f"there is a tool {self.tool!r} already; edit it, or give the new one another name")
        source = clean_source(self.source)
        unit = _read(source, self.tool)
        items.append(
            {
                "name": self.tool,
                "description": self.description,
                "parameters": schema_of(unit.signature) if self.parameters is None else dict(self.parameters),
                "source": source,
                "examples": list(self.examples),
            }
        )
        return cast("JSONValue", items)


@dataclass(frozen=True, slots=True)
class EditToolDescription(_ToolEdit):
    """Change what the model is told of a tool: its description, its schema, or both."""

    kind: ClassVar[str] = "edit_tool_description"
    description: str | None = None
    parameters: Mapping[str, JSONValue] | None = None

    def change(self, value: Any, spec: ParameterSpec | None) -> JSONValue:
        """The toolbox with the new texts."""
        items = _items(value)
        item = items[_found(items, self.tool)]
        if self.description is None and self.parameters is None:
            raise EditError("gives neither a description nor parameters")
        if self.description is not None:
            item["description"] = self.description
        if self.parameters is not None:
            item["parameters"] = dict(self.parameters)
        return cast("JSONValue", items)


@dataclass(frozen=True, slots=True)
class EditToolCode(_ToolEdit):
    """Replace a tool's code by a whole `def`; from then on it runs in the sandbox.

    A schema that fits only the old arguments is derived anew; one that fits the new ones too is kept.
    """

    kind: ClassVar[str] = "edit_tool_code"
    source: str

    def change(self, value: Any, spec: ParameterSpec | None) -> JSONValue:
        """The toolbox with the new code."""
        items = _items(value)
        item = items[_found(items, self.tool)]
        source = clean_source(self.source)
        if item.get("source") == source:
            raise EditError(f"the tool {self.tool!r} has this source already")
        signature = _read(source, self.tool).signature
        schema: Any = item.get("parameters")
        before: Any = cast("Mapping[str, Any]", schema).get("properties") if isinstance(schema, Mapping) else None
        if not isinstance(before, Mapping) or list(cast("Mapping[str, Any]", before)) != list(signature.parameters):
            item["parameters"] = schema_of(signature)
        item["source"] = source
        return cast("JSONValue", items)


@dataclass(frozen=True, slots=True)
class DeleteTool(_ToolEdit):
    """Take a tool away from the agent."""

    kind: ClassVar[str] = "delete_tool"

    def change(self, value: Any, spec: ParameterSpec | None) -> JSONValue:
        """The toolbox without the tool."""
        items = _items(value)
        del items[_found(items, self.tool)]
        return cast("JSONValue", items)


# --- unit examples ---------------------------------------------------------------------------------------------------


def run_examples(value: Any, tool: str, uses: Sequence[Used] = ()) -> list[str]:
    """Run the unit examples of `tool` twice in the sandbox; what went wrong, one line each, nothing when all pass.

    A tool without source is a function of the program: it may have effects, so it is not run here. Blocks while the
    code runs; async callers use `anyio.to_thread.run_sync`.

    Args:
        value: a toolbox's value, already checked.
        tool: the tool's name.
        uses: the names that the code may see (`Toolbox.visible(tool)`).
    """
    item = next((item for item in _items(value) if item.get("name") == tool), None)
    if item is None:
        return [f"there is no tool {tool!r}"]
    if not item["source"]:
        return []
    unit, problems = full_unit(item["source"], tool, tuple(uses))
    if unit is None or problems:
        return problems
    found: list[str] = []
    for place, example in enumerate(item["examples"], start=1):
        problem = _example_problem(unit, example["args"], example["expected"])
        if problem:
            found.append(f"example {place}: {problem}")
    return found


def _example_problem(unit: CodeUnit, args: Mapping[str, Any], expected: JSONValue) -> str:
    problem = arguments_problem(unit.signature, args)
    if problem:
        return problem
    call = f"{unit.name}({', '.join(f'{name}={value!r:.60}' for name, value in args.items())})"
    results: list[JSONValue] = []
    for number in range(2):
        try:
            # Each run draws its own random numbers, as two rollouts do.
            result = copy_context().run(_run_seeded, number, unit, args)
            results.append(normalize(result, "the result"))
        except CodeError as error:
            return f"{call} failed: {error}"
        except UserError as error:
            return f"{call} gave no JSON value: {error}"
    if canonical(results[0]) != canonical(results[1]):
        return f"{call} gave {results[0]!r:.120}, then {results[1]!r:.120}; it must give the same result each time"
    return "" if _same(results[0], expected) else f"{call} gave {results[0]!r:.120}, expected {expected!r:.120}"


def _run_seeded(number: int, unit: CodeUnit, args: Mapping[str, Any]) -> Any:
    rollout_scope.set(RolloutScope(number, "", f"example of {unit.name}"))
    return unit.run(unit.source, (), args)


def _same(one: Any, other: Any) -> bool:
    """Equal JSON values; numbers up to rounding."""
    numbers = [isinstance(value, (int, float)) and not isinstance(value, bool) for value in (one, other)]
    if all(numbers):
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(one, list) and isinstance(other, list):
        pairs = cast("tuple[list[Any], list[Any]]", (one, other))
        return len(pairs[0]) == len(pairs[1]) and all(map(_same, *pairs))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        left, right = cast("tuple[Mapping[str, Any], Mapping[str, Any]]", (one, other))
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    return canonical(cast("JSONValue", one)) == canonical(cast("JSONValue", other))
