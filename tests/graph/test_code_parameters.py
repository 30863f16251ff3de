"""Code as a parameter: what may be changed, what it may see, and where it runs."""

from __future__ import annotations

import dataclasses
import json
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from agentopt import graph
from agentopt.errors import RunError, UserError
from agentopt.graph import Candidate, CodeError, IllegalEdit, SetCode, Used, apply_edits

RATES = {"eur": 1.5}
OPEN_FILE = object()


def helper(x: int) -> int:
    return x + 100


@graph.register_dataclass
@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


@dataclasses.dataclass
class Unregistered:
    x: int


class HereRunner:
    """A runner in this process, to see what is asked of it; the real one is tested in tests/sandbox."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[Any], dict[str, Any]]] = []
        self.functions: dict[str, Any] = {}

    def compile(self, source: str, name: str, uses: Sequence[Used] = ()) -> str:
        namespace: dict[str, Any] = {used.name: used.content for used in uses if used.kind == "value"}
        exec(source, namespace)
        self.functions[source] = namespace[name]
        return source

    def call(self, function_id: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Any:
        self.calls.append((function_id, list(args), dict(kwargs)))
        return self.functions[function_id](*args, **kwargs)

    async def acall(self, function_id: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Any:
        return await self.functions[function_id](*args, **kwargs)


@pytest.fixture
def runner() -> Iterator[HereRunner]:
    with graph.use_code_runner(HereRunner()) as here:
        assert isinstance(here, HereRunner)
        yield here


def test_original_body_runs_in_this_process_and_a_changed_one_through_the_runner(runner: HereRunner) -> None:
    @graph.tool
    def price(amount: int, rate: float = RATES["eur"]) -> float:
        assert OPEN_FILE is not None
        return amount * rate

    assert price(2) == 3.0
    changed = "def price(amount, rate=None):\n    return amount * rate + 1"
    with Candidate({"price.code": price.agentopt.code.default}).active():  # type: ignore[union-attr]
        assert price(2) == 3.0
    assert runner.calls == []
    with graph.record() as recording, Candidate({"price.code": changed}).active():
        assert price(2) == 4.0
        assert price(amount=2, rate=10) == 21
    assert [(args, kwargs) for _, args, kwargs in runner.calls] == [([2, 1.5], {}), ([2, 10], {})]
    op = next(op for op in recording.trace.ops if op.op == "price")
    assert (recording.trace.parameters["price.code"].value, op.output) == (changed, 4.0)
    assert any(kind == "parameter" for _, kind in op.parents)


@pytest.mark.anyio
async def test_changed_async_tool_is_awaited(runner: HereRunner) -> None:
    @graph.tool
    async def price(amount: int) -> int:
        return amount

    with Candidate({"price.code": "async def price(amount):\n    return amount + 1"}).active():
        assert await price(1) == 2


def test_changed_code_without_a_runner_is_a_clear_error() -> None:
    @graph.tool
    def price(amount: int) -> int:
        return amount

    graph.set_default_code_runner(None)
    changed = Candidate({"price.code": "def price(amount):\n    return 2"})
    with changed.active(), pytest.raises(RunError, match="needs a sandbox"):
        price(1)


def test_default_runner_is_made_once_at_the_first_changed_call() -> None:
    made: list[HereRunner] = []

    def make() -> HereRunner:
        made.append(HereRunner())
        return made[-1]

    @graph.tool
    def price(amount: int) -> int:
        return amount

    graph.set_default_code_runner(make)
    try:
        price(1)
        assert made == []
        with Candidate({"price.code": "def price(amount):\n    return 2"}).active():
            assert (price(1), price(1)) == (2, 2)
        assert len(made) == 1
    finally:
        graph.set_default_code_runner(None)


def test_failing_changed_tool_is_an_error_record_and_keeps_its_exception_class() -> None:
    from agentopt.sandbox import ProcessRunner

    @graph.tool
    def price(amount: int) -> int:
        return amount

    changed = Candidate({"price.code": "def price(amount):\n    raise ValueError('too low')"})
    with (
        ProcessRunner() as real,
        graph.use_code_runner(real),
        changed.active(),
        graph.record() as recording,
        pytest.raises(ValueError, match="too low") as caught,
    ):
        price(1)
    assert isinstance(caught.value, CodeError)
    op = next(op for op in recording.trace.ops if op.op == "price")
    assert op.error is not None
    assert "line 2 of the changed code" in op.error.message


def test_two_candidates_with_different_code_run_at_the_same_time() -> None:
    from agentopt.sandbox import RunnerPool

    @graph.tool
    def price(amount: int) -> int:
        return amount

    def call(number: int) -> list[int]:
        code = f"def price(amount):\n    return amount + {number}"
        with Candidate({"price.code": code}).active():
            return [price(n) for n in range(20)]

    with RunnerPool(size=2) as pool, graph.use_code_runner(pool), graph.ThreadPoolExecutor(4) as threads:
        results = list(threads.map(call, [100, 200, 300, 400]))
    assert results == [[n + base for n in range(20)] for base in (100, 200, 300, 400)]


# --- decoration ------------------------------------------------------------------------------------------------------


def test_uses_may_name_modules_values_functions_and_dataclasses() -> None:
    limit = 5

    @graph.tool(uses=("RATES", "limit", helper, math, Point, "json"))
    def price(amount: int) -> float:
        return amount * RATES["eur"] + limit + json.loads("1")

    unit = price.agentopt.unit
    assert unit is not None
    assert [(used.name, used.kind) for used in unit.uses] == [
        ("RATES", "value"),
        ("limit", "value"),
        ("helper", "function"),
        ("math", "module"),
        ("Point", "dataclass"),
        ("json", "module"),
    ]
    from agentopt.sandbox import ProcessRunner

    source = (
        "def price(amount):\n    return [helper(amount), math.floor(RATES['eur']), Point(limit, y=2), json.dumps({})]"
    )
    assert unit.problems(source) == []
    with ProcessRunner() as real, graph.use_code_runner(real), Candidate({"price.code": source}).active():
        assert price(1) == [101, 1, Point(5, 2), "{}"]


def takes_connection(db: sqlite3.Connection) -> int:
    return 1


def returns_unregistered(x: int) -> Unregistered:
    return Unregistered(x)


def takes_nested(x: dict[str, list[Unregistered | None]]) -> int:
    return 1


def generator(n: int):
    yield n


@pytest.mark.parametrize(
    ("fn", "uses", "words"),
    [
        (takes_connection, ("RATES",), "takes_connection.*argument 'db' cannot cross.*Connection"),
        (returns_unregistered, ("RATES",), "its result cannot cross.*not registered; add @ao.register_dataclass"),
        (takes_nested, ("RATES",), "argument 'x' cannot cross.*Unregistered"),
        (helper, ("OPEN_FILE",), "uses 'OPEN_FILE'.*object.*cannot cross"),
        (helper, ("MISSING",), "uses names 'MISSING', which is not defined there yet"),
        (helper, (Unregistered,), "not registered"),
        (helper, ({"a": 1},), "without a name"),
        (generator, ("RATES",), "generator cannot be tuned"),
    ],
)
def test_what_cannot_cross_is_one_error_at_decoration(fn, uses, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        graph.tool(uses=uses)(fn)
    assert "test_code_parameters.py:" in str(caught.value)


unnamed = lambda x: x  # noqa: E731


@pytest.mark.parametrize("fn", [takes_connection, generator, unnamed])
def test_tool_that_names_no_uses_still_works_and_says_why_its_code_is_not_tunable(fn) -> None:
    wrapped = graph.tool(name="t")(fn)
    assert list(graph.declared_parameters()) == ["t.description"]
    assert wrapped.agentopt.code is None
    assert wrapped.agentopt.code_problem


def test_dataclass_with_a_field_that_cannot_cross_is_refused() -> None:
    @dataclasses.dataclass
    class Holder:
        db: sqlite3.Connection

    with pytest.raises(UserError, match=r"Holder\.db cannot cross"):
        graph.register_dataclass(Holder)
    with pytest.raises(UserError, match="not a dataclass"):
        graph.register_dataclass(int)


# --- edits -----------------------------------------------------------------------------------------------------------


def tuned() -> dict[str, graph.ParameterSpec]:
    @graph.tool(uses=("RATES",))
    def price(amount: int, *, rate: float = 1.0) -> float:
        """Give the price."""
        return amount * rate

    return graph.declared_parameters()


@pytest.mark.parametrize(
    "source",
    [
        "def price(amount, *, rate=2):\n    return amount",
        "def price(amount: 'Anything', *, rate: Missing = NOT_HERE) -> Nothing:\n    return RATES[str(amount)]",
        "import math\nfrom collections import Counter\n\ndef helper(x):\n    return math.floor(x)\n\n"
        "def price(amount, *, rate):\n    return helper(amount) + len(Counter('aa'))",
        "def price(amount, *, rate=1.0):\n    try:\n        return [y for y in range(amount)]\n"
        "    except ValueError as error:\n        return str(error)",
        "LIMIT = 3\ndef price(amount, *, rate=1.0):\n    def inner():\n"
        "        nonlocal amount\n        amount += LIMIT\n"
        "    inner()\n    return (lambda z: z * amount)(2)",
    ],
)
def test_legal_code_is_accepted(source: str) -> None:
    specs = tuned()
    assert apply_edits(Candidate(), [SetCode("price.code", source)], specs)["price.code"] == source


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "expected source code"),
        ("def price(amount:\n", "line 1:"),
        ("x = 1", "must define the function 'price'; it defines no function"),
        ("def prise(amount, *, rate=1.0): return 1", "must define the function 'price'; it defines prise"),
        ("def price(amount): return 1", r"the signature must stay price\(amount"),
        ("def price(amount, rate=1.0): return 1", "the signature must stay"),
        ("async def price(amount, *, rate=1.0): return 1", "must stay a plain def"),
        ("def price(amount, *, rate=1.0): yield 1", "it yields"),
        ("def price(amount, *, rate=1.0):\n    import os\n    return 1", "line 2: imports 'os', which is not allowed"),
        ("from os import path\ndef price(amount, *, rate=1.0): return 1", "imports 'os'"),
        (
            "def price(amount, *, rate=1.0): return OPEN_FILE",
            "uses 'OPEN_FILE', which changed code cannot see; visible: RATES",
        ),
        ("def price(amount, *, rate=1.0):\n    return [helper(y) for y in range(3)]", "uses 'helper'"),
        ("\x00", "not readable|null|source code|line"),
    ],
)
def test_illegal_code_is_refused_with_the_reason(source: str, words: str) -> None:
    specs = tuned()
    with pytest.raises(IllegalEdit, match=words):
        apply_edits(Candidate(), [SetCode("price.code", source)], specs)


def test_default_code_is_legal_when_it_uses_what_it_names() -> None:
    specs = tuned()
    spec = specs["price.code"]
    assert spec.problems(spec.default) == []
    assert spec.frozen
    assert "RATES" in spec.constraint_text
