"""The code of a bundled function as a parameter: the original body runs here, a changed one in the sandbox."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, FunctionType
from typing import Any, Final, cast

from agentopt.errors import UserError
from agentopt.graph._code import CodeError, code_runner, declare_code, describe_code
from agentopt.graph._jsonvalue import normalize
from agentopt.graph._live import note_read
from agentopt.graph._node import Parameter, plain

_ENTRY: Final = "call_with_self"
_ENTRY_SOURCE: Final = """

class SelfOf:
    pass


{prefix}def {entry}(attributes, args, kwargs):
    self = SelfOf()
    for name in attributes:
        setattr(self, name, attributes[name])
    return {wait}{name}(self, *args, **kwargs)
"""


class Code:
    """The source of one function as the parameter `NAME.code`.

    A changed method gets a stand-in for `self` that holds the instance's public attributes which have a JSON form.
    """

    __slots__ = ("fn", "is_method", "parameter", "unit")

    def __init__(self, fn: Callable[..., Any], name: str, uses: Sequence[object], frame: FrameType) -> None:
        """Raises UserError when the source is missing or something the function needs cannot cross."""
        self.fn = fn
        first = next(iter(inspect.signature(fn).parameters), "")
        qualified = fn.__qualname__.rpartition("<locals>.")[2]
        self.is_method = first == "self" and "." in qualified
        self.unit = describe_code(_as_function(fn) if self.is_method else fn, uses)
        full = f"{qualified if name == fn.__name__ else name}.code"
        self.parameter = Parameter(self.unit.source, declare_code(self.unit, full, frozen=False, frame=frame))

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the active code on plain arguments; the read of the parameter is noted in the open op.

        Raises:
            CodeError: the changed code cannot be used, or failed.
        """
        rec, source = self.parameter._current()
        note_read(rec, "parameter")
        unit = self.unit
        if source == unit.source:
            return self.fn(*args, **kwargs)
        problems = unit.problems(source)
        if problems:
            raise CodeError(unit.name, "CodeError", "; ".join(problems))
        if not self.is_method:
            return unit.arun(source, args, kwargs) if unit.is_async else unit.run(source, args, kwargs)
        instance, *rest = unit.signature.bind(*args, **kwargs).args
        named = unit.signature.bind(*args, **kwargs).kwargs
        wait, prefix = ("await ", "async ") if unit.is_async else ("", "")
        source += _ENTRY_SOURCE.format(entry=_ENTRY, name=unit.name, wait=wait, prefix=prefix)
        runner = code_runner()
        function = runner.compile(source, _ENTRY, unit.uses)
        values = (_public_data(instance), rest, named)
        return runner.acall(function, values, {}) if unit.is_async else runner.call(function, values, {})


def _as_function(method: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of the method that does not look like one: its `self` will be a stand-in, which can cross."""
    original = cast("FunctionType", method)
    copied = FunctionType(
        original.__code__, original.__globals__, original.__name__, original.__defaults__, original.__closure__
    )
    copied.__kwdefaults__ = original.__kwdefaults__
    copied.__annotations__ = dict(original.__annotations__)
    copied.__module__ = original.__module__
    copied.__qualname__ = original.__name__
    return copied


def _public_data(instance: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in getattr(instance, "__dict__", {}).items():
        if name.startswith("_"):
            continue
        try:
            found[name] = normalize(plain(value), name)
        except UserError:
            continue  # what has no JSON form does not exist for changed code
    return found
