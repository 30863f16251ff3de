"""Values that cross into a sandbox and back: JSON values, tuples (they arrive as lists) and registered dataclasses."""

from __future__ import annotations

import collections.abc
import dataclasses
import threading
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

from agentopt.errors import UserError

_T = TypeVar("_T")
_DATACLASS = "$dataclass"
_ESCAPED = "$dict"
_MAX_DEPTH = 64

_registered: dict[str, type] = {}
_lock = threading.Lock()

_ATOMS = (str, int, float, bool, type(None))
_CONTAINERS = (
    list,
    tuple,
    dict,
    Sequence,
    Mapping,
    collections.abc.Iterable,
    collections.abc.Collection,
    collections.abc.MutableMapping,
    collections.abc.MutableSequence,
)


def register_dataclass(cls: type[_T]) -> type[_T]:
    """Let instances of the dataclass `cls` cross into a sandbox: `@ao.register_dataclass` above `@dataclass`.

    Changed code sees a plain dataclass of the same name and fields, without the methods.

    Raises:
        UserError: not a dataclass, or a field's type cannot cross.
    """
    name = f"{cls.__module__}.{cls.__qualname__}"
    if not dataclasses.is_dataclass(cls):
        raise UserError(f"{name} is not a dataclass; put @ao.register_dataclass above @dataclass.")
    with _lock:
        previous = _registered.get(name)
        _registered[name] = cls
    hints = _hints(cls)
    for field in dataclasses.fields(cls):
        problem = annotation_problem(hints.get(field.name, Any))
        if problem:
            with _lock:
                if previous is None:
                    del _registered[name]
                else:
                    _registered[name] = previous
            raise UserError(f"{name}.{field.name} cannot cross into the sandbox: {problem}.")
    return cls


def is_registered(cls: type) -> bool:
    """Whether instances of `cls` may cross."""
    return _registered.get(f"{cls.__module__}.{cls.__qualname__}") is cls


def dataclass_form(cls: type) -> dict[str, Any]:
    """Return what a worker needs to make a dataclass of the same shape."""
    return {
        "id": f"{cls.__module__}.{cls.__qualname__}",
        "name": cls.__name__,
        "fields": [field.name for field in dataclasses.fields(cls)],
    }


def _hints(thing: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(thing)
    except (NameError, TypeError, AttributeError, SyntaxError):
        return {}  # an annotation names something that does not exist yet: values are checked when they cross


def annotation_problem(annotation: Any) -> str | None:
    """Say why values of this annotation cannot cross; None when they can (or when the annotation does not tell)."""
    origin = get_origin(annotation)
    if annotation is Any or annotation is object or annotation is None or isinstance(annotation, (str, TypeVar)):
        return None
    if annotation in _ATOMS or annotation in _CONTAINERS or origin is Literal:
        return None
    if origin in (Union, types.UnionType) or origin in _CONTAINERS:
        inner = [annotation_problem(argument) for argument in get_args(annotation) if argument is not ...]
        return next((problem for problem in inner if problem), None)
    if origin is typing.Annotated:
        return annotation_problem(get_args(annotation)[0])
    if isinstance(annotation, type):
        if typing.is_typeddict(annotation):
            inner = [annotation_problem(hint) for hint in _hints(annotation).values()]
            return next((problem for problem in inner if problem), None)
        if is_registered(annotation):
            return None
        if dataclasses.is_dataclass(annotation):
            return f"{annotation.__qualname__} is a dataclass that is not registered; add @ao.register_dataclass"
        name = cast("type", annotation).__qualname__
        return f"values of type {name} are neither JSON values nor registered dataclasses"
    return None


def encode_crossing(value: object, where: str, depth: int = 0) -> Any:
    """Return the JSON form of a value that crosses.

    Raises:
        UserError: the value has no JSON form; the message begins with `where`.
    """
    if depth > _MAX_DEPTH:
        raise UserError(f"{where} is nested deeper than {_MAX_DEPTH} levels (or contains itself).")
    kind = type(value)
    if kind in _ATOMS:
        return value
    if isinstance(value, (list, tuple)):
        items = cast("Sequence[object]", value)
        return [encode_crossing(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(items)]
    if isinstance(value, dict):
        return _encode_dict(cast("dict[object, object]", value), where, depth)
    if is_registered(kind):
        fields = dataclasses.fields(cast("Any", value))
        content = {
            field.name: encode_crossing(getattr(value, field.name), f"{where}.{field.name}", depth + 1)
            for field in fields
        }
        return {_DATACLASS: f"{kind.__module__}.{kind.__qualname__}", "fields": content}
    if isinstance(value, (str, int, float)):  # an enum with a plain base, numpy's float64: the plain value crosses
        return str.__str__(value) if isinstance(value, str) else int(value) if isinstance(value, int) else float(value)
    raise UserError(
        f"{where} is a {kind.__qualname__}, which cannot cross into the sandbox; "
        "use JSON values or a dataclass with @ao.register_dataclass."
    )


def _encode_dict(value: dict[object, object], where: str, depth: int) -> Any:
    encoded: dict[str, Any] = {}
    for key, item in value.items():
        if not isinstance(key, str):
            raise UserError(f"{where} has a key of type {type(key).__qualname__}; keys that cross are strings.")
        encoded[key] = encode_crossing(item, f"{where}[{key!r}]", depth + 1)
    if any(key.startswith("$") for key in encoded):
        return {_ESCAPED: [[key, item] for key, item in encoded.items()]}
    return encoded


def decode_crossing(value: Any) -> Any:
    """Return the value whose JSON form is `value`; registered dataclasses become real instances again."""
    if isinstance(value, list):
        return [decode_crossing(item) for item in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    data = cast("dict[str, Any]", value)
    if _ESCAPED in data:
        return {key: decode_crossing(item) for key, item in data[_ESCAPED]}
    if _DATACLASS in data:
        cls = _registered.get(data[_DATACLASS])
        if cls is None:
            raise UserError(f"the dataclass {data[_DATACLASS]!r} is not registered in this process.")
        return cls(**{key: decode_crossing(item) for key, item in data["fields"].items()})
    return {key: decode_crossing(item) for key, item in data.items()}
