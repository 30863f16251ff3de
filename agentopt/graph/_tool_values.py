"""What a tool of a toolbox is made of: its source read as a signature and a schema, and what may be wrong with it.

Everything here is static: nothing of a tool runs. A source is a whole `def` with a docstring, named arguments with
literal defaults and no `*args`.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import keyword
import re
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from agentopt.errors import UserError
from agentopt.graph._calls import StepInfo, step_info
from agentopt.graph._code import CodeUnit, Used
from agentopt.graph._jsonvalue import JSONValue, normalize

KEYS = ("name", "description", "parameters", "source", "examples")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "None": "null",
    **dict.fromkeys(("list", "List", "tuple", "Tuple", "set", "Sequence", "Iterable"), "array"),
    **dict.fromkeys(("dict", "Dict", "Mapping"), "object"),
}


# --- signature and schema --------------------------------------------------------------------------------------------


def clean_source(source: str) -> str:
    """The source without common indentation and blank lines around it."""
    return textwrap.dedent(source).strip()


def read_source(source: str, name: str) -> tuple[CodeUnit | None, list[str]]:
    """What `source` says of the function `name`, and what keeps it from being a tool; None when it defines no such one.

    The unit sees no other names (`uses`); `ToolSet.unit` adds those.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        shown = f": `{error.text.strip()}`" if error.text else ""
        return None, [f"line {error.lineno}: {error.msg}{shown}"]
    except (ValueError, RecursionError, MemoryError) as error:
        return None, [f"is not readable as Python: {error}"]
    defined = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    target = next((node for node in reversed(defined) if node.name == name), None)
    if target is None:
        found = ", ".join(node.name for node in defined) or "no function"
        return None, [f"must define the function {name!r}; it defines {found}"]
    arguments = target.args
    if arguments.vararg or arguments.kwarg or arguments.posonlyargs:
        return None, [f"{name} must name its arguments: no *args, no **kwargs, no positional-only arguments"]
    try:
        parameters, problems = _parameters(arguments)
    except RecursionError:
        return None, [f"an annotation or a default of {name} is nested too deeply"]
    if not (ast.get_docstring(target) or "").strip():
        problems.append(f"{name} has no docstring; say there what it does")
    unit = CodeUnit(
        name=name,
        source=source,
        signature=inspect.Signature(parameters),
        uses=(),
        is_async=isinstance(target, ast.AsyncFunctionDef),
        file=f"<{name}>",
        line=target.lineno,
    )
    return unit, problems


def _parameters(arguments: ast.arguments) -> tuple[list[inspect.Parameter], list[str]]:
    plain, named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    missing = len(arguments.args) - len(arguments.defaults)
    entries: list[tuple[ast.arg, ast.expr | None, Any]] = [
        (argument, arguments.defaults[place - missing] if place >= missing else None, plain)
        for place, argument in enumerate(arguments.args)
    ]
    entries += [
        (argument, default, named)
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    problems: list[str] = []
    made: list[inspect.Parameter] = []
    for argument, default, kind in entries:
        value: Any = inspect.Parameter.empty
        if default is not None:
            try:
                value = normalize(ast.literal_eval(default), "default")
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, UserError):
                problems.append(f"the default of {argument.arg!r} must be a plain JSON value such as 3, 'text' or None")
                value = None
        annotation = inspect.Parameter.empty if argument.annotation is None else ast.unparse(argument.annotation)
        made.append(inspect.Parameter(argument.arg, kind, default=value, annotation=annotation))
    return made, problems


def schema_of(signature: inspect.Signature) -> dict[str, JSONValue]:
    """The JSON schema of a call's arguments; annotations may be texts or types, unknown ones allow anything."""
    properties: dict[str, JSONValue] = {}
    required: list[JSONValue] = []
    for name, parameter in signature.parameters.items():
        schema = {} if parameter.annotation is parameter.empty else _annotated(parameter.annotation)
        if parameter.default is parameter.empty:
            required.append(name)
        elif parameter.default is not None:
            with contextlib.suppress(UserError):  # a default without JSON form is the function's own business
                schema["default"] = normalize(parameter.default, name)
        properties[name] = schema
    return {"type": "object", "properties": properties, "required": required}


def _annotated(annotation: object) -> dict[str, JSONValue]:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    try:
        return _json_type(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}


def _json_type(node: ast.expr) -> dict[str, JSONValue]:
    match node:
        case ast.Constant(value=str() as text):
            return _annotated(text)
        case ast.Constant(value=None):
            return {"type": "null"}
        case ast.Name() | ast.Attribute():
            known = _TYPES.get(_last(node))
            return {"type": known} if known else {}
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _any_of([_json_type(left), _json_type(right)])
        case ast.Subscript(value=base, slice=inner):
            return _generic(_last(base), inner.elts if isinstance(inner, ast.Tuple) else [inner])
        case _:
            return {}


def _generic(base: str, inner: Sequence[ast.expr]) -> dict[str, JSONValue]:
    if base in ("Optional", "Union"):
        return _any_of([_json_type(node) for node in inner])
    if base == "Annotated":
        schema = _json_type(inner[0])
        notes = [node.value for node in inner[1:] if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        return {**schema, "description": notes[0]} if notes else schema
    if base == "Literal":
        values = [node.value for node in inner if isinstance(node, ast.Constant)]
        options = [value for value in values if isinstance(value, (str, int, float, bool)) or value is None]
        return {"enum": options} if options and len(options) == len(inner) else {}
    match _TYPES.get(base):
        case "array":
            items = _json_type(inner[0]) if inner else {}
            return {"type": "array", "items": items} if items else {"type": "array"}
        case "object":
            values = _json_type(inner[1]) if len(inner) > 1 else {}
            return {"type": "object", "additionalProperties": values} if values else {"type": "object"}
        case _:
            return {}


def _any_of(options: Sequence[dict[str, JSONValue]]) -> dict[str, JSONValue]:
    """One of several; `X | None` is X, since leaving an argument out says None."""
    flat: list[dict[str, JSONValue]] = []
    for option in options:
        flat.extend(cast("list[dict[str, JSONValue]]", option["anyOf"]) if set(option) == {"anyOf"} else [option])
    left = [option for option in flat if option != {"type": "null"}]
    if not left or {} in left:
        return {}
    return left[0] if len(left) == 1 else {"anyOf": left}


def _last(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


# --- the program's own tools -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OwnTool:
    """A function of the program: it runs in this process, as it is."""

    name: str
    fn: Callable[..., Any]
    signature: inspect.Signature
    description: str
    info: StepInfo | None

    def entry(self) -> dict[str, JSONValue]:
        """Its place in a toolbox's value."""
        return {
            "name": self.name,
            "description": self.description,
            "parameters": schema_of(self.signature),
            "source": "",
            "examples": [],
        }

    @property
    def origin(self) -> tuple[str, str]:
        """Which function it is, the same after a reload."""
        return str(getattr(self.fn, "__module__", "")), str(getattr(self.fn, "__qualname__", ""))


def own_tool(fn: object, where: str) -> OwnTool:
    """The function `fn` as a tool.

    Raises:
        UserError: it is no function, takes arguments that cannot be named, or has no docstring.
    """
    name = str(getattr(fn, "__name__", ""))
    if not callable(fn) or not name:
        raise UserError(f"{where}: expected functions, found {fn!r:.60}; give each tool as a def (or @ao.tool).")
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise UserError(f"{where}: {name!r} is no name for a tool; give the function a name of letters and digits.")
    if inspect.isgeneratorfunction(inspect.unwrap(fn)) or inspect.isasyncgenfunction(inspect.unwrap(fn)):
        raise UserError(f"{where}: {name} is a generator; a tool gives one result.")
    signature = _live_signature(fn)
    odd = [p.name for p in signature.parameters.values() if p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if odd:
        raise UserError(f"{where}: {name} takes {odd[0]!r} without a name of its own; a model names every argument.")
    description = inspect.getdoc(fn) or ""
    if not description.strip():
        raise UserError(f"{where}: {name} has no docstring; a model chooses tools by what their docstring says.")
    info = step_info(fn)
    return OwnTool(name, fn, signature, description, info if info is not None and info.kind == "tool" else None)


def _live_signature(fn: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(fn)
    try:
        hints = typing.get_type_hints(inspect.unwrap(fn), include_extras=True)
    except (NameError, TypeError, AttributeError, SyntaxError):
        return signature  # names that do not exist at run time: the annotations' texts say enough
    return signature.replace(
        parameters=[p.replace(annotation=hints.get(name, p.annotation)) for name, p in signature.parameters.items()]
    )


# --- what a value may be ---------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class ToolSet:
    """What stands behind a toolbox's value: the program's own tools, the names that sources may see, the limit."""

    own: Mapping[str, OwnTool]
    uses: tuple[Used, ...]
    max_tools: int
    _units: dict[tuple[str, str], tuple[CodeUnit | None, list[str]]] = field(
        default_factory=dict[tuple[str, str], tuple[CodeUnit | None, list[str]]], init=False, repr=False
    )

    def unit(self, tool: str, source: str) -> tuple[CodeUnit | None, list[str]]:
        """How the source of `tool` is run, and what is wrong with it."""
        key = (tool, source)
        found = self._units.get(key)
        if found is None:
            if len(self._units) >= 256:
                self._units.clear()
            found = self._units[key] = full_unit(source, tool, self.visible(tool))
        return found

    def visible(self, tool: str) -> tuple[Used, ...]:
        """The names that a source of `tool` may see: the toolbox's and those of its own `@tool(uses=...)`."""
        own = self.own.get(tool)
        unit = own.info.unit if own is not None and own.info is not None else None
        names = {use.name for use in self.uses}
        return (*self.uses, *(use for use in (unit.uses if unit is not None else ()) if use.name not in names))

    def problems(self, value: Any) -> list[str]:
        """What keeps `value` from being this toolbox's value, one clause each."""
        if not isinstance(value, list):
            return [f"expected a list of tools, found {type(value).__name__}"]
        items = cast("list[Any]", value)
        if len(items) > self.max_tools:
            return [f"has {len(items)} tools, at most {self.max_tools} are allowed; delete some first"]
        found: list[str] = []
        names: set[str] = set()
        for place, item in enumerate(items):
            problem = _shape_problem(item)
            if problem:
                found.append(f"tool {place}: {problem}")
                continue
            name = str(item["name"])
            if name in names:
                found.append(f"two tools have the name {name!r}")
            names.add(name)
            found.extend(f"tool {name!r}: {clause}" for clause in self._tool_problems(item))
        return found

    def _tool_problems(self, item: Mapping[str, Any]) -> list[str]:
        name, source = str(item["name"]), str(item["source"])
        if source:
            unit, found = self.unit(name, source)
            if unit is None or found:
                return found
            signature = unit.signature
        elif name in self.own:
            signature = self.own[name].signature
        else:
            known = ", ".join(self.own) or "none"
            return [f"has no source and is no function of the program (those are {known})"]
        return [*schema_problems(item["parameters"], signature), *_examples_problems(item["examples"], signature)]


def full_unit(source: str, tool: str, uses: tuple[Used, ...]) -> tuple[CodeUnit | None, list[str]]:
    """`read_source` with the names that the code may see, imports and unknown names checked too."""
    unit, problems = read_source(source, tool)
    if unit is None:
        return None, problems
    unit = CodeUnit(unit.name, unit.source, unit.signature, uses, unit.is_async, unit.file, unit.line)
    return unit, [*problems, *unit.problems(source)]


def _shape_problem(item: Any) -> str:
    if not isinstance(item, Mapping):
        return f"expected a map with {', '.join(KEYS)}, found {type(item).__name__}"
    entry = cast("Mapping[str, Any]", item)
    odd = [*(key for key in KEYS if key not in entry), *(key for key in entry if key not in KEYS)]
    if odd:
        return f"the keys must be {', '.join(KEYS)}; {odd[0]!r} is missing or unknown"
    name = entry["name"]
    if not isinstance(name, str) or not _NAME.fullmatch(name) or keyword.iskeyword(name):
        return f"'name' must be a name of letters, digits and _, found {name!r:.60}"
    if not isinstance(entry["description"], str) or not entry["description"].strip():
        return f"{name}: 'description' must say what the tool does, found nothing"
    if not isinstance(entry["source"], str):
        return f"{name}: 'source' must be text, found {type(entry['source']).__name__}"
    return "" if isinstance(entry["examples"], list) else f"{name}: 'examples' must be a list"


def _map(value: Any) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def schema_problems(schema: Any, signature: inspect.Signature) -> list[str]:
    """Why `schema` does not describe calls of a function with this signature."""
    data = _map(schema)
    raw, needed = data.get("properties", {}), data.get("required", [])
    if data.get("type") != "object" or not isinstance(raw, Mapping) or not isinstance(needed, list):
        return ['\'parameters\' must be {"type": "object", "properties": {...}, "required": [...]}']
    properties = cast("Mapping[str, Any]", raw)
    found: list[str] = []
    shape = f"({', '.join(signature.parameters)})"
    for name, content in properties.items():
        if name not in signature.parameters:
            found.append(f"'parameters' has {name!r}, which is no argument of {shape}")
        elif not isinstance(content, Mapping):
            found.append(f"'parameters': the schema of {name!r} must be a map, found {type(content).__name__}")
    for name, parameter in signature.parameters.items():
        if parameter.default is parameter.empty and (name not in properties or name not in needed):
            found.append(f"'parameters' must have and require the argument {name!r}, which has no default")
    unknown = [name for name in cast("list[Any]", needed) if name not in properties]
    if unknown:
        found.append(f"'parameters' requires {unknown[0]!r}, which is none of its properties")
    return found


def _examples_problems(examples: Sequence[Any], signature: inspect.Signature) -> list[str]:
    found: list[str] = []
    for place, example in enumerate(examples, start=1):
        entry = _map(example)
        args = entry.get("args")
        if set(entry) != {"args", "expected"} or not isinstance(args, Mapping):
            found.append(f'example {place} must be {{"args": {{...}}, "expected": ...}}')
            continue
        problem = arguments_problem(signature, cast("Mapping[str, Any]", args))
        if problem:
            found.append(f"example {place}: {problem}")
    return found


def arguments_problem(signature: inspect.Signature, args: Mapping[str, Any]) -> str:
    """Why these arguments do not fit, '' when they do."""
    try:
        signature.bind(**args)
    except TypeError as error:
        return f"{error}; the arguments are ({', '.join(signature.parameters)})"
    return ""
