"""Structured replies: schemas from `output=`, tolerant reading of JSON and choices, the text of a repair turn."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from agentopt.errors import UserError


@dataclass(frozen=True, slots=True)
class Output:
    """A JSON schema and how to turn JSON text into the value the caller wants.

    `parse` raises ValueError with a message that a model can act on.
    """

    schema: dict[str, Any]
    parse: Callable[[str], Any]


def output_of(output: Any) -> Output:
    """Read `output=`: a pydantic model class, any type pydantic can validate, or a JSON schema as a dict.

    Raises:
        UserError: it is none of these.
    """
    if isinstance(output, dict):
        schema = cast("dict[str, Any]", output)
        return Output(schema, lambda text: _checked_json(text, schema))
    try:
        return _typed(output)
    except TypeError as error:
        raise UserError(f"output=: expected a type or a JSON schema, found {output!r:.80} ({error})") from error


@lru_cache(maxsize=256)
def _typed(kind: Any) -> Output:
    from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

    try:
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
        schema = adapter.json_schema()
    except (PydanticSchemaGenerationError, PydanticUserError) as error:
        raise UserError(f"output=: pydantic cannot make a JSON schema of {kind!r:.80}: {error}") from error

    def parse(text: str) -> Any:
        try:
            return adapter.validate_json(_json_part(text))
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, item['loc'])) or 'reply'}: {item['msg']}" for item in error.errors()]
            raise ValueError("; ".join(problems[:8])) from error

    return Output(schema, parse)


def _checked_json(text: str, schema: dict[str, Any]) -> Any:
    try:
        value = json.loads(_json_part(text))
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    problem = _problem(value, schema)
    if problem is not None:
        raise ValueError(problem)
    return value


def _problem(value: Any, schema: dict[str, Any]) -> str | None:
    """What `jsonschema` objects to; without it (an extra) type and required keys at the top are checked."""
    try:
        import jsonschema  # pyright: ignore[reportMissingModuleSource]
    except ImportError:
        return _shallow_problem(value, schema)
    module = cast("Any", jsonschema)
    try:
        module.validate(value, schema)
    except module.ValidationError as error:
        return f"{error.json_path}: {error.message}"
    except module.SchemaError as error:
        raise UserError(f"output=: not a JSON schema: {error.message}") from error
    return None


_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}


def _shallow_problem(value: Any, schema: dict[str, Any]) -> str | None:
    kind = schema.get("type")
    if isinstance(kind, str) and not isinstance(value, _TYPES.get(kind, (object,))):
        return f"expected {kind}, found {type(value).__name__}"
    if isinstance(value, dict):
        missing = [key for key in schema.get("required", []) if key not in value]
        if missing:
            return f"missing keys: {', '.join(missing)}"
    return None


_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


def _json_part(text: str) -> str:
    """The JSON in a reply: the whole text, a fenced block, or from the first bracket to the last."""
    text = text.strip()
    if text[:1] in "{[":
        return text
    fenced = _FENCE.search(text)
    if fenced:
        return fenced.group(1).strip()
    start = min((at for at in (text.find("{"), text.find("[")) if at >= 0), default=-1)
    end = max(text.rfind("}"), text.rfind("]"))
    return text[start : end + 1] if 0 <= start < end else text


def match_choice(text: str, choices: Sequence[str]) -> str | None:
    """The choice a reply means, or None: equal text, else equal but for case and punctuation, else the only one named.

    A reply that is a JSON object or string with one text value is read as that text.
    """
    if text in choices:
        return text
    text = _unwrapped(text.strip())
    folded = {_folded(choice): choice for choice in choices}
    whole = folded.get(_folded(text))
    if whole is not None:
        return whole
    longest_first = sorted(choices, key=len, reverse=True)
    pattern = "|".join(re.escape(choice) for choice in longest_first)
    named = {item.casefold() for item in re.findall(rf"(?<!\w)(?:{pattern})(?!\w)", text, re.IGNORECASE)}
    if len(named) != 1:
        return None
    only = named.pop()
    return next((choice for choice in choices if choice.casefold() == only), None)


def _unwrapped(text: str) -> str:
    if text[:1] not in '{"':
        return text
    try:
        value: Any = json.loads(text)
    except ValueError:
        return text
    if isinstance(value, dict):
        values = list(cast("dict[str, Any]", value).values())
        value = values[0] if len(values) == 1 else None
    return value if isinstance(value, str) else text


def _folded(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s+/&-]", " ", text).casefold().split())


def repair_turn(problem: str, *, schema: dict[str, Any] | None, choices: Sequence[str] | None) -> str:
    """The user turn that follows an unusable reply."""
    if choices is not None:
        options = "\n".join(f"- {choice}" for choice in choices)
        return f"Answer with exactly one of these options, copied letter by letter, and nothing else:\n{options}"
    return (
        f"Your reply could not be used: {problem}\n"
        f"Reply again with one JSON value that satisfies this JSON schema, and nothing else:\n"
        f"{json.dumps(schema, ensure_ascii=False)}"
    )
