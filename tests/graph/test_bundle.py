"""`@bundle`: calls as operations, errors as records, trainable code."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import anyio
import pytest

import agentopt.graph as ao
from agentopt.errors import UserError
from agentopt.graph._bundle import BundleInfo

LIMIT = 10


@ao.bundle
def scale(x: Any, factor: Any = 2, *more: Any, offset: Any = 0, **named: Any) -> Any:
    """Multiply and shift.

    A second paragraph that is not part of the description.
    """
    return x * factor + sum(more) + offset + sum(named.values())


@ao.bundle
def inverse(x: Any) -> Any:
    return 1 / x


@ao.bundle
def outer(x: Any) -> Any:
    return inverse(x) + 1


def last(node: Any) -> ao.OpRecord:
    """The record behind a Node."""
    trace = node.trace
    return trace.ops[trace.output_id]


def test_inputs_follow_the_signature_with_defaults_and_starred_arguments() -> None:
    x = ao.node(1, name="x")
    record = last(scale(x))
    assert (record.op, record.inputs, record.output) == ("scale", {"x": 1, "factor": 2, "offset": 0}, 2)
    record = last(scale(x, 3, 4, ao.node(5, name="five"), offset=6, extra=ao.node(7, name="seven")))
    assert record.inputs == {"x": 1, "factor": 3, "more_0": 4, "more_1": 5, "offset": 6, "extra": 7}
    assert set(record.sources) == {"x", "more_1", "extra"}
    assert scale(x).description == "Multiply and shift."


def test_a_call_gives_a_node_only_when_something_is_traced() -> None:
    assert scale(1) == 2 and type(scale(1)) is int
    assert isinstance(scale(ao.node(1)), ao.Node)
    assert isinstance(scale(1, offset=ao.node(1)), ao.Node)
    assert last(ao.bundle(lambda items: len(items))([ao.node(1, name="one"), 2])).inputs == {"items": [1, 2]}
    with ao.record():
        assert isinstance(scale(1), ao.Node)
    with ao.stop_tracing():
        result = scale(ao.node(1))
    assert type(result) is int


def test_wrong_arguments_are_a_type_error() -> None:
    with pytest.raises(TypeError):
        scale(ao.node(1), 2, x=3)


def test_inline_decoration_names_and_recursion() -> None:
    @ao.bundle(name="dotted.name")  # a comment on the decorator's line
    def fact(n: int) -> int:
        return 1 if n == 0 else n * fact(n - 1)

    doubled = ao.bundle(description="twice")(lambda x: 2 * x)
    node = fact(ao.node(5))
    assert (node.value, last(node).op) == (120, "dotted.name")
    assert (doubled(ao.node(4)).value, doubled(ao.node(4)).description) == (8, "twice")
    assert len(node.trace.find("dotted.name")) == 6  # the calls inside are recorded in the outer one


def test_a_nested_call_is_one_parent_of_the_outer_one() -> None:
    record = last(outer(ao.node(2, name="x")))
    assert [kind for _, kind in record.parents] == ["data", "nested"]
    trace = outer(ao.node(2)).trace
    assert trace.find("inverse")[0].parent_op == trace.output_id


def test_zero_input_functions_are_operations_in_a_recording() -> None:
    @ao.bundle
    def constant() -> int:
        return 4

    with ao.record() as recording:
        result = constant()
    assert [(op.op, op.output) for op in recording.trace.ops] == [("constant", 4)]
    assert result.value == 4


def test_methods_static_and_class_methods() -> None:
    class Box:
        def __init__(self, size: int) -> None:
            self.size = size

        @ao.bundle
        def grow(self, by: Any) -> int:
            return self.size + by

        @ao.bundle
        @staticmethod
        def plain(x: Any) -> Any:
            return x

        @classmethod
        @ao.bundle
        def make(cls, x: Any) -> Any:
            return cls(x).size

    one, two = Box(1).grow(ao.node(1)), Box(2).grow(ao.node(1))
    assert (one.value, two.value) == (2, 3)
    assert isinstance(last(one).inputs["self"], ao.Reference)
    assert Box.plain(ao.node(1)).value == 1
    assert Box.make(ao.node(5)).value == 5


def test_a_partial_of_a_bundle_is_traced_too() -> None:
    assert functools.partial(scale, factor=5)(ao.node(2)).value == 10


def test_d2_external_reads_inside_a_function_are_edges() -> None:
    threshold = ao.parameter(3, name="threshold")
    other = ao.node(5, name="other")

    @ao.bundle
    def above(x: int) -> bool:
        if bool(other == 6):  # pyright: ignore[reportUnnecessaryComparison]
            return False
        return x > threshold.value

    result = above(ao.node(10))
    assert result.value is True
    assert result.backward("fb").keys() == {"threshold"}
    assert {"other", "threshold"} <= {op.op for op in result.trace.ops}


def test_a_returned_node_or_container_of_nodes_is_a_parent() -> None:
    p = ao.parameter(3, name="p")

    @ao.bundle
    def pair(x: int) -> Any:
        return [p, x]

    result = pair(ao.node(1))
    assert result.value == [3, 1]
    assert result.backward("fb").keys() == {"p"}


def test_d3_every_record_keeps_its_own_inputs() -> None:
    @ao.bundle
    def keep(x: Any, **named: Any) -> Any:
        return x

    calls = [keep(ao.node(place), tag=place) for place in range(5)]
    assert [last(call).inputs for call in calls] == [{"x": place, "tag": place} for place in range(5)]


def test_d10_in_place_mutation_inside_a_function_does_not_change_the_recorded_input() -> None:
    @ao.bundle
    def push(items: list[Any], table: dict[str, Any]) -> list[Any]:
        items.append(9)
        table["inner"].append(9)
        return items

    plain: dict[str, Any] = {"inner": [1]}
    items = ao.node([1, 2])
    result = push(items, plain)
    assert result.value == [1, 2, 9]
    assert last(result).inputs == {"items": [1, 2], "table": {"inner": [1]}}
    assert items.value == [1, 2]
    assert plain == {"inner": [1, 9]}  # a plain argument is the caller's own object, as in any call
    result.value.append(10)
    assert last(result).output == [1, 2, 9, 10] and result.trace.find("push")[0].output == [1, 2, 9]


# --- errors


@pytest.mark.parametrize("error", [ValueError(), AssertionError(), KeyError(), StopIteration(), Exception()])
def test_d1_an_exception_without_arguments_is_a_record(error: Exception) -> None:
    @ao.bundle
    def fails(x: Any) -> Any:
        raise error

    with pytest.raises(ao.ExecutionError) as caught:
        fails(ao.node(1))
    record = caught.value.record
    assert (record.type, record.message, record.op) == (type(error).__name__, "", "fails")
    assert record.source_line == "raise error"
    assert caught.value.node.trace.error == record or caught.value.node.trace.error is not None


def test_d1_an_exception_whose_text_cannot_be_made_is_a_record() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    @ao.bundle
    def fails(x: Any) -> Any:
        raise Broken

    with pytest.raises(ao.ExecutionError) as caught:
        fails(ao.node(1))
    assert "cannot be shown" in caught.value.record.message


def test_d2_an_error_inside_a_nested_call_keeps_op_line_and_inputs_and_reaches_every_parameter() -> None:
    p = ao.parameter(0, name="p")
    q = ao.parameter(5, name="q")

    @ao.bundle
    def outermost(x: Any, y: Any) -> Any:
        return outer(x) * y

    with pytest.raises(ZeroDivisionError) as caught:
        outermost(p * 3, q)
    error = caught.value
    assert isinstance(error, ao.ExecutionError)
    assert (error.record.op, error.record.source_line, error.record.inputs) == (
        "inverse",
        "return 1 / x",
        (("x", "0"),),
    )
    assert isinstance(error.original, ZeroDivisionError)
    trace = error.node.trace
    assert trace.error is not None
    assert trace.ops[trace.error.op_id or 0].op == "inverse"
    assert [op.op for op in trace.ops if op.error is not None] == ["inverse", "outer", "outermost"]
    assert error.node.backward(error.feedback).keys() == {"p", "q"}
    assert "inverse failed: ZeroDivisionError" in error.feedback


def test_the_cause_of_an_exception_is_told_in_the_outer_record() -> None:
    @ao.bundle
    def wraps(x: Any) -> Any:
        try:
            return inverse(x)
        except ZeroDivisionError as error:
            raise RuntimeError("no result") from error

    with pytest.raises(RuntimeError) as caught:
        wraps(ao.node(0))
    assert isinstance(caught.value, ao.ExecutionError)
    assert caught.value.record.op == "wraps"
    assert "inverse failed: ZeroDivisionError" in caught.value.record.text


def test_an_exception_object_raised_again_later_belongs_to_the_later_op() -> None:
    error = ValueError("shared")

    @ao.bundle
    def one(x: Any) -> Any:
        raise error

    @ao.bundle
    def two(x: Any) -> Any:
        raise error

    failed: list[str] = []
    for fn in (one, two):
        with pytest.raises(ValueError, match="shared") as caught:
            fn(ao.node(1))
        assert isinstance(caught.value, ao.ExecutionError)
        failed.append(caught.value.record.op)
    assert failed == ["one", "two"]


def test_with_catch_errors_off_the_exception_escapes_as_it_is_but_is_recorded() -> None:
    @ao.bundle(catch_errors=False)
    def fails(x: Any) -> Any:
        raise LookupError("gone")

    with ao.record() as recording, pytest.raises(LookupError) as caught:
        fails(ao.node(1))
    assert not isinstance(caught.value, ao.ExecutionError)
    error = recording.trace.find("fails")[0].error
    assert error is not None and error.message == "gone"


def test_a_handled_error_leaves_the_run_without_error() -> None:
    with ao.record() as recording:
        try:
            inverse(ao.node(0))
        except ZeroDivisionError:
            scale(1)
    assert recording.trace.error is None
    assert [op.op for op in recording.trace.ops if op.error] == ["inverse"]


def test_exceptions_that_do_not_combine_are_plain_execution_errors() -> None:
    @ao.bundle
    def decode(x: bytes) -> str:
        return x.decode("utf-8")

    @ao.bundle
    def opens(x: str) -> Any:
        return open(x, encoding="utf-8")

    with pytest.raises(ao.ExecutionError) as caught:
        decode(ao.node(b"\xff"))
    assert caught.value.record.type == "UnicodeDecodeError"
    with pytest.raises(FileNotFoundError) as missing:
        opens(ao.node("no such file"))
    assert missing.value.filename == "no such file" or isinstance(missing.value, ao.ExecutionError)


# --- async and generators


@ao.bundle
async def later(x: Any, seconds: float = 0.0) -> Any:
    await anyio.sleep(seconds)
    return x + 1


@pytest.mark.anyio
async def test_concurrent_async_calls_are_nodes_with_their_own_parents() -> None:
    nodes = [ao.node(place, name=f"n{place}") for place in range(3)]
    results: dict[int, Any] = {}

    async def run(place: int) -> None:
        results[place] = await later(nodes[place], 0.01)

    with ao.record() as recording:
        async with anyio.create_task_group() as group:
            for place in range(3):
                group.start_soon(run, place)
    assert {place: result.value for place, result in results.items()} == {0: 1, 1: 2, 2: 3}
    for place, result in results.items():
        record = last(result)
        assert list(record.sources) == ["x"]
        assert result.trace.ops[record.sources["x"]].op == f"n{place}"
    assert len(recording.trace.find("later")) == 3
    assert inspect.iscoroutinefunction(later)


@pytest.mark.anyio
async def test_an_error_in_one_task_is_that_tasks_record_only() -> None:
    @ao.bundle
    async def fails(x: int) -> int:
        await anyio.sleep(0)
        if x == 1:
            raise ValueError("one")
        return x

    caught: list[ao.ExecutionError] = []

    async def run(place: int) -> None:
        try:
            await fails(ao.node(place))
        except ValueError as error:
            assert isinstance(error, ao.ExecutionError)
            caught.append(error)

    with ao.record() as recording:
        async with anyio.create_task_group() as group:
            for place in range(3):
                group.start_soon(run, place)
    assert [error.record.inputs for error in caught] == [(("x", "1"),)]
    assert [op.error is not None for op in recording.trace.find("fails")].count(True) == 1


@pytest.mark.anyio
async def test_a_cancelled_call_is_recorded_and_stays_cancelled() -> None:
    with ao.record() as recording, anyio.move_on_after(0.01) as scope:
        await later(ao.node(1), 60)
    assert scope.cancelled_caught
    error = recording.trace.find("later")[0].error
    assert error is not None and "Cancelled" in error.type


def test_d8_a_generator_yields_nodes_one_by_one() -> None:
    step = ao.parameter(2, name="step")
    produced: list[int] = []

    @ao.bundle
    def count(n: int) -> Iterator[int]:
        for place in range(n):
            produced.append(place)
            yield place * step.value
        return "done"

    stream = count(ao.node(3, name="n"))
    first = next(stream)
    assert (first.value, produced) == (0, [0])
    rest = list(stream)
    assert [node.value for node in rest] == [2, 4]
    assert all(node.backward("fb").keys() == {"step"} for node in [first, *rest])
    assert [op.op for op in rest[-1].trace.ops].count("count") == 3
    assert list(count(2)) == [0, 2]
    assert inspect.isgeneratorfunction(count)


def test_d8_a_generator_takes_what_is_sent_and_thrown_and_is_closed() -> None:
    events: list[Any] = []

    @ao.bundle
    def echo(x: Any) -> Iterator[Any]:
        try:
            while True:
                try:
                    events.append((yield x))
                except KeyError:
                    events.append("KeyError")
        finally:
            events.append("closed")

    stream: Any = echo(ao.node(1))
    next(stream)
    stream.send("a")
    stream.throw(KeyError())
    stream.close()
    assert events == ["a", "KeyError", "closed"]


def test_d8_an_error_in_a_generator_is_a_record_behind_the_items_before() -> None:
    p = ao.parameter(1, name="p")

    @ao.bundle
    def breaks(x: Any) -> Iterator[Any]:
        yield x + p.value
        raise ValueError("after one")

    stream = breaks(ao.node(1))
    next(stream)
    with pytest.raises(ValueError, match="after one") as caught:
        next(stream)
    assert isinstance(caught.value, ao.ExecutionError)
    assert caught.value.node.backward("fb").keys() == {"p"}


@pytest.mark.anyio
async def test_d8_an_async_generator_yields_nodes() -> None:
    @ao.bundle
    async def stream(x: int) -> AsyncIterator[int]:
        for place in range(x):
            await anyio.sleep(0)
            yield place

    values = [item async for item in stream(ao.node(3))]
    assert [item.value for item in values] == [0, 1, 2]
    assert len(values[-1].trace.find("stream")) == 3
    assert [item async for item in stream(2)] == [0, 1]
    assert inspect.isasyncgenfunction(stream)


# --- trainable code


class InProcessRunner:
    """A CodeRunner for tests: compiles and calls here."""

    def __init__(self) -> None:
        self.functions: dict[str, Any] = {}

    def compile(self, source: str, name: str, uses: Sequence[Any] = ()) -> str:
        space: dict[str, Any] = {used.name: used.content for used in uses if used.kind == "value"}
        exec(compile(source, "<changed>", "exec"), space)
        self.functions[source] = space[name]
        return source

    def call(self, function_id: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Any:
        return self.functions[function_id](*args, **kwargs)

    async def acall(self, function_id: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Any:
        return await self.functions[function_id](*args, **kwargs)


@pytest.fixture
def runner() -> Iterator[InProcessRunner]:
    with ao.use_code_runner(InProcessRunner()) as made:
        assert isinstance(made, InProcessRunner)
        yield made


def code_of(fn: Any) -> ao.Parameter:
    """The code parameter of a bundled function."""
    info: BundleInfo = fn.bundle
    assert info.code is not None
    return info.code.parameter


def test_trainable_code_is_a_parameter_and_an_edit_takes_effect_at_the_next_call(runner: InProcessRunner) -> None:
    # a comment above
    @ao.bundle(trainable=True, uses=("LIMIT",))  # and one beside
    def policy(x: int) -> int:
        """Decide."""
        return x + LIMIT

    result = policy(1)
    assert result.value == 11
    found = result.backward("too large")
    assert found.keys() == {"policy.code"}
    code = found["policy.code"].parameters["policy.code"]
    assert code.kind == "code"
    assert code.value.startswith("def policy(x: int) -> int:")
    assert last(result).sources == {} and last(result).parents[-1][1] == "parameter"
    with ao.Candidate({"policy.code": "def policy(x: int) -> int:\n    return x - LIMIT"}).active():
        changed = policy(1)
    assert (changed.value, policy(1).value) == (-9, 11)
    assert changed.trace.parameters["policy.code"].value.endswith("x - LIMIT")


@pytest.mark.anyio
async def test_trainable_async_code(runner: InProcessRunner) -> None:
    @ao.bundle(trainable=True)
    async def policy(x: int) -> int:
        return x

    with ao.Candidate({"policy.code": "async def policy(x):\n    return x * 2"}).active():
        assert (await policy(4)).value == 8
    assert (await policy(4)).value == 4


def test_a_changed_method_sees_the_instances_public_data(runner: InProcessRunner) -> None:
    class Agent:
        def __init__(self) -> None:
            self.bonus = 5
            self.runner = object()
            self.style = ao.node("short")

        @ao.bundle(trainable=True)
        def act(self, x: int, y: int = 1) -> Any:
            return x + y

    agent = Agent()
    assert agent.act(1).value == 2
    name = code_of(Agent.act).name
    assert name == "Agent.act.code"
    source = "def act(self, x, y=1):\n    return [x + y + self.bonus, self.style, hasattr(self, 'runner')]"
    with ao.Candidate({name: source}).active():
        assert agent.act(1, y=2).value == [8, "short", False]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("def policy(x:\n  return 1", "SyntaxError|never closed|invalid|syntax"),
        ("def other(x):\n    return 1", "other"),
        ("x = 1", "policy"),
        ("def policy(x, y):\n    return 1", "signature"),
        ("def policy(x):\n    yield 1", "yield"),
        ("", "policy"),
    ],
)
def test_d9_code_that_does_not_define_the_function_is_an_error_record_of_the_code(
    runner: InProcessRunner, source: str, problem: str
) -> None:
    @ao.bundle(trainable=True)
    def policy(x: int) -> int:
        return x

    with ao.Candidate({"policy.code": source}).active(), pytest.raises(ao.ExecutionError, match=problem) as caught:
        policy(1)
    assert caught.value.record.message
    assert caught.value.node.backward("fb").keys() == {"policy.code"}
    with pytest.raises(UserError):
        code_of(policy).value = source


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("return 1 / 0", ZeroDivisionError),
        ("a, b = None", TypeError),
        ("return [undefined for _ in range(1)]", ao.ExecutionError),
        ("return (lambda: x.missing)()", AttributeError),
        ("def inner():\n        raise KeyError('k')\n    return inner()", KeyError),
    ],
)
def test_runtime_errors_in_changed_code_lead_to_code_and_inputs(
    runner: InProcessRunner, body: str, error: type[Exception]
) -> None:
    @ao.bundle(trainable=True)
    def policy(x: int) -> int:
        return x

    p = ao.parameter(3, name="p")
    with ao.Candidate({"policy.code": f"def policy(x):\n    {body}"}).active(), pytest.raises(error) as caught:
        policy(p + 1)
    assert isinstance(caught.value, ao.ExecutionError)
    assert caught.value.node.backward("fb").keys() == {"policy.code", "p"}


def test_an_early_failure_in_a_chain_of_trainable_methods_reaches_those_that_ran() -> None:
    class Chain(ao.Module):
        @ao.bundle(trainable=True)
        def one(self, x: int) -> int:
            return x + 1

        @ao.bundle(trainable=True)
        def two(self, x: int) -> int:
            return x // 0

        @ao.bundle(trainable=True)
        def three(self, x: int) -> int:
            return x

    chain = Chain()
    with pytest.raises(ZeroDivisionError) as caught:
        chain.three(chain.two(chain.one(1)))
    assert isinstance(caught.value, ao.ExecutionError)
    found = caught.value.node.backward(caught.value.feedback)
    assert found.keys() == {"Chain.one.code", "Chain.two.code"}  # `three` never ran: nothing of it is in the run
    assert set(chain.parameters()) == {"Chain.one.code", "Chain.two.code", "Chain.three.code"}
    assert "two failed: ZeroDivisionError" in found["Chain.one.code"].feedback[0].text


def test_what_cannot_be_trainable_is_an_error_at_decoration() -> None:
    with pytest.raises(UserError, match="generator"):

        @ao.bundle(trainable=True)
        def stream(x: int) -> Iterator[int]:
            yield x

    with pytest.raises(UserError):
        ao.bundle(trainable=True)(lambda x: x)
    with pytest.raises(UserError, match="no_such_name"):

        @ao.bundle(trainable=True, uses=("no_such_name",))
        def policy(x: int) -> int:
            return x


def test_tracing_off_still_runs_the_active_code(runner: InProcessRunner) -> None:
    @ao.bundle(trainable=True)
    def policy(x: int) -> int:
        return x

    with ao.stop_tracing(), ao.Candidate({"policy.code": "def policy(x):\n    return -x"}).active():
        result = policy(ao.node(3))
    assert (type(result), result) == (int, -3)
