"""What a record may hold: frozen copies of built-in containers, references to everything else, and their JSON form.

Atoms are kept as they are. Built-in containers are copied, nested ones too, while they have at most 1,000 items
together, so a recorded value cannot change afterwards. Anything else is kept by reference with its type and a digest
taken at that moment, and is marked mutable.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, cast

# Typed as Any, because what is asked of a kind depends on the value.
kind_of: Final = cast("Callable[[object], Any]", type)
ATOMS: Final = frozenset({int, float, str, bool, type(None), bytes, complex})
MUTABLE_CONTAINERS: Final = frozenset({list, dict, set, bytearray})
CONTAINERS: Final = MUTABLE_CONTAINERS | {tuple, frozenset}
MAX_FROZEN_ITEMS: Final = 1_000
_MAX_DEPTH: Final = 24
_ADDRESS: Final = re.compile(r" at 0x[0-9a-fA-F]+")

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 160
_short.maxlist = _short.maxtuple = _short.maxdict = _short.maxset = 8


def summarize(value: object, limit: int = 200) -> str:
    """A one-line text of at most `limit` characters for messages and tables; never raises."""
    try:
        text = repr(value) if type(value) in (int, float, bool, type(None)) else _short.repr(value)
    except Exception as error:  # noqa: BLE001 - a broken __repr__ must not break the error report that shows it
        text = f"<{type(value).__name__}: its repr raises {type(error).__name__}>"
    text = _ADDRESS.sub("", text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


class Reference:
    """A value kept by reference: its type, a digest taken when it was recorded, and a short text.

    `value` is the live object in the process that recorded it and None in a trace that was loaded from a file.
    """

    __slots__ = ("digest", "text", "type", "value")
    mutable = True

    def __init__(self, type: str, digest: str, text: str, value: object = None) -> None:
        self.type = type
        self.digest = digest
        self.text = text
        self.value = value

    @classmethod
    def of(cls, value: object) -> Reference:
        """Take the type, digest and short text of `value` now."""
        kind = kind_of(value)
        text = summarize(value)
        size = ""
        if kind in CONTAINERS:
            size = str(len(cast("Any", value)))
        name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
        digest = hashlib.sha256(f"{name}:{size}:{text}".encode("utf-8", "backslashreplace")).hexdigest()[:16]
        return cls(name, digest, text, value)

    def __repr__(self) -> str:
        return f"Reference({self.type}, {self.text})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reference) and (self.type, self.digest, self.text) == (
            other.type,
            other.digest,
            other.text,
        )

    def __hash__(self) -> int:
        return hash((self.type, self.digest, self.text))


class _TooBig(Exception):
    pass


def freeze(value: Any) -> Any:
    """Return what a record may keep of `value`: the atom, a private copy of a container, or a `Reference`."""
    kind = kind_of(value)
    if kind in ATOMS:
        return value
    if kind in CONTAINERS:
        try:
            return _copy(value, [MAX_FROZEN_ITEMS], 0)
        except _TooBig:
            return Reference.of(value)
    if kind is Reference:
        return value
    frozen = getattr(kind, "__frozen__", None)  # a Node gives the value of its record
    return Reference.of(value) if frozen is None else frozen(value)


def settle(value: Any) -> Any:
    """Return a private copy of a container of at most 1,000 items; everything else, custom objects too, as it is."""
    if type(value) in CONTAINERS:
        try:
            return _copy(value, [MAX_FROZEN_ITEMS], 0, keep=True)
        except _TooBig:
            return value
    return value


def _copy(value: Any, left: list[int], depth: int, keep: bool = False) -> Any:
    kind = kind_of(value)
    if kind in ATOMS:
        return value
    if kind not in CONTAINERS:
        if keep or kind is Reference:
            return value
        frozen = getattr(kind, "__frozen__", None)
        return Reference.of(value) if frozen is None else frozen(value)
    if kind is bytearray:
        return bytearray(value)
    left[0] -= len(value)
    if left[0] < 0 or depth > _MAX_DEPTH:
        raise _TooBig
    if kind is dict:
        items = cast("dict[Any, Any]", value).items()
        return {key: _copy(item, left, depth + 1, keep) for key, item in items}
    copied = [_copy(item, left, depth + 1, keep) for item in cast("Iterable[Any]", value)]
    return copied if kind is list else cast("Any", kind)(copied)


def strings_in(value: Any, limit: int = 64) -> Iterator[str]:
    """Yield the strings inside a frozen value, at most `limit` of them, four containers deep."""
    if isinstance(value, str):
        yield value
        return
    stack: list[tuple[Any, int]] = [(value, 0)]
    found = 0
    while stack and found < limit:
        item, depth = stack.pop()
        if isinstance(item, str):
            found += 1
            yield item
        elif depth < 4:
            if isinstance(item, dict):
                children: Iterable[Any] = cast("dict[Any, Any]", item).values()
            elif isinstance(item, (list, tuple, set, frozenset)):
                children = cast("list[Any]", item)
            else:
                continue
            stack.extend((child, depth + 1) for child in children)


# --- JSON form -------------------------------------------------------------------------------------------------------
# A dict with one key that starts with "$" is ours; a user's dict with such a key is written as "$dict".


def encode(value: Any) -> Any:
    """Turn a frozen value into plain JSON data; `decode` gives an equal value back (references stay references)."""
    kind = kind_of(value)
    if kind is str:
        return value if value.isascii() or _is_clean(value) else {"$str": value.encode("utf-8", "surrogatepass").hex()}
    if kind is int:
        return value if -(2**63) <= value < 2**63 else {"$int": hex(value)}
    if kind is bool or value is None:
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    encoder = _ENCODERS.get(kind)
    if encoder is not None:
        return encoder(value)
    reference = value if isinstance(value, Reference) else freeze(value)
    if not isinstance(reference, Reference):
        return encode(reference)
    return {
        "$ref": {
            "type": reference.type,
            "digest": reference.digest,
            "text": _printable(reference.text),
            "mutable": True,
        }
    }


def _is_clean(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _encode_dict(value: dict[Any, Any]) -> Any:
    if all(type(key) is str and not key.startswith("$") and (key.isascii() or _is_clean(key)) for key in value):
        return {key: encode(item) for key, item in value.items()}
    return {"$dict": [[encode(key), encode(item)] for key, item in value.items()]}


def _encode_items(tag: str, items: Iterable[Any]) -> dict[str, Any]:
    return {tag: [encode(item) for item in items]}


_ENCODERS: Final[dict[type[Any], Callable[[Any], Any]]] = {
    list: lambda value: [encode(item) for item in value],
    dict: _encode_dict,
    tuple: lambda value: _encode_items("$tuple", value),
    set: lambda value: _encode_items("$set", sorted(value, key=repr)),
    frozenset: lambda value: _encode_items("$frozenset", sorted(value, key=repr)),
    bytes: lambda value: {"$bytes": base64.b64encode(value).decode()},
    bytearray: lambda value: {"$bytearray": base64.b64encode(value).decode()},
    complex: lambda value: {"$complex": [encode(value.real), encode(value.imag)]},
}


def decode(value: Any) -> Any:
    """Inverse of `encode`.

    Raises:
        ValueError: a `$…` form that this version does not know.
    """
    if isinstance(value, list):
        return [decode(item) for item in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    data = cast("dict[str, Any]", value)
    if len(data) == 1:
        ((tag, body),) = data.items()
        if tag.startswith("$"):
            decoder = _DECODERS.get(tag)
            if decoder is None:
                raise ValueError(f"unknown value form {tag!r}; the file may come from a newer version")
            return decoder(body)
    return {key: decode(item) for key, item in data.items()}


def _decode_reference(body: Mapping[str, Any]) -> Reference:
    return Reference(str(body["type"]), str(body["digest"]), str(body["text"]))


_DECODERS: Final[dict[str, Callable[[Any], Any]]] = {
    "$str": lambda body: bytes.fromhex(body).decode("utf-8", "surrogatepass"),
    "$int": lambda body: int(body, 16),
    "$float": float,
    "$dict": lambda body: {decode(key): decode(item) for key, item in body},
    "$tuple": lambda body: tuple(decode(item) for item in body),
    "$set": lambda body: {decode(item) for item in body},
    "$frozenset": lambda body: frozenset(decode(item) for item in body),
    "$bytes": lambda body: base64.b64decode(body, validate=True),
    "$bytearray": lambda body: bytearray(base64.b64decode(body, validate=True)),
    "$complex": lambda body: complex(decode(body[0]), decode(body[1])),
    "$ref": _decode_reference,
}
