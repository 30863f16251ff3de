"""Jinja's sandbox as chat templates need it: a template comes with a model from anywhere, so it is not trusted."""

from __future__ import annotations

import datetime
import itertools
import json
import secrets
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

LARGEST = 1 << 24
"""Characters that one value, or what a template adds to its messages, may have."""
_DATE = datetime.datetime(2026, 12, 26, 12, 34, 56)
"""What a template that asks for the date is told: counting is a pure function of the messages."""


class _Generation(Extension):
    """`{% generation %}` marks what the model wrote; here only its text matters."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Also refuses to build an enormous value by one operator."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (abs(left) < 1e6 and abs(right) < 64):
            raise SecurityError("a power too large")
        for one, times in ((left, right), (right, left)):
            if hasattr(one, "__len__") and isinstance(times, int) and len(one) * times > LARGEST:
                raise SecurityError("a repetition too long")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **values: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Methods that pad take a width: `'a'.center(10**9)`."""
        for number in (*args, *values.values()):
            if isinstance(number, int) and abs(number) > LARGEST:
                raise SecurityError("a number too large")
        return super().call(context, function, *args, **values)


class _Namespace(jinja2.utils.Namespace):
    """Attributes that begin with an underscore would reach into the interpreter."""

    def __init__(*args: Any, **values: Any) -> None:
        for key in dict(*args[1:], **values):
            _public(key)
        jinja2.utils.Namespace.__init__(*args, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _public(name)
        super().__setitem__(name, value)


def _public(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def _refuse(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _date(form: str) -> str:
    return _DATE.strftime(form)


def _new_dict(*args: Any, **values: Any) -> dict[Any, Any]:
    return dict(*args, **values)


class Program:
    """A compiled template whose loops are counted, so that it ends."""

    def __init__(self, source: str) -> None:
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        given: dict[str, Any] = {
            "raise_exception": _refuse,
            "strftime_now": _date,
            "namespace": _Namespace,
            "dict": _new_dict,
        }
        environment.filters["tojson"] = _to_json
        environment.globals.pop("lipsum", None)
        environment.globals.update(given)
        self._step = f"step_{secrets.token_hex(8)}"  # a name the template cannot know, so it cannot replace it
        tree = environment.parse(source)
        for loop in tree.find_all(nodes.For):
            call = nodes.Call(nodes.Name(self._step, "load"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(call).set_lineno(loop.lineno))
        code = environment.compile(tree, filename="<chat template>")
        self._template = jinja2.Template.from_code(environment, code, environment.make_globals(None))

    def write(self, values: Mapping[str, Any], *, longest: int, rounds: int) -> str:
        """What the template writes: at most `longest` characters, in at most `rounds` rounds of all loops together.

        Raises:
            jinja2.TemplateError: it raises one, or goes beyond what a template may do.
        """
        steps = itertools.count()

        def step() -> None:
            if next(steps) > rounds:
                raise SecurityError("it goes round without end")

        pieces: list[str] = []
        length = 0
        for piece in self._template.generate({**values, self._step: step}):
            length += len(piece)
            if length > longest:
                raise SecurityError("it writes without end")
            pieces.append(piece)
        return "".join(pieces)
