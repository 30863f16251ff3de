"""JSON values: the only values a parameter may have, so that a candidate can be hashed, stored and sent."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias, cast

from agentopt.errors import UserError

JSONValue: TypeAlias = "str | int | float | bool | Sequence[JSONValue] | Mapping[str, JSONValue] | None"
"""A string, a finite number, a bool, None, or lists and string-keyed maps of them."""

_MAX_DEPTH = 64


def normalize(value: object, where: str) -> JSONValue:
    """Return a private copy of `value` made of plain JSON types (tuples become lists).

    Raises:
        UserError: something in `value` has no JSON form; the message begins with `where` and names the place.
    """
    return _normalize(value, where, 0)


def _normalize(value: object, where: str, depth: int) -> JSONValue:
    if depth > _MAX_DEPTH:
        raise UserError(f"{where}: nested deeper than {_MAX_DEPTH} levels (or contains itself); use a flatter value.")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # a plain str, also for str enums and other subclasses
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UserError(f"{where}: found {value}, which JSON cannot hold; use a finite number.")
        return float(value)
    if isinstance(value, Mapping):
        result: dict[str, JSONValue] = {}
        for key, item in cast("Mapping[object, object]", value).items():
            if not isinstance(key, str):
                raise UserError(f"{where}: found a key of type {type(key).__name__}; JSON keys are strings.")
            result[str.__str__(key)] = _normalize(item, f"{where}.{key}", depth + 1)
        return result
    if isinstance(value, (list, tuple)):
        items = cast("Sequence[object]", value)
        return [_normalize(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(items)]
    raise UserError(
        f"{where}: found a value of type {type(value).__name__}, which has no JSON form; "
        "use strings, numbers, booleans, None, lists and maps."
    )


def copied(value: JSONValue) -> JSONValue:
    """Return `value` with every list and map copied, so that a caller cannot change the original."""
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copied(item) for item in value]
    return value


def canonical(value: JSONValue) -> str:
    """Return the one JSON text of `value`: sorted keys, no spaces, ASCII only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: JSONValue) -> str:
    """Return the SHA-256 of `value`'s canonical JSON, as 64 hex characters."""
    return hashlib.sha256(canonical(value).encode("ascii")).hexdigest()
