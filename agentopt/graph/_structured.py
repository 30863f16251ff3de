"""Edits of one part of a structured value: a principle of a list, a tool of a toolbox, a node of a pipeline.

A subclass is a frozen dataclass whose first field is `name` (the parameter). It says which parameter kinds it fits and
how the value changes; checking, applying, JSON and registration are here. Field types are JSON types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, cast

from agentopt.errors import UserError
from agentopt.graph._jsonvalue import JSONValue, copied, normalize
from agentopt.graph._parameters import ParameterSpec, find_parameter, suggestion

if TYPE_CHECKING:
    from typing import Self

    from agentopt.graph._candidate import Candidate


@dataclass(frozen=True, slots=True)
class Problem:
    """Why an edit is not allowed: the parameter's name and one clear clause."""

    name: str
    message: str

    def __str__(self) -> str:
        return f"{self.name}: {self.message}"


def resolve_spec(
    name: str, kinds: frozenset[str], edit_kind: str, specs: Mapping[str, ParameterSpec]
) -> tuple[ParameterSpec | None, list[Problem]]:
    """The parameter that an edit names, or why the edit cannot be meant for it."""
    spec = specs.get(name)
    if spec is None:
        known = ", ".join(specs) or "none"
        message = f"not a tunable parameter{suggestion(name, list(specs))}; tunable are: {known}"
        return None, [Problem(name, message)]
    if spec.kind not in kinds:
        return None, [Problem(name, f"{edit_kind} does not fit a parameter of kind {spec.kind!r}")]
    return spec, []


class EditError(ValueError):
    """Raised by `change`: the edit does not fit the value it is applied to. The text is one clause for the proposer."""


STRUCTURED: dict[str, type[StructuredEdit]] = {}
"""Edit kind → class, filled as the classes are made."""


@dataclass(frozen=True, slots=True)
class StructuredEdit:
    """Base of edits that change one part of a JSON value; unknown parts raise `EditError`."""

    kind: ClassVar[str] = ""
    kinds: ClassVar[frozenset[str]] = frozenset()
    name: str

    def __init_subclass__(cls) -> None:
        # slots=True makes every dataclass twice; the second one, which is the one in use, overwrites the first.
        if cls.kind:
            STRUCTURED[cls.kind] = cls

    def change(self, value: Any, spec: ParameterSpec | None) -> JSONValue:
        """The new value, made from a private copy of the old one; the copy may be changed in place.

        Raises:
            EditError: the edit names a part that is not there (or is there already), or is incomplete.
        """
        raise NotImplementedError

    def check(self, candidate: Candidate, specs: Mapping[str, ParameterSpec]) -> list[Problem]:
        """What keeps this edit from being applied; an empty list when nothing does."""
        spec, problems = resolve_spec(self.name, self.kinds, self.kind, specs)
        if spec is None:
            return problems
        try:
            value = normalize(self.change(candidate.get(self.name, copied(spec.default)), spec), "value")
        except (EditError, UserError) as error:
            return [Problem(self.name, str(error))]
        return [Problem(self.name, message) for message in spec.problems(value)]

    def apply(self, candidate: Candidate) -> Candidate:
        """The candidate with the changed value; lineage is left to `apply_edits`."""
        spec = find_parameter(self.name)
        value = candidate.get(self.name) if self.name in candidate else copied(spec.default if spec else None)
        return candidate.with_values({self.name: self.change(value, spec)})

    def to_dict(self) -> dict[str, JSONValue]:
        """The JSON form; what is None by default and not given is left out, since TOML has no null."""
        data: dict[str, JSONValue] = {"kind": self.kind}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                data[field.name] = normalize(value, f"edit {self.kind}")
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            UserError: a field is missing, unknown or of the wrong type.
        """
        label = f"edit {cls.kind} of {data.get('name')!r}"
        known = {field.name: field for field in fields(cls)}
        unknown = [key for key in data if key != "kind" and key not in known]
        if unknown:
            raise UserError(f"{label}: unknown field {unknown[0]!r}; the fields are {', '.join(known)}.")
        values: dict[str, Any] = {}
        for name, field in known.items():
            if name not in data:
                if field.default is MISSING and field.default_factory is MISSING:
                    raise UserError(f"{label}: the field {name!r} is missing.")
                continue
            values[name] = _typed(
                normalize(cast("JSONValue", data[name]), label), str(field.type), f"{label}: {name!r}"
            )
        return cls(**values)


def _typed(value: JSONValue, annotation: str, label: str) -> Any:
    """`value` checked against a field's annotation (a text such as `str`, `int | None`, `tuple[str, ...]`)."""
    options = [part.strip() for part in annotation.split("|")]
    if value is None and "None" in options:
        return None
    for option in options:
        if _fits(value, option):
            return tuple(value) if option.startswith("tuple") and isinstance(value, list) else value
    raise UserError(f"{label}: expected {annotation}, found {'null' if value is None else type(value).__name__}.")


def _fits(value: JSONValue, option: str) -> bool:
    match option.partition("[")[0].rpartition(".")[2]:
        case "JSONValue" | "Any":
            return True
        case "tuple":
            return isinstance(value, list) and (
                not option.startswith("tuple[str") or all(isinstance(item, str) for item in value)
            )
        case "Mapping" | "dict":
            return isinstance(value, dict)
        case "bool":
            return isinstance(value, bool)
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "float":
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case "str":
            return isinstance(value, str)
        case _:
            return False
