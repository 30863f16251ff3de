"""Handles: what `prompt()`, `demos()`, `number()` and `choice()` return. Reading one gives the active value.

A handle is not a subclass of str, list or float: such a subclass would silently hand the old value to `join`,
`json.dumps`, regular expressions or pydantic. It supports the few operations that read the value at once; everything
else raises a TypeError that names `.value`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from agentopt.errors import UserError
from agentopt.graph import _templates
from agentopt.graph._context import active_value
from agentopt.graph._jsonvalue import JSONValue, normalize
from agentopt.graph._parameters import ParameterSpec, declare, find_parameter

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

_REFERENCE_KEY = "$parameter"


class HandleError(TypeError, AttributeError):
    """An operation that a handle does not support; use `.value`.

    Also an AttributeError, so that `hasattr(handle, "upper")` is False instead of an error.
    """


def _refuse(handle: Handle, what: str) -> NoReturn:
    raise HandleError(
        f"{what} does not work on the parameter handle {handle.name!r}, which is not a plain value; "
        f"use its active value: handle.value"
    )


def _unsupported(symbol: str) -> Callable[..., Any]:
    def method(self: Handle, *_: object) -> Any:
        _refuse(self, symbol)

    return method


class Handle:
    """A declared parameter. `.value` reads the active value; `.name` and `.spec` tell what it is.

    `==` and `hash` are identity: comparing values is `handle.value == other`.
    """

    __slots__ = ("__weakref__", "_spec")
    _spec: ParameterSpec

    def __init__(self, spec: ParameterSpec) -> None:
        object.__setattr__(self, "_spec", spec)

    @property
    def spec(self) -> ParameterSpec:
        """The declaration: kind, default, what values are allowed."""
        return self._spec

    @property
    def name(self) -> str:
        """The parameter's name."""
        return self._spec.name

    @property
    def value(self) -> Any:
        """The active value: the active candidate's, else the declared default. Each read is recorded."""
        return active_value(self._spec)

    def for_model(self, value: JSONValue) -> Any:
        """What a language model is shown of `value`, this parameter's value."""
        return value

    def __str__(self) -> str:
        return str(active_value(self._spec))

    def __format__(self, format_spec: str) -> str:
        return format(active_value(self._spec), format_spec)

    def __repr__(self) -> str:
        return f"<{self._spec.kind} {self._spec.name!r}>"

    def __add__(self, other: object) -> Any:
        return self.value + _resolved(other)

    def __radd__(self, other: object) -> Any:
        return _resolved(other) + self.value

    def __contains__(self, item: object) -> bool:
        value = self.value
        if not isinstance(value, (str, list, dict)):
            _refuse(self, "in")
        return _resolved(item) in cast("list[object]", value)

    def __len__(self) -> int:
        value = self.value
        if not isinstance(value, (str, list, dict)):
            _refuse(self, "len()")
        return len(cast("list[object]", value))

    def __bool__(self) -> bool:
        value = self.value
        if not isinstance(value, (str, list, dict)):
            _refuse(self, "a truth test")
        return bool(cast("object", value))

    def __getattr__(self, attribute: str) -> NoReturn:
        if attribute.startswith("__") and attribute.endswith("__"):
            raise AttributeError(attribute)
        _refuse(self, f".{attribute}")

    def __setattr__(self, attribute: str, value: object) -> NoReturn:
        raise HandleError(
            f"parameter {self.name!r}: a handle cannot be assigned to (.{attribute}); values come from the active "
            "candidate: Candidate({name: value}).active() or .install()"
        )

    def __copy__(self) -> Handle:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        return self  # a handle is an identity; the agent that holds it may be copied

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            f"parameter {self.name!r}: a handle cannot be pickled, because it reads the candidate active in this "
            "process; send handle.value, or the name and declare the parameter there as well"
        )

    def to_json(self) -> dict[str, str]:
        """Return the JSON form `{"$parameter": name}`: a reference to the parameter, not its value."""
        return {_REFERENCE_KEY: self.name}

    @classmethod
    def __frozen__(cls, value: Handle) -> dict[str, str]:
        # What a record keeps of a handle that was passed as an argument: the reference. Passing one is not a read.
        return value.to_json()

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema  # imported when a model is built, not with agentopt

        def validate(value: Any) -> Handle:
            handle = handle_from_json(cast("object", value)) if isinstance(value, dict) else value
            if not isinstance(handle, cls):
                raise ValueError(f"expected a parameter handle ({cls.__name__}), found {type(handle).__name__}")
            return handle

        def serialize(handle: Handle) -> Any:
            return handle.value

        return core_schema.no_info_after_validator_function(
            validate,
            core_schema.any_schema(),
            serialization=core_schema.plain_serializer_function_ser_schema(serialize),
        )

    __getitem__ = _unsupported("[]")
    __lt__ = _unsupported("<")
    __le__ = _unsupported("<=")
    __gt__ = _unsupported(">")
    __ge__ = _unsupported(">=")
    __mul__ = __rmul__ = _unsupported("*")
    __sub__ = __rsub__ = _unsupported("-")
    __truediv__ = __rtruediv__ = _unsupported("/")
    __floordiv__ = __rfloordiv__ = _unsupported("//")
    __mod__ = __rmod__ = _unsupported("%")
    __pow__ = __rpow__ = _unsupported("**")
    __or__ = __ror__ = _unsupported("|")
    __and__ = __rand__ = _unsupported("&")
    __neg__ = _unsupported("unary -")
    __abs__ = _unsupported("abs()")
    __int__ = _unsupported("int()")
    __float__ = _unsupported("float()")
    __index__ = _unsupported("use as an index")
    __round__ = _unsupported("round()")
    __reversed__ = _unsupported("reversed()")


H = TypeVar("H", bound=Handle)


class Prompt(Handle):
    """A text parameter; `prompt.format(...)` fills its variables."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """The active text, variables unfilled."""
        return cast("str", active_value(self._spec))

    def format(self, *args: object, **kwargs: object) -> str:
        """Fill the active text as `str.format` does.

        Raises:
            KeyError: a variable of the text has no argument.
        """
        self._spec.formatted = True
        text = cast("str", active_value(self._spec))
        return text.format(*args, **kwargs)

    def __iter__(self) -> Iterator[str]:
        return iter(self.value)


class Demos(Handle):
    """A list of demonstrations `{"input": str, "output": str, "source": str}`; `source` is an example id or empty."""

    __slots__ = ()

    @property
    def value(self) -> list[dict[str, str]]:
        """The active demonstrations; a copy."""
        return cast("list[dict[str, str]]", active_value(self._spec))

    def __iter__(self) -> Iterator[dict[str, str]]:
        return iter(self.value)


class Number(Handle):
    """A number between two bounds."""

    __slots__ = ()

    @property
    def value(self) -> float:
        """The active number; an int when the bounds and the default are ints."""
        return cast("float", active_value(self._spec))


class Choice(Handle):
    """One of a few options."""

    __slots__ = ()

    def __iter__(self) -> Iterator[Any]:
        value = self.value
        if not isinstance(value, (str, list, dict)):
            _refuse(self, "iteration")
        return iter(cast("list[Any]", value))


CLASSES: dict[str, type[Handle]] = {
    "prompt": Prompt,
    "tool_text": Prompt,
    "demos": Demos,
    "number": Number,
    "choice": Choice,
}
"""Parameter kind → the handle's class; kinds with a file of their own add themselves."""


def _resolved(value: object) -> Any:
    return value.value if isinstance(value, Handle) else value


def handle_for(spec: ParameterSpec) -> Handle:
    """Return a handle that reads the parameter `spec`."""
    return CLASSES.get(spec.kind, Handle)(spec)


def handle_from_json(data: object) -> Handle:
    """Return the handle that `{"$parameter": name}` refers to.

    Raises:
        UserError: another shape, or no parameter of that name is declared in this process.
    """
    name = cast("dict[str, object]", data).get(_REFERENCE_KEY) if isinstance(data, dict) else None
    if not isinstance(name, str):
        raise UserError(f'parameter reference: expected {{"{_REFERENCE_KEY}": name}}, found {data!r}.')
    spec = find_parameter(name)
    if spec is None:
        raise UserError(
            f"parameter reference: no parameter {name!r} is declared here; import the module that declares it."
        )
    return handle_for(spec)


def _declared(cls: type[H], spec: ParameterSpec, frame: FrameType) -> H:
    problems = spec.problems(spec.default)
    if problems:
        raise UserError(
            f"parameter {spec.name!r} at {frame.f_code.co_filename}:{frame.f_lineno}: its default {problems[0]}."
        )
    return cls(declare(spec, frame))


def prompt(
    text: str,
    *,
    name: str,
    variables: Sequence[str] | None = None,
    description: str = "",
    constraint: Callable[[str], bool | str | None] | None = None,
    constraint_text: str = "",
    projection: Callable[[str], str] | None = None,
) -> Prompt:
    """Declare a tunable text.

    Args:
        text: the default, possibly a `str.format` template.
        name: the parameter's identity; use a dotted name such as "triage.instruction".
        variables: names that every edited text must keep and add none to; inferred from `text` when not given. Names
            that do not stand in braces are looked for as words, for templates of another syntax.
        description: what the text is for; optimizers see it.
        constraint: returns None or True when a text is allowed, else False or a reason.
        constraint_text: the constraint in words; optimizers see it.
        projection: applied to each proposed text before it is checked.

    Raises:
        UserError: the text is not text, or the name is declared with another default.
    """
    if not isinstance(cast("object", text), str):
        raise UserError(f"parameter {name!r}: a prompt's default must be text, found {type(text).__name__}.")
    if isinstance(variables, str):
        raise UserError(f"parameter {name!r}: variables must be a list of names, found the text {variables!r}.")
    spec = ParameterSpec(
        name,
        "prompt",
        text,
        description=description,
        constraint=constraint,
        constraint_text=constraint_text,
        variables=_templates.variables(text) if variables is None else tuple(variables),
        projection=projection,
    )
    return _declared(Prompt, spec, sys._getframe(1))


def demos(
    *,
    name: str,
    max_items: int = 8,
    default: Sequence[Mapping[str, str]] = (),
    description: str = "",
    constraint: Callable[[list[dict[str, str]]], bool | str | None] | None = None,
    constraint_text: str = "",
) -> Demos:
    """Declare a tunable list of demonstrations, empty unless `default` gives some.

    Args:
        name: the parameter's identity.
        max_items: how many demonstrations there may be at most.
        default: `{"input": str, "output": str}` maps, optionally with "source" (an example id).
        description: what the demonstrations show.
        constraint: returns None or True when a list is allowed, else False or a reason.
        constraint_text: the constraint in words; optimizers see it.

    Raises:
        UserError: bad default or max_items, or the name is declared with another default.
    """
    if isinstance(cast("object", max_items), bool) or not isinstance(cast("object", max_items), int) or max_items < 1:
        raise UserError(f"parameter {name!r}: max_items must be a whole number of at least 1, found {max_items!r}.")
    items = [{"source": "", **item} if isinstance(cast("object", item), Mapping) else item for item in default]
    spec = ParameterSpec(
        name,
        "demos",
        normalize(items, f"parameter {name!r}"),
        description=description,
        constraint=constraint,
        constraint_text=constraint_text,
        max_items=max_items,
    )
    return _declared(Demos, spec, sys._getframe(1))


def number(
    low: float,
    high: float,
    *,
    name: str,
    default: float | None = None,
    description: str = "",
    constraint: Callable[[float], bool | str | None] | None = None,
    constraint_text: str = "",
) -> Number:
    """Declare a tunable number in low … high, both included; a whole number when bounds and default are ints.

    Args:
        low: lower bound.
        high: upper bound.
        name: the parameter's identity.
        default: the declared value; the middle of the bounds when not given.
        description: what the number does.
        constraint: returns None or True when a number is allowed, else False or a reason.
        constraint_text: the constraint in words; optimizers see it.

    Raises:
        UserError: bounds out of order, default outside, or the name is declared with another default.
    """
    for label, bound in (("low", low), ("high", high), ("default", default)):
        if bound is not None and (isinstance(bound, bool) or not isinstance(cast("object", bound), (int, float))):
            raise UserError(f"parameter {name!r}: {label} must be a number, found {bound!r}.")
    if not low <= high:
        raise UserError(f"parameter {name!r}: the lower bound {low} must not be above the upper bound {high}.")
    integer = isinstance(low, int) and isinstance(high, int) and not isinstance(default, float)
    if default is None:
        default = (low + high) // 2 if integer else (low + high) / 2
    spec = ParameterSpec(
        name,
        "number",
        normalize(default, f"parameter {name!r}"),
        description=description,
        constraint=constraint,
        constraint_text=constraint_text,
        low=low,
        high=high,
        integer=integer,
    )
    return _declared(Number, spec, sys._getframe(1))


def choice(
    options: Sequence[JSONValue],
    *,
    name: str,
    default: JSONValue = None,
    description: str = "",
    constraint: Callable[[Any], bool | str | None] | None = None,
    constraint_text: str = "",
) -> Choice:
    """Declare a tunable choice among `options` (JSON values); the first one is the default unless `default` is given.

    Raises:
        UserError: no options, a default that is none of them, or the name is declared with another default.
    """
    if isinstance(options, str) or not isinstance(cast("object", options), Sequence) or not options:
        raise UserError(f"parameter {name!r}: options must be a list with at least one value, found {options!r}.")
    values = cast("list[JSONValue]", normalize(list(options), f"parameter {name!r}"))
    spec = ParameterSpec(
        name,
        "choice",
        values[0] if default is None else normalize(default, f"parameter {name!r}"),
        description=description,
        constraint=constraint,
        constraint_text=constraint_text,
        options=tuple(values),
    )
    return _declared(Choice, spec, sys._getframe(1))
