"""Module: an object whose parameters are found in its attributes."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any, TypeVar, cast

from agentopt.errors import UserError
from agentopt.graph._bundle import BundleInfo
from agentopt.graph._node import Node, Parameter

C = TypeVar("C", bound=type)


class Module(ABC):  # noqa: B024 - an ABC so that @module can register classes, not because it has abstract methods
    """Base of objects with parameters. Attributes of the instance and its classes are searched, through other Modules,
    lists, tuples, sets and dicts; the code of trainable methods counts too.
    """

    def parameters(self) -> dict[str, Node]:
        """Every trainable Node, by parameter name, in order of discovery; one that is reachable twice counts once."""
        return {item.name: item for _, item in _found(self)}

    def state(self) -> dict[str, Any]:
        """The parameters' values, by attribute path (`"policy.rules.0"`), the same in every process."""
        return {path: item._current()[1] for path, item in _found(self)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Set the parameters from what `state()` gave.

        Raises:
            UserError: a path is missing or unknown, or a constraint refuses a value; nothing is changed then.
        """
        found = dict(_found(self))
        unknown = [path for path in state if path not in found]
        missing = [path for path in found if path not in state]
        if unknown or missing:
            parts = [f"unknown: {', '.join(unknown)}"] if unknown else []
            parts += [f"missing: {', '.join(missing)}"] if missing else []
            raise UserError(f"the state does not fit {type(self).__name__}: {'; '.join(parts)}")
        before = {path: item._live for path, item in found.items()}
        done: list[str] = []
        try:
            for path, item in found.items():
                item.value = state[path]
                done.append(path)
        except UserError:
            for path in done:
                found[path].value = before[path]
            raise


def module(cls: C) -> C:
    """Give a class the methods of `Module`; the class stays the same object and keeps methods it already has."""
    for name in ("parameters", "state", "load_state"):
        if not hasattr(cls, name):
            setattr(cls, name, getattr(Module, name))
    Module.register(cls)
    return cls


def _found(root: object) -> Iterator[tuple[str, Parameter]]:
    """Attribute path and Parameter, depth first; every object is entered once."""
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", root)]
    while stack:
        path, item = stack.pop()
        if isinstance(item, (str, bytes, int, float, type(None))) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Parameter):
            yield path, item
            continue
        stack.extend(reversed([(f"{path}.{name}" if path else name, child) for name, child in _children(item)]))


def _children(item: Any) -> list[tuple[str, Any]]:
    if isinstance(item, dict):
        return [(str(key), child) for key, child in cast("dict[Any, Any]", item).items()]
    if isinstance(item, (list, tuple)):
        return [(str(place), child) for place, child in enumerate(cast("list[Any]", item))]
    if isinstance(item, (set, frozenset)):
        ordered = sorted(cast("set[Any]", item), key=lambda child: str(getattr(child, "name", child)))
        return [(str(place), child) for place, child in enumerate(ordered)]
    if isinstance(item, FunctionType) or hasattr(item, "__func__"):
        info = getattr(item, "bundle", None)
        return [("code", info.code.parameter)] if isinstance(info, BundleInfo) and info.code is not None else []
    if isinstance(item, Module):
        return _attributes(item)
    return []


def _attributes(instance: Module) -> list[tuple[str, Any]]:
    found: dict[str, Any] = {}
    for kind in reversed(type(instance).__mro__):
        if kind not in (object, Module, ABC):
            found.update((name, child) for name, child in vars(kind).items() if not name.startswith("__"))
            slots = vars(kind).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if hasattr(instance, name):
                    found[name] = getattr(instance, name)
    found.update(getattr(instance, "__dict__", {}))
    found.pop("_abc_impl", None)
    return list(found.items())
