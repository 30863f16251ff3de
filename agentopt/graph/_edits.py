"""Typed edits: the only way an optimizer may change a candidate.

Each edit names one parameter, can say what is wrong with it (`check`) and can make the changed candidate (`apply`).
`apply_edits` does both for a list of edits, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, cast

from agentopt.errors import UserError
from agentopt.graph._jsonvalue import JSONValue, copied, normalize
from agentopt.graph._parameters import (
    TEXT_KINDS,
    ParameterKind,
    ParameterSpec,
    demo_problems,
    find_parameter,
)
from agentopt.graph._structured import STRUCTURED, Problem, StructuredEdit, resolve_spec

if TYPE_CHECKING:
    from agentopt.graph._candidate import Candidate


class IllegalEdit(UserError):
    """An edit that may not be applied; `problems` lists every reason."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("edit refused: " + "; ".join(str(problem) for problem in self.problems))


def _current(candidate: Candidate, name: str) -> JSONValue:
    """Return the candidate's own value, else the declared default, else None."""
    if name in candidate:
        return candidate.get(name)
    spec = find_parameter(name)
    return copied(spec.default) if spec is not None else None


class _SetValue:
    """Shared by the edits that replace the whole value."""

    __slots__ = ()
    kind: ClassVar[str] = ""
    kinds: ClassVar[frozenset[str]] = frozenset()
    name: str

    def _value(self) -> JSONValue:
        raise NotImplementedError

    def check(self, candidate: Candidate, specs: Mapping[str, ParameterSpec]) -> list[Problem]:
        """Return what keeps this edit from being applied; an empty list when nothing does."""
        spec, problems = resolve_spec(self.name, self.kinds, self.kind, specs)
        if spec is None:
            return problems
        try:
            value = normalize(self._value(), "value")
        except UserError as error:
            return [Problem(self.name, str(error))]
        return [Problem(self.name, message) for message in spec.problems(value)]

    def apply(self, candidate: Candidate) -> Candidate:
        """Return the candidate with this edit's value; lineage is left to `apply_edits`."""
        return candidate.with_values({self.name: self._value()})


@dataclass(frozen=True, slots=True)
class SetText(_SetValue):
    """Replace a prompt or a tool's description."""

    kind: ClassVar[str] = "set_text"
    kinds: ClassVar[frozenset[str]] = TEXT_KINDS
    name: str
    text: str

    def _value(self) -> JSONValue:
        return self.text

    def to_dict(self) -> dict[str, JSONValue]:
        """Return the JSON form."""
        return {"kind": self.kind, "name": self.name, "text": self.text}


@dataclass(frozen=True, slots=True)
class SetDemos(_SetValue):
    """Replace all demonstrations; `items` are `{"input", "output", "source"}` maps."""

    kind: ClassVar[str] = "set_demos"
    kinds: ClassVar[frozenset[str]] = frozenset({"demos"})
    name: str
    items: Sequence[Mapping[str, str]]

    def _value(self) -> JSONValue:
        return [_complete(item) for item in self.items]

    def to_dict(self) -> dict[str, JSONValue]:
        """Return the JSON form."""
        return {"kind": self.kind, "name": self.name, "items": [dict(item) for item in self.items]}


@dataclass(frozen=True, slots=True)
class SetNumber(_SetValue):
    """Replace a number."""

    kind: ClassVar[str] = "set_number"
    kinds: ClassVar[frozenset[str]] = frozenset({"number"})
    name: str
    value: float

    def _value(self) -> JSONValue:
        return self.value

    def to_dict(self) -> dict[str, JSONValue]:
        """Return the JSON form."""
        return {"kind": self.kind, "name": self.name, "value": self.value}


@dataclass(frozen=True, slots=True)
class SetChoice(_SetValue):
    """Pick another of a choice's options."""

    kind: ClassVar[str] = "set_choice"
    kinds: ClassVar[frozenset[str]] = frozenset({"choice"})
    name: str
    value: JSONValue

    def _value(self) -> JSONValue:
        return self.value

    def to_dict(self) -> dict[str, JSONValue]:
        """Return the JSON form."""
        return {"kind": self.kind, "name": self.name, "value": copied(self.value)}


@dataclass(frozen=True, slots=True)
class SetCode(_SetValue):
    """Replace the body of a function; `source` is the whole `def`, decorators left out."""

    kind: ClassVar[str] = "set_code"
    kinds: ClassVar[frozenset[str]] = frozenset({"code"})
    name: str
    source: str

    def _value(self) -> JSONValue:
        return self.source

    def to_dict(self) -> dict[str, JSONValue]:
        """Return the JSON form."""
        return {"kind": self.kind, "name": self.name, "source": self.source}


@dataclass(frozen=True, slots=True)
class SetValue(_SetValue):
    """Replace a JSON value as a whole: a "value", or one of a kind with parts (knowledge, principles, tools, ...)."""

    kind: ClassVar[str] = "set_value"
    kinds: ClassVar[frozenset[str]] = frozenset({"value", "knowledge", "principles", "tools", "pipeline"})
    name: str
    value: JSONValue

    def _value(self) -> JSONValue:
        return self.value

    def to_dict(self) -> dict[str, JSONValue]:
        """Return the JSON form."""
        return {"kind": self.kind, "name": self.name, "value": copied(self.value)}


def _complete(item: object) -> JSONValue:
    """Return a demonstration with its `source` filled in; anything else as it is, for `check` to refuse."""
    if isinstance(item, Mapping):
        return {"source": "", **cast("Mapping[str, JSONValue]", item)}
    return cast("JSONValue", item)


def _items(value: JSONValue) -> list[JSONValue]:
    return list(value) if isinstance(value, list) else []


@dataclass(frozen=True, slots=True)
class AddDemo:
    """Append one demonstration."""

    kind: ClassVar[str] = "add_demo"
    name: str
    item: Mapping[str, str]

    def check(self, candidate: Candidate, specs: Mapping[str, ParameterSpec]) -> list[Problem]:
        """Return what keeps this edit from being applied; an empty list when nothing does."""
        spec, problems = resolve_spec(self.name, frozenset({"demos"}), self.kind, specs)
        if spec is None:
            return problems
        found = demo_problems(self.item)
        if not found:
            found = spec.problems([*_items(candidate.get(self.name, spec.default)), _complete(self.item)])
        return [Problem(self.name, message) for message in found]

    def apply(self, candidate: Candidate) -> Candidate:
        """Return the candidate with the demonstration appended."""
        return candidate.with_values({self.name: [*_items(_current(candidate, self.name)), _complete(self.item)]})

    def to_dict(self) -> dict[str, JSONValue]:
        """Return the JSON form."""
        return {"kind": self.kind, "name": self.name, "item": dict(self.item)}


@dataclass(frozen=True, slots=True)
class DropDemo:
    """Remove the demonstration at `index` (0-based)."""

    kind: ClassVar[str] = "drop_demo"
    name: str
    index: int

    def check(self, candidate: Candidate, specs: Mapping[str, ParameterSpec]) -> list[Problem]:
        """Return what keeps this edit from being applied; an empty list when nothing does."""
        spec, problems = resolve_spec(self.name, frozenset({"demos"}), self.kind, specs)
        if spec is None:
            return problems
        items = _items(candidate.get(self.name, spec.default))
        if not isinstance(cast("object", self.index), int) or not 0 <= self.index < len(items):
            return [Problem(self.name, f"no demonstration at index {self.index}; there are {len(items)}")]
        del items[self.index]
        return [Problem(self.name, message) for message in spec.problems(items)]

    def apply(self, candidate: Candidate) -> Candidate:
        """Return the candidate without that demonstration."""
        items = _items(_current(candidate, self.name))
        del items[self.index]
        return candidate.with_values({self.name: items})

    def to_dict(self) -> dict[str, JSONValue]:
        """Return the JSON form."""
        return {"kind": self.kind, "name": self.name, "index": self.index}


Edit: TypeAlias = SetText | SetDemos | AddDemo | DropDemo | SetNumber | SetChoice | SetCode | SetValue | StructuredEdit

_FIELDS: Mapping[str, tuple[Callable[[str, Any], Edit], str]] = {
    SetText.kind: (SetText, "text"),
    SetDemos.kind: (SetDemos, "items"),
    AddDemo.kind: (AddDemo, "item"),
    DropDemo.kind: (DropDemo, "index"),
    SetNumber.kind: (SetNumber, "value"),
    SetChoice.kind: (SetChoice, "value"),
    SetCode.kind: (SetCode, "source"),
    SetValue.kind: (SetValue, "value"),
}
_SETTERS: Mapping[ParameterKind, Callable[[str, Any], Edit]] = {
    "prompt": SetText,
    "tool_text": SetText,
    "demos": SetDemos,
    "number": SetNumber,
    "choice": SetChoice,
    "code": SetCode,
    "value": SetValue,
    "knowledge": SetValue,
    "principles": SetValue,
    "tools": SetValue,
    "pipeline": SetValue,
}


def edit_from_dict(data: Mapping[str, object]) -> Edit:
    """Return the edit whose `to_dict` made `data`.

    Raises:
        UserError: unknown kind, or a field is missing or of the wrong type.
    """
    kind = data.get("kind")
    if isinstance(kind, str) and kind in STRUCTURED:
        return STRUCTURED[kind].from_dict(data)
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise UserError(f"edit kind: found {kind!r}; expected one of {', '.join((*_FIELDS, *STRUCTURED))}.")
    cls, content = _FIELDS[kind]
    name = data.get("name")
    if not isinstance(name, str):
        raise UserError(f"edit {kind}: 'name' must be text, found {type(name).__name__}.")
    if content not in data:
        raise UserError(f"edit {kind} of {name!r}: the field {content!r} is missing.")
    value = normalize(data[content], f"edit {kind} of {name!r}")
    expected = {"text": str, "source": str, "items": list, "item": dict, "index": int}.get(content)
    wrong_number = kind == SetNumber.kind and (isinstance(value, bool) or not isinstance(value, (int, float)))
    if wrong_number or (expected is not None and (not isinstance(value, expected) or isinstance(value, bool))):
        raise UserError(f"edit {kind} of {name!r}: {content!r} has the wrong type ({type(value).__name__}).")
    return cls(name, value)


def set_value(spec: ParameterSpec, value: JSONValue) -> Edit:
    """Return the edit that gives the parameter `spec` the value `value`, whatever its kind."""
    return _SETTERS[spec.kind](spec.name, value)


def _projected(edit: Edit, spec: ParameterSpec) -> Edit:
    """Return the edit with the user's projection applied to its value."""
    if spec.projection is None:
        return edit
    match edit:
        case AddDemo() | DropDemo() | StructuredEdit():
            return edit
        case SetText():
            value: JSONValue = edit.text
        case SetCode():
            value = edit.source
        case SetDemos():
            value = [dict(item) for item in edit.items]
        case _:
            value = edit.value
    return set_value(spec, cast("JSONValue", spec.projection(copied(value))))


def apply_edits(candidate: Candidate, edits: Sequence[Edit], specs: Mapping[str, ParameterSpec]) -> Candidate:
    """Check every edit, apply them in order, and return the child candidate.

    An edit is checked against the candidate that the edits before it made. A parameter's own projection is applied to
    the proposed value first; bounds, options and variables are never bent, only checked (`ParameterSpec.project` gives
    the nearest allowed value to whoever wants it). The result has `parents=(candidate.hash,)` and the edits as applied.

    Raises:
        IllegalEdit: at least one edit is not allowed; nothing was applied.
    """
    problems: list[Problem] = []
    applied: list[Edit] = []
    current = candidate
    for proposed in edits:
        spec = specs.get(proposed.name)
        edit = proposed
        if spec is not None:
            try:
                edit = _projected(proposed, spec)
            except ValueError as error:
                problems.append(Problem(proposed.name, f"the projection refuses the value: {error}"))
                continue
            if proposed.name not in current:
                current = current.with_values({proposed.name: spec.default})
        found = edit.check(current, specs)
        problems.extend(found)
        if not found:
            current = edit.apply(current)
            applied.append(edit)
    if problems:
        raise IllegalEdit(problems)
    return current.with_values({}, parents=(candidate.hash,), edits=tuple(applied))
