"""What a parameter is (`ParameterSpec`) and the registry of every parameter that the loaded modules declare."""

from __future__ import annotations

import difflib
import math
import re
import sys
import threading
import types
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, cast

from agentopt.errors import UserError
from agentopt.graph import _templates
from agentopt.graph._jsonvalue import JSONValue, canonical, copied

if TYPE_CHECKING:
    from agentopt.graph._knowledge import KnowledgeSource

ParameterKind = Literal[
    "prompt", "demos", "number", "choice", "knowledge", "code", "tool_text", "value", "principles", "tools", "pipeline"
]

TEXT_KINDS: frozenset[str] = frozenset({"prompt", "tool_text"})
_DEMO_KEYS = ("input", "output", "source")


@dataclass(slots=True, eq=False)
class ParameterSpec:
    """One declared parameter: its identity (name), its default and what values it may take.

    `constraint` is a callable `value -> None | bool | str`: False or a text says that the value is not allowed, a
    ValueError does too. `projection` is a callable `value -> value` that is applied to every proposed value before it
    is checked. `frozen` parameters are tuned only when `--tune` names them.

    Three fields are notes taken while the program runs. `import_time_read` is `file:line` of the first read made while
    a module was being imported (such a read freezes the default), `read_normally` tells that another read was seen, and
    `formatted` that the text went through `.format`, so every later text must be a valid template.
    """

    name: str
    kind: ParameterKind
    default: JSONValue
    description: str = ""
    constraint: Callable[[Any], bool | str | None] | None = None
    constraint_text: str = ""
    variables: tuple[str, ...] = ()
    max_items: int | None = None
    low: float | None = None
    high: float | None = None
    integer: bool = False
    options: tuple[JSONValue, ...] = ()
    projection: Callable[[Any], Any] | None = None
    module: str = ""
    file: str = ""
    line: int = 0
    frozen: bool = False
    import_time_read: str | None = None
    formatted: bool = False
    read_normally: bool = False
    check_code: Callable[[str], list[str]] | None = None
    check_value: Callable[[Any], list[str]] | None = None
    """For principles, tools, pipeline and knowledge: what is wrong with a whole value."""
    knowledge: KnowledgeSource | None = None
    """For knowledge: its documents and with what they may be folded."""
    owner: str = ""
    """The structured prompt that this parameter is one component of, '' for a parameter of its own."""
    component: str = ""
    """Which component of `owner`: task, principles, demos, output_format or extra."""
    _template_fields: tuple[_templates.Field, ...] = field(default=(), init=False, repr=False)
    _is_template: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind == "prompt" and isinstance(self.default, str):
            found = _templates.fields(self.default) or []
            fillable = all(entry.base.isidentifier() or entry.base.isdigit() or not entry.base for entry in found)
            # `variables` that differ from the inferred ones are placeholders of another syntax ({{ jinja }}, <name>).
            inferred = set(_templates.variables(self.default))
            self._is_template = fillable and bool(found) and bool(inferred) and set(self.variables) == inferred
            self._template_fields = tuple(found) if fillable else ()

    @property
    def place(self) -> str:
        """`file:line` of the declaration."""
        return f"{self.file}:{self.line}"

    def project(self, value: JSONValue) -> JSONValue:
        """Return the nearest allowed value: the user's projection, then bounds, options, item count and brace escapes.

        A value that cannot be brought into the allowed set is returned as it is; `problems` then says what is wrong.
        """
        if self.projection is not None:
            value = cast("JSONValue", self.projection(value))
        match self.kind:
            case "number":
                return _project_number(self, value)
            case "choice":
                return _project_choice(self.options, value)
            case "demos" if isinstance(value, list) and self.max_items is not None:
                return value[: self.max_items]
            case "prompt" if self._is_template and isinstance(value, str):
                return _templates.escape_braces(value, self._template_fields)
            case _:
                return value

    def problems(self, value: JSONValue) -> list[str]:
        """Return what is wrong with `value` for this parameter, a clear clause each; an empty list when nothing is."""
        match self.kind:
            case "demos":
                found = _demos_problems(value, self.max_items)
            case "number":
                found = _number_problems(self, value)
            case "choice":
                found = _choice_problems(self.options, value)
            case "code":
                found = self._code_problems(value)
            case "value":
                found = []
            case "principles" | "tools" | "pipeline" | "knowledge":
                found = self.check_value(value) if self.check_value is not None else []
            case _:
                found = self._text_problems(value)
        return found or _constraint_problems(self, value)

    def _code_problems(self, value: JSONValue) -> list[str]:
        if not isinstance(value, str) or not value.strip():
            return [f"expected source code, found {_short(value)}"]
        return self.check_code(value) if self.check_code is not None else []

    def _text_problems(self, value: JSONValue) -> list[str]:
        if not isinstance(value, str):
            return [f"expected text, found {_short(value)}"]
        optional = self.component in ("output_format", "extra")
        if not value.strip() and isinstance(self.default, str) and self.default.strip() and not optional:
            return ["the text is empty"]
        if self.kind != "prompt":
            return []
        if self._is_template:
            return self._template_problems(value)
        return self._placeholder_problems(value)

    def _placeholder_problems(self, value: str) -> list[str]:
        """Check a prompt that is not a `str.format` template: plain text, or placeholders of another syntax."""
        before, after = _templates.variables(str(self.default)), _templates.variables(value)
        lost = [
            name
            for name in self.variables
            if (name not in after if name in before else not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", value))
        ]
        if lost:
            return [f"loses the variable {_names(lost)}; every variable of the original must stay"]
        braces_are_text = any(name not in self.variables for name in before)
        added = [name for name in after if name not in self.variables]
        if added and not braces_are_text:
            return [f"adds the variable {_names(added)}, which the program does not fill"]
        if self.formatted:
            problem = _templates.problem_with(value, self._template_fields)
            return [problem] if problem else []
        return []

    def _template_problems(self, value: str) -> list[str]:
        found = _templates.variables(value)
        lost = [name for name in self.variables if name not in found]
        added = [name for name in found if name not in self.variables]
        result: list[str] = []
        if lost:
            result.append(f"loses the variable {_names(lost)}; every variable of the original must stay")
        if added:
            result.append(f"adds the variable {_names(added)}, which the program does not fill")
        if not result:
            problem = _templates.problem_with(value, self._template_fields)
            if problem:
                result.append(problem)
        return result

    def same_declaration(self, other: ParameterSpec) -> bool:
        """Whether `other` declares the same thing: kind, default, variables, bounds, options, documents."""
        mine = (self.kind, self.variables, self.max_items, self.low, self.high, self.options, self.knowledge)
        others = (other.kind, other.variables, other.max_items, other.low, other.high, other.options, other.knowledge)
        return mine == others and canonical(self.default) == canonical(other.default)

    def to_dict(self) -> dict[str, JSONValue]:
        """Return what an export or a report shows of this parameter (callables and run notes left out)."""
        return {
            "name": self.name,
            "kind": self.kind,
            "default": copied(self.default),
            "description": self.description,
            "constraint": self.constraint_text,
            "variables": list(self.variables),
            "max_items": self.max_items,
            "low": self.low,
            "high": self.high,
            "options": list(self.options),
            "place": self.place,
            "frozen": self.frozen,
            **({} if self.knowledge is None else {"documents": self.knowledge.hash, "folder": self.knowledge.folder}),
        }

    def unfrozen(self) -> ParameterSpec:
        """Return a copy with `frozen=False`, for the set of parameters that `--tune` selects."""
        return replace(self, frozen=False)


def _names(names: Sequence[str]) -> str:
    return ", ".join("{" + name + "}" for name in names)


def _short(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _project_number(spec: ParameterSpec, value: JSONValue) -> JSONValue:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _finite(value):
        return value
    if spec.low is not None:
        value = max(value, spec.low)
    if spec.high is not None:
        value = min(value, spec.high)
    return round(value) if spec.integer else value


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _project_choice(options: Sequence[JSONValue], value: JSONValue) -> JSONValue:
    if any(_same_atom(option, value) for option in options) or not isinstance(value, str):
        return value
    folded = value.strip().casefold()
    matches = [option for option in options if str(option).strip().casefold() == folded]
    return matches[0] if len(matches) == 1 else value


def _same_atom(one: JSONValue, other: JSONValue) -> bool:
    return canonical(one) == canonical(other)


def _demos_problems(value: JSONValue, max_items: int | None) -> list[str]:
    if not isinstance(value, list):
        return [f"expected a list of demonstrations, found {_short(value)}"]
    items = value
    if max_items is not None and len(items) > max_items:
        return [f"has {len(items)} demonstrations, at most {max_items} are allowed"]
    return [f"demonstration {index}: {problem}" for index, item in enumerate(items) for problem in demo_problems(item)]


def demo_problems(item: object) -> list[str]:
    """Return what keeps `item` from being a demonstration `{"input": str, "output": str, "source": str}`."""
    if not isinstance(item, Mapping):
        return [f"expected a map with input and output, found {_short(item)}"]
    entries = cast("Mapping[str, object]", item)
    found = [
        f"{key!r} must be text, found {_short(entries.get(key))}"
        for key in ("input", "output")
        if not isinstance(entries.get(key), str)
    ]
    if not isinstance(entries.get("source", ""), str):
        found.append("'source' must be text (an example id, or empty)")
    unknown = [str(key) for key in entries if key not in _DEMO_KEYS]
    if unknown:
        found.append(f"unknown key {unknown[0]!r}; the keys are input, output, source")
    return found


def _number_problems(spec: ParameterSpec, value: JSONValue) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return [f"expected a number, found {_short(value)}"]
    if not _finite(value):
        return [f"expected a finite number, found {value}"]
    if spec.integer and not isinstance(value, int):
        return [f"expected a whole number, found {value}"]
    if (spec.low is not None and value < spec.low) or (spec.high is not None and value > spec.high):
        return [f"{value} is outside the bounds {spec.low} to {spec.high}"]
    return []


def _choice_problems(options: Sequence[JSONValue], value: JSONValue) -> list[str]:
    if any(_same_atom(option, value) for option in options):
        return []
    return [f"{_short(value)} is none of the options {', '.join(repr(option) for option in options)}"]


def _constraint_problems(spec: ParameterSpec, value: JSONValue) -> list[str]:
    if spec.constraint is None:
        return []
    try:
        answer = spec.constraint(copied(value))
    except ValueError as error:
        answer = str(error) or "the constraint raised ValueError"
    if isinstance(answer, str):
        return [answer] if answer else []
    if answer is False:
        return [
            spec.constraint_text or f"the constraint {getattr(spec.constraint, '__name__', '')!r} refuses the value"
        ]
    return []


# --- the registry ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Entry:
    spec: ParameterSpec
    modules: set[str]
    module_ref: weakref.ref[types.ModuleType] | None
    module_code: types.CodeType | None


class _Registry:
    def __init__(self) -> None:
        self.entries: dict[str, _Entry] = {}


_lock = threading.RLock()
_registry = _Registry()


def declare(spec: ParameterSpec, frame: FrameType) -> ParameterSpec:
    """Register `spec`, declared in `frame`, and return the spec that stands under its name.

    The same name declared again with the same content is the same parameter. With another default it is an error,
    unless the module that declared it first was since executed again (reload, notebook cell).

    Raises:
        UserError: bad name, or the name is taken by another default.
    """
    _check_name(spec.name)
    spec.module = str(frame.f_globals.get("__name__", ""))
    spec.file = frame.f_code.co_filename
    spec.line = frame.f_lineno
    module = sys.modules.get(spec.module)
    if module is not None and getattr(module, "__dict__", None) is not frame.f_globals:
        module = None
    code = _module_code(frame)
    with _lock:
        entry = _registry.entries.get(spec.name)
        if entry is not None and entry.spec.same_declaration(spec):
            entry.modules.add(spec.module)
            return entry.spec
        if entry is not None and not _executed_again(entry, spec, code):
            raise UserError(_collision(entry.spec, spec))
        _registry.entries[spec.name] = _Entry(
            spec, {spec.module}, weakref.ref(module) if module is not None else None, code
        )
        return spec


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name.strip() or any(ord(character) < 32 for character in name):
        raise UserError(f"parameter name: found {name!r}; expected a short text such as 'triage.instruction'.")


def _module_code(frame: FrameType) -> types.CodeType | None:
    """Return the module-level code that is running `frame`'s module, or None after its import."""
    namespace = frame.f_globals
    current: FrameType | None = frame
    while current is not None:
        if current.f_globals is namespace and current.f_code.co_name.startswith(("<module>", "<cell")):
            return current.f_code
        current = current.f_back
    return None


def _executed_again(entry: _Entry, spec: ParameterSpec, code: types.CodeType | None) -> bool:
    if entry.spec.module != spec.module:
        return False
    if entry.module_ref is not None:
        earlier = entry.module_ref()
        if earlier is None or sys.modules.get(spec.module) is not earlier:
            return True
    interactive = hasattr(sys, "ps1") or "ipykernel" in sys.modules
    same_source = entry.spec.file == spec.file or (spec.module == "__main__" and interactive)
    # A second execution of the module runs another code object; a copy-paste slip in one module runs the same one.
    return code is not None and entry.module_code is not code and same_source


def _collision(earlier: ParameterSpec, later: ParameterSpec) -> str:
    if earlier.kind != later.kind:
        what = f"as {earlier.kind} and as {later.kind}"
    elif canonical(earlier.default) != canonical(later.default):
        what = f"with the defaults {_short(earlier.default)} and {_short(later.default)}"
    elif earlier.knowledge != later.knowledge:
        what = "with other documents or another folder"
    else:
        what = "with different variables, bounds or options"
    return (
        f"parameter {later.name!r} is declared twice {what}, at {earlier.place} and {later.place}; "
        "a name stands for one parameter, so give one of them another name."
    )


def declared_parameters(module: str | None = None) -> dict[str, ParameterSpec]:
    """Return every declared parameter by name, in order of declaration; only those of `module` when it is given."""
    with _lock:
        return {
            name: entry.spec for name, entry in _registry.entries.items() if module is None or module in entry.modules
        }


def find_parameter(name: str) -> ParameterSpec | None:
    """Return the declared parameter of that name, or None."""
    with _lock:
        entry = _registry.entries.get(name)
    return entry.spec if entry is not None else None


@contextmanager
def parameter_scope() -> Generator[None]:
    """Forget, at the end of the block, every parameter declared inside; begin with none.

    Process-wide, for tests and for tools that load several programs one after the other.
    """
    global _registry
    with _lock:
        outer, _registry = _registry, _Registry()
    try:
        yield
    finally:
        with _lock:
            _registry = outer


def suggestion(name: str, known: Sequence[str]) -> str:
    """Return ` (did you mean 'x'?)` for a mistyped name, or an empty text."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
