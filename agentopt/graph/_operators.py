"""The operators of Node, and the few operations Python gives no operator for.

Each one records its own inputs: the records of Nodes, copies of containers, other values as they are.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

from agentopt.graph._live import LiveOp, Op, Rec, current, note_read
from agentopt.graph._node import Node, Parameter, failed, make, plain, take
from agentopt.graph._values import ATOMS, kind_of, settle

_current = current.get
_XY: Final = ("x", "y")


def apply(op: Op, function: Callable[..., Any], *args: Any) -> Any:
    """Run `function` on the plain values of `args` and give a Node, or a plain value where tracing is stopped.

    Raises:
        ExecutionError: the function raised.
    """
    frame = _current()
    if frame is not None and not frame.tracing:
        return function(*(plain(value) for value in args))
    taken = [take(value) for value in args]
    entries = tuple(entry for entry, _ in taken)
    try:
        value = function(*(item for _, item in taken))
    except Exception as error:
        raise failed(op, entries, error) from error
    return make(op, entries, value)


def _binary(name: str, function: Callable[[Any, Any], Any]) -> Callable[[Node, Any], Any]:
    op = Op(name, _XY)

    def method(self: Node, other: Any) -> Any:
        frame = _current()
        if frame is not None and not frame.tracing:
            return function(self._current()[1], plain(other))
        value = self._live
        left: Rec | LiveOp = self._rec
        if type(self) is not Node or type(value) not in ATOMS:
            left, value = self._current()
        right, argument = (other, other) if type(other) in ATOMS else take(other)
        try:
            result = function(value, argument)
        except Exception as error:
            raise failed(op, (left, right), error) from error
        return make(op, (left, right), result)

    return method


def _reflected(name: str, function: Callable[[Any, Any], Any]) -> Callable[[Node, Any], Any]:
    op = Op(name, _XY)

    def method(self: Node, other: Any) -> Any:
        return apply(op, function, other, self)

    return method


def _unary(name: str, function: Callable[..., Any], *names: str) -> Callable[..., Any]:
    op = Op(name, ("x", *names))

    def method(self: Node, *args: Any) -> Any:
        return apply(op if args or not names else Op(name, ("x",)), function, self, *args)

    return method


def _read(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Node, *args: Any) -> Any:
        return function(self.value, *(plain(value) for value in args))

    return method


_SPECIAL: Final = {"and": "and_", "or": "or_"}
_NAMES: Final = [
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
]
_BINARY: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "divmod": divmod,
    **{name: getattr(operator, _SPECIAL.get(name, name)) for name in _NAMES},
}
_COMPARISONS: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "lt": operator.lt,
    "gt": operator.gt,
    "le": operator.le,
    "ge": operator.ge,
}
_UNARY: Final[dict[str, Callable[..., Any]]] = {
    "neg": operator.neg,
    "pos": operator.pos,
    "invert": operator.invert,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "trunc": math.trunc,
}
_READS: Final[dict[str, Callable[..., Any]]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "str": str,
    "format": format,
    "bytes": bytes,
    "int": int,
    "float": float,
    "complex": complex,
    "index": operator.index,
    "bool": bool,
    "len": len,
    "contains": operator.contains,
}

for _name, _function in _BINARY.items():
    setattr(Node, f"__{_name}__", _binary(_name, _function))
    setattr(Node, f"__r{_name}__", _reflected(_name, _function))
for _name, _function in _COMPARISONS.items():
    setattr(Node, f"__{_name}__", _binary(_name, _function))
for _name, _function in _UNARY.items():
    setattr(Node, f"__{_name}__", _unary(_name, _function))
for _name, _function in _READS.items():
    setattr(Node, f"__{_name}__", _read(_function))

# --- containers, attributes, calls -----------------------------------------------------------------------------------

GETITEM: Final = Op("getitem", ("x", "index"))
SETITEM: Final = Op("setitem", ("x", "index", "value"))
DELITEM: Final = Op("delitem", ("x", "index"))
GETATTR: Final = Op("getattr", ("x", "name"))
ELEMENT: Final = Op("element", ("x", "place"), description="one element of a container without an index")
KEY: Final = Op("key", ("x", "place"), description="one key of a dict")
_MUTATORS: Final = {
    list: frozenset({"append", "extend", "insert", "pop", "remove", "clear", "sort", "reverse"}),
    dict: frozenset({"update", "pop", "popitem", "setdefault", "clear"}),
    set: frozenset({"add", "discard", "remove", "pop", "clear", "update", "difference_update"})
    | {"intersection_update", "symmetric_difference_update"},
    bytearray: frozenset({"append", "extend", "insert", "pop", "remove", "clear", "reverse"}),
}
_call_ops: dict[tuple[str, int, tuple[str, ...]], Op] = {}


def _getitem(self: Node, index: Any) -> Any:
    return apply(GETITEM, operator.getitem, self, index)


def _change(node: Node, op: Op, entries: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """Run `change` on a copy of the Node's value and make this Node the result: earlier records keep the old value."""
    before, value = node._current()
    if isinstance(node, Parameter):
        raise TypeError(
            f"parameter {node.name!r} is not changed in place; work on a copy (x = {node.name}.clone()) or set .value"
        )
    copied = settle(value) if type(value) in ATOMS or settle(value) is not value else _shallow(value)
    try:
        result = change(copied)
    except Exception as error:
        raise failed(op, (before, *entries), error) from error
    after = make(op, (before, *entries), copied)
    node._rec, node._live = after._rec, after._live
    return result


def _shallow(value: Any) -> Any:
    import copy

    return copy.copy(value)


def _setitem(self: Node, index: Any, value: Any) -> None:
    frame = _current()
    if frame is not None and not frame.tracing:
        self._live[plain(index)] = plain(value)
        return
    (key_entry, key), (entry, item) = take(index), take(value)
    _change(self, SETITEM, (key_entry, entry), lambda target: operator.setitem(target, key, item))


def _delitem(self: Node, index: Any) -> None:
    frame = _current()
    if frame is not None and not frame.tracing:
        del self._live[plain(index)]
        return
    key_entry, key = take(index)
    _change(self, DELITEM, (key_entry,), lambda target: operator.delitem(target, key))


def _iter(self: Node) -> Iterator[Any]:
    """Elements as Nodes whose parents are this Node and the index; a dict gives its keys, as in Python."""
    _, value = self._current()
    frame = _current()
    if frame is not None and not frame.tracing:
        return iter(value)
    if isinstance(value, dict):
        return _elements(self, KEY, list(cast("dict[Any, Any]", value)))
    if hasattr(value, "__getitem__") and hasattr(value, "__len__"):
        return _items(self, len(value))
    return _elements(self, ELEMENT, value)


def _items(node: Node, count: int) -> Iterator[Any]:
    for index in range(count):
        yield _getitem(node, index)


def _elements(node: Node, op: Op, values: Any) -> Iterator[Any]:
    entry = node._current()[0]
    for place, item in enumerate(values):
        yield make(op, (entry, place), item)


def _getattr(self: Node, name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"a Node gives no private attributes: {name!r}; use node.value.{name}")
    value = self._current()[1]
    found = getattr(value, name)
    if callable(found):
        return Method(self, name)
    return apply(GETATTR, getattr, self, name)


def _node_getattr(self: Node, name: str) -> Any:
    """The value's attribute `name`, also when Node has one of that name itself."""
    return Method(self, name) if callable(getattr(self._current()[1], name)) else apply(GETATTR, getattr, self, name)


class Method:
    """A method of a Node's value; calling it gives a Node. One that changes a list, dict or set changes the Node."""

    __slots__ = ("_name", "_node")

    def __init__(self, node: Node, name: str) -> None:
        self._node = node
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        node, name = self._node, self._name
        kind = kind_of(node._current()[1])
        if kind is dict and name in ("items", "values") and not args and not kwargs:
            return _pairs(node) if name == "items" else _dict_values(node)
        frame = _current()
        if frame is not None and not frame.tracing:
            return getattr(node._current()[1], name)(
                *map(plain, args), **{key: plain(item) for key, item in kwargs.items()}
            )
        op = _call_op(name, len(args), tuple(kwargs))
        if name in _MUTATORS.get(kind, ()):
            taken = [take(value) for value in (*args, *kwargs.values())]
            entries = tuple(entry for entry, _ in taken)
            positional = [item for _, item in taken[: len(args)]]
            named = dict(zip(kwargs, (item for _, item in taken[len(args) :]), strict=True))
            before = node._current()[0]
            result = _change(node, op, entries, lambda target: getattr(target, name)(*positional, **named))
            return None if result is None else make(op, (before, *entries), result)

        def call(value: Any, *values: Any) -> Any:
            return getattr(value, name)(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))

        return apply(op, call, node, *args, *kwargs.values())


def _pairs(node: Node) -> Iterator[tuple[Any, Any]]:
    for key in _iter(node):
        yield key, _getitem(node, key)


def _dict_values(node: Node) -> Iterator[Any]:
    for key in list(cast("dict[Any, Any]", node._current()[1])):
        yield _getitem(node, key)


def _call_op(name: str, count: int, keywords: tuple[str, ...]) -> Op:
    key = (name, count, keywords)
    op = _call_ops.get(key)
    if op is None:
        op = Op(name, ("self", *(f"args_{place}" for place in range(count)), *keywords))
        if len(_call_ops) < 10_000:
            _call_ops[key] = op
    return op


def _call(self: Node, *args: Any, **kwargs: Any) -> Any:
    def call(function: Any, *values: Any) -> Any:
        return function(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))

    return apply(_call_op("call", len(args), tuple(kwargs)), call, self, *args, *kwargs.values())


def _method_call(self: Node, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call the value's method `name`, also when Node has an attribute of that name itself."""
    return Method(self, name)(*args, **kwargs)


def _round(self: Node, digits: Any = None) -> Any:
    return apply(ROUND, round, self) if digits is None else apply(ROUND_TO, round, self, digits)


ROUND: Final = Op("round", ("x",))
ROUND_TO: Final = Op("round", ("x", "digits"))

for _name, _function in {
    "__getitem__": _getitem,
    "__setitem__": _setitem,
    "__delitem__": _delitem,
    "__iter__": _iter,
    "__getattr__": _getattr,
    "__call__": _call,
    "__round__": _round,
    "getattr": _node_getattr,
    "call": _method_call,
}.items():
    setattr(Node, _name, _function)

# --- operations without an operator ----------------------------------------------------------------------------------


def _choose(condition: Any, then: Any, other: Any) -> Any:
    return then if condition else other


def _is_in(item: Any, container: Any) -> bool:
    return item in container


def _join(separator: str, parts: Any) -> str:
    return separator.join(str(part) for part in parts)


_COND: Final = Op("cond", ("condition", "x", "y"), description="x if condition else y")
_JOIN: Final = Op("join", ("separator", "parts"))
_NOT: Final = Op("not", ("x",))
_IS: Final = Op("is", _XY)
_IN: Final = Op("in", _XY)
_LEN: Final = Op("len", ("x",))
_EQUAL: Final = Op("eq", _XY)


def cond(condition: Any, then: Any, other: Any) -> Any:
    """A Node with `then` if the condition holds, else `other`; all three are parents."""
    return apply(_COND, _choose, condition, then, other)


def join(separator: Any, parts: Any) -> Any:
    """A Node with the parts' texts joined; the parts may be Nodes."""
    return apply(_JOIN, _join, separator, parts)


def not_(x: Any) -> Any:
    """A Node with `not x`."""
    return apply(_NOT, operator.not_, x)


def is_(x: Any, y: Any) -> Any:
    """A Node with `x is y`, about the values."""
    return apply(_IS, operator.is_, x, y)


def in_(x: Any, y: Any) -> Any:
    """A Node with `x in y`."""
    return apply(_IN, _is_in, x, y)


def length(x: Any) -> Any:
    """A Node with `len(x)`."""
    return apply(_LEN, len, x)


def equal(x: Any, y: Any) -> Any:
    """A Node with `x == y` (the operator itself gives a plain bool)."""
    return apply(_EQUAL, operator.eq, x, y)


__all__ = ["Method", "apply", "cond", "equal", "in_", "is_", "join", "length", "not_", "note_read"]
