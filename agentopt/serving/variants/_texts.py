"""A candidate's text as it is served: plain, a template with variables, or the parts of a structured prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from agentopt import graph
from agentopt.graph import COMPONENTS, Components, Demos, ParameterSpec, Principles, Prompt
from agentopt.graph._templates import fields, variables
from agentopt.serving._types import Refusal

Atom = str | int | float | bool


@dataclass(frozen=True, slots=True)
class ServedText:
    """One text. Without variables it is `text`; with them `filled` makes it, as `str.format` does in the program."""

    text: str
    variables: tuple[str, ...] = ()
    parts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Of a structured prompt: component → value. `text` is then what they look like unfilled."""

    def filled(self, values: Mapping[str, Atom]) -> str:
        """The text with its variables filled.

        Raises:
            Refusal: 400, a value has not the form that the template wants.
        """
        if not self.variables:
            return self.text
        try:
            if not self.parts:
                return self.text.format(**values)
            ready = {name: _part_filled(value, values) for name, value in self.parts.items()}
            return _joined(ready)
        except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
            raise Refusal(
                400,
                f"agentopt.variables: the prompt of this model cannot be filled with them ({error}).",
                param="agentopt.variables",
            ) from error


def plain_text(text: str) -> ServedText:
    """A text that is taken as it is, braces included."""
    return ServedText(text)


def template_text(text: str) -> ServedText:
    """A text whose `{variables}` are filled; one that has none, or that `str.format` cannot read, is plain."""
    return ServedText(text, variables_of(text))


def structured_text(parts: Mapping[str, Any]) -> ServedText:
    """The parts of `agentopt.components(...)` put together as it does, without the demonstrations."""
    kept = {name: parts[name] for name in COMPONENTS if name in parts and name != "demos"}
    names: list[str] = []
    for value in kept.values():
        names += variables_of(value) if isinstance(value, str) else ()
    return ServedText(_joined(kept), tuple(dict.fromkeys(names)), kept)


def variables_of(text: str) -> tuple[str, ...]:
    """The variables that `str.format` would ask for; none when it cannot read the text."""
    found = fields(text)
    if found is None or any(not entry.base.isidentifier() for entry in found):
        return ()  # bare braces, or {} and {0}: such a text was never filled by name
    return variables(text)


def _part_filled(value: Any, values: Mapping[str, Atom]) -> Any:
    return value.format(**values) if isinstance(value, str) and variables_of(value) else value


def _joined(parts: Mapping[str, Any]) -> str:
    """As `Components` shows them; the handles are made here and declared nowhere."""

    def spec(name: str, kind: Any, default: Any) -> ParameterSpec:
        return ParameterSpec(name, kind, default)

    texts = {name: Prompt(spec(name, "prompt", parts.get(name, ""))) for name in ("task", "output_format", "extra")}
    principles = Principles(spec("principles", "principles", parts.get("principles", [])))
    demos = Demos(spec("demos", "demos", []))
    shape = Components("served", texts["task"], principles, demos, texts["output_format"], texts["extra"])
    return shape.for_model(_default)


def _default(spec: ParameterSpec) -> graph.JSONValue:
    return spec.default


def values_for(
    text: ServedText, given: Mapping[str, Atom], user_text: str | None, known: Sequence[str]
) -> dict[str, Atom]:
    """The values of the text's variables: those the client gives, else the last user message for the only one.

    Raises:
        Refusal: 400, a variable has no value, or a value belongs to no variable of `known`.
    """
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise _variables_wrong(f"{', '.join(unknown)} is no variable of this model's prompt", known)
    missing = [name for name in text.variables if name not in given]
    if missing and len(known) == 1 and user_text is not None:
        return {missing[0]: user_text}
    if missing:
        raise _variables_wrong(f"{', '.join(missing)} has no value", known)
    return {name: given[name] for name in text.variables}


def _variables_wrong(what: str, known: Sequence[str]) -> Refusal:
    wanted = "{" + ", ".join(f'"{name}": ...' for name in known) + "}" if known else "none"
    return Refusal(
        400,
        f'agentopt.variables: {what}; expected {wanted} in the field "agentopt": {{"variables": ...}}.',
        param="agentopt.variables",
    )


def given_variables(body: Mapping[str, Any]) -> Mapping[str, Atom]:
    """What the client gives in the body's field "agentopt".

    Raises:
        Refusal: 400, it has another form.
    """
    field_ = body.get("agentopt")
    if field_ is None:
        return {}
    if isinstance(field_, Mapping) and set(cast("Mapping[str, Any]", field_)) <= {"variables"}:
        values: Any = cast("Mapping[str, Any]", field_).get("variables", {})
        if isinstance(values, Mapping) and all(
            isinstance(value, (str, int, float, bool)) for value in cast("Mapping[str, Any]", values).values()
        ):
            return cast("Mapping[str, Atom]", values)
    raise Refusal(
        400,
        'agentopt: expected {"variables": {name: text, number or boolean}}, the values of the prompt\'s variables.',
        param="agentopt",
    )
