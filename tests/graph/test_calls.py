"""Call grain: plain functions outside a recording, one record a call inside."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import inspect
import threading

import anyio
import pytest

from agentopt import graph
from agentopt.errors import UserError
from agentopt.graph import Candidate, RolloutScope


def ops(recording: graph.Recording, kind: str | None = None) -> list[graph.OpRecord]:
    return [
        op for op in recording.trace.ops if op.kind not in ("parameter", "root") and (kind is None or op.kind == kind)
    ]


def one(recording: graph.Recording, name: str) -> graph.OpRecord:
    (found,) = [op for op in recording.trace.ops if op.op == name]
    return found


# --- transparency ----------------------------------------------------------------------------------------------------


def test_outside_a_recording_decorated_functions_are_the_plain_functions() -> None:
    def gen():
        yield 1

    async def agen():
        yield 1

    marker = object()
    assert graph.step(lambda_like)(marker) is marker
    assert inspect.isgenerator(graph.step(gen)())
    assert inspect.isasyncgen(graph.agent(agen)())
    wrapped = graph.tool(lambda_like)
    assert wrapped.__name__ == "lambda_like"
    assert wrapped.__wrapped__ is lambda_like
    assert inspect.signature(wrapped) == inspect.signature(lambda_like)


def lambda_like(value):
    """Give it back."""
    return value


def test_native_errors_and_tracebacks_stay() -> None:
    @graph.step
    def f(x: int) -> int:
        return x

    with pytest.raises(TypeError, match="unexpected keyword"):
        f(y=1)  # type: ignore[call-arg]
    with graph.record() as recording, pytest.raises(TypeError, match="missing"):
        f()  # type: ignore[call-arg]
    error = one(recording, "test_native_errors_and_tracebacks_stay.<locals>.f".rpartition(".")[2]).error
    assert error is not None
    assert error.type == "TypeError"


@pytest.mark.anyio
async def test_coroutine_functions_stay_coroutine_functions() -> None:
    @graph.agent
    async def f(x: int) -> int:
        await asyncio.sleep(0)
        return x + 1

    assert inspect.iscoroutinefunction(f)
    assert await f(1) == 2


# --- records ---------------------------------------------------------------------------------------------------------


def test_inputs_follow_the_signature() -> None:
    @graph.step
    def f(a, b=2, *args, c=3, **more):
        return a

    @graph.step
    def g(a: int, b: int | str = "default"):
        return a

    with graph.record() as recording:
        f(1, 5, 6, 7, d=8)
        f(1)
        g(1)
        g(b=1, a=2)
    assert [op.inputs for op in ops(recording)] == [
        {"a": 1, "b": 5, "args": (6, 7), "c": 3, "more": {"d": 8}},
        {"a": 1, "b": 2, "args": (), "c": 3, "more": {}},
        {"a": 1, "b": "default"},
        {"a": 2, "b": 1},
    ]


def test_methods_are_recorded_without_self_and_named_by_class() -> None:
    class Agent:
        def __init__(self, factor: int) -> None:
            self.factor = factor

        @graph.step
        def scale(self, x: int) -> int:
            return self.factor * x

        @staticmethod
        @graph.step
        def twice(x: int) -> int:
            return 2 * x

        @classmethod
        @graph.step
        def make(cls, factor: int) -> Agent:
            return cls(factor)

        @graph.tool
        def look(self, key: str) -> str:
            return key

    with graph.record() as recording:
        a, b = Agent.make(2), Agent(3)
        assert (a.scale(4), b.scale(4), Agent.twice(5), b.look("k")) == (8, 12, 10, "k")
    assert [(op.op, op.inputs) for op in ops(recording)] == [
        ("Agent.make", {"factor": 2}),
        ("Agent.scale", {"x": 4}),
        ("Agent.scale", {"x": 4}),
        ("Agent.twice", {"x": 5}),
        ("Agent.look", {"key": "k"}),
    ]
    info = graph.step_info(a.scale)
    assert info is not None
    assert (info.name, info.kind) == ("Agent.scale", "step")


def test_nesting_kinds_and_names() -> None:
    @graph.tool(name="search")
    def find(q: str) -> str:
        """Search the web."""
        return q * 2

    @graph.step(name="think")
    def ponder(q: str) -> str:
        return find(q)

    @graph.agent
    def run(q: str) -> str:
        return ponder(q)

    with graph.record() as recording:
        assert run("long question") == "long questionlong question"
    trace = recording.trace
    by_id = {op.id: op for op in trace.ops}
    outer = one(recording, "run")
    assert outer.kind == "agent"
    think = one(recording, "think")
    assert (think.id, "nested") in outer.parents
    assert by_id[one(recording, "search").parent_op or -1].op == "think"


def test_output_of_one_step_used_by_the_next_is_a_text_or_same_edge() -> None:
    @graph.step
    def make() -> dict:
        return {"k": 1}

    @graph.step
    def use(value) -> str:
        return "some long text"

    with graph.record() as recording:
        text = use(make())
        use(text)
    make_op, first, second = ops(recording)
    assert (make_op.id, "same") in first.parents
    assert (first.id, "text") in second.parents


def test_exception_is_recorded_with_its_place_and_raised_unchanged() -> None:
    @graph.step
    def inner(x: int) -> int:
        raise ValueError

    @graph.step
    def outer(x: int) -> int:
        return inner(x)

    with graph.record() as recording, pytest.raises(ValueError) as caught:
        outer(7)
    assert type(caught.value) is ValueError
    error = one(recording, "outer").error
    assert error is not None
    assert error.op == "inner"
    assert error.source_line == "raise ValueError"


@pytest.mark.anyio
async def test_concurrent_async_steps_keep_their_own_records() -> None:
    p = graph.prompt("x", name="p")

    @graph.step
    async def child(n: int) -> int:
        await asyncio.sleep(0.001 * (3 - n))
        assert p.value == "x"
        return n

    @graph.step
    async def parent(n: int) -> int:
        return await child(n)

    with graph.record() as recording:
        async with anyio.create_task_group() as tasks:
            for n in range(3):
                tasks.start_soon(parent, n)
    trace = recording.trace
    by_id = {op.id: op for op in trace.ops}
    children = [op for op in trace.ops if op.op == "child"]
    assert len(children) == 3
    for op in children:
        assert by_id[op.parent_op or -1].inputs == op.inputs


@pytest.mark.anyio
async def test_cancelled_step_is_a_record_with_an_error() -> None:
    @graph.step
    async def slow() -> None:
        await asyncio.sleep(30)

    with graph.record() as recording:
        with anyio.move_on_after(0.01):
            await slow()
    error = one(recording, "slow").error
    assert error is not None
    assert error.type == "CancelledError"


def test_stop_tracing_leaves_calls_unrecorded() -> None:
    @graph.step
    def f(x: int) -> int:
        return x

    with graph.record() as recording:
        with graph.stop_tracing():
            f(1)
        f(2)
    assert [op.inputs for op in ops(recording)] == [{"x": 2}]


def test_recordings_in_threads_never_mix() -> None:
    @graph.step
    def f(x: int) -> int:
        return x

    found: dict[int, set[int]] = {}
    meet = threading.Barrier(4)

    def run(number: int) -> None:
        meet.wait()
        with graph.record() as recording:
            for _ in range(50):
                f(number)
        found[number] = {op.inputs["x"] for op in ops(recording)}
        assert len(ops(recording)) == 50

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: {number} for number in range(4)}


# --- generators ------------------------------------------------------------------------------------------------------


def test_generator_keeps_its_candidate_for_every_step_and_leaks_nothing_at_a_yield() -> None:
    p = graph.prompt("default", name="p")

    @graph.step
    def stream(n: int):
        for _ in range(n):
            yield p.value

    with Candidate({"p": "a"}).active():
        first = stream(3)
    with Candidate({"p": "b"}).active():
        second = stream(3)
        assert next(first) == "a"
        assert p.value == "b"
        assert next(second) == "b"
    assert next(first) == "a"
    assert p.value == "default"
    assert list(second) == ["b", "b"]
    assert list(first) == ["a"]


def test_generator_is_one_record_whose_output_is_its_items() -> None:
    p = graph.prompt("t", name="p")

    @graph.step
    def helper(i: int) -> str:
        return f"{p}{i}"

    @graph.step
    def stream(n: int):
        for i in range(n):
            yield helper(i)

    with graph.record() as recording:
        assert list(stream(3)) == ["t0", "t1", "t2"]
        outside = [op.op for op in ops(recording)]
    record = one(recording, "stream")
    assert outside.count("stream") == 1
    assert record.inputs == {"n": 3}
    assert record.output == ["t0", "t1", "t2"]
    assert [kind for _, kind in record.parents].count("nested") == 3
    assert all(op.parent_op == record.id for op in ops(recording) if op.op == "helper")


def test_generator_protocol_send_throw_return_and_close() -> None:
    events: list[str] = []

    @graph.step
    def echo():
        try:
            got = yield "ready"
            while True:
                try:
                    got = yield got
                except KeyError:
                    got = "caught"
        finally:
            events.append("closed")

    @graph.step
    def delegate():
        result = yield from counted()
        yield result

    @graph.step
    def counted():
        yield 1
        return "done"

    with graph.record() as recording:
        g = echo()
        assert next(g) == "ready"
        assert g.send("x") == "x"
        assert g.throw(KeyError("k")) == "caught"
        g.close()
        with pytest.raises(StopIteration):
            next(g)
        assert list(delegate()) == [1, "done"]
    assert events == ["closed"]
    assert one(recording, "echo").output == ["ready", "x", "caught"]
    assert one(recording, "echo").error is None
    assert one(recording, "counted").meta == {"returned": "done"}


def test_generator_that_fails_half_way_is_an_error_record() -> None:
    @graph.step
    def broken():
        yield 1
        raise LookupError("no more")

    with graph.record() as recording:
        g = broken()
        assert next(g) == 1
        with pytest.raises(LookupError):
            next(g)
    error = one(recording, "broken").error
    assert error is not None
    assert error.message == "no more"


def test_dropped_generator_leaves_a_finished_record() -> None:
    @graph.step
    def endless():
        while True:
            yield 1

    with graph.record() as recording:
        next(endless())
        gc.collect()
    assert one(recording, "endless").output == [1]


def test_generator_created_in_a_recording_and_consumed_in_another_thread() -> None:
    p = graph.prompt("default", name="p")

    @graph.step
    def stream():
        yield p.value

    with graph.record() as recording, Candidate({"p": "a"}).active():
        g = stream()
        result: list[str] = []
        thread = threading.Thread(target=lambda: result.extend(g))
        thread.start()
        thread.join()
    assert result == ["a"]
    assert one(recording, "stream").output == ["a"]


def test_plain_function_that_returns_a_generator_ends_its_record_with_it() -> None:
    @graph.step
    def lazy(n: int):
        return (i for i in range(n))

    with graph.record() as recording:
        assert list(lazy(3)) == [0, 1, 2]
    assert one(recording, "lazy").output == [0, 1, 2]


def test_consumer_variables_survive_a_generator_step() -> None:
    variable = contextvars.ContextVar("variable", default=0)

    @graph.step
    def stream():
        variable.set(99)
        yield 1
        assert variable.get() == 99
        yield 2

    with graph.record():
        for _ in stream():
            assert variable.get() == 0


def test_long_stream_keeps_a_thousand_items_and_the_count() -> None:
    @graph.step
    def many():
        yield from range(2500)

    with graph.record() as recording:
        assert sum(many()) == sum(range(2500))
    record = one(recording, "many")
    assert len(record.output) == 1000
    assert record.meta == {"items": 2500}


@pytest.mark.anyio
async def test_async_generator_keeps_its_candidate_and_is_one_record() -> None:
    p = graph.prompt("default", name="p")

    @graph.agent
    async def stream(n: int):
        for i in range(n):
            await asyncio.sleep(0)
            yield f"{p}{i}"

    with graph.record() as recording:
        with Candidate({"p": "a"}).active():
            g = stream(3)
        assert await g.__anext__() == "a0"
        assert p.value == "default"
        assert [item async for item in g] == ["a1", "a2"]
    assert one(recording, "stream").output == ["a0", "a1", "a2"]
    with Candidate({"p": "b"}).active():
        g = stream(1)
    assert [item async for item in g] == ["b0"]


@pytest.mark.anyio
async def test_async_generator_protocol_and_errors() -> None:
    events: list[str] = []

    @graph.step
    async def echo():
        try:
            got = yield "ready"
            while True:
                try:
                    got = yield got
                except KeyError:
                    got = "caught"
        finally:
            events.append("closed")

    @graph.step
    async def broken():
        yield 1
        raise LookupError("no more")

    with graph.record() as recording:
        g = echo()
        assert await g.__anext__() == "ready"
        assert await g.asend("x") == "x"
        assert await g.athrow(KeyError("k")) == "caught"
        await g.aclose()
        with pytest.raises(LookupError):
            async for _ in broken():
                pass
    assert events == ["closed"]
    assert one(recording, "echo").output == ["ready", "x", "caught"]
    error = one(recording, "broken").error
    assert error is not None
    assert error.type == "LookupError"


@pytest.mark.anyio
async def test_plain_function_that_returns_a_coroutine_ends_its_record_with_it() -> None:
    async def work(x: int) -> int:
        await asyncio.sleep(0)
        return x + 1

    @graph.step
    def start(x: int):
        return work(x)

    with graph.record() as recording:
        assert await start(1) == 2
    assert one(recording, "start").output == 2


# --- tools -----------------------------------------------------------------------------------------------------------


def test_tool_declares_description_and_code_frozen() -> None:
    @graph.tool
    def lookup_order(order_id: str) -> dict:
        """Look an order up.

        By its id.
        """
        return {"id": order_id}

    specs = graph.declared_parameters()
    assert list(specs) == ["lookup_order.description", "lookup_order.code"]
    assert specs["lookup_order.description"].default == "Look an order up.\n\nBy its id."
    assert specs["lookup_order.description"].kind == "tool_text"
    assert str(specs["lookup_order.code"].default).startswith("def lookup_order(order_id: str) -> dict:")
    assert all(spec.frozen for spec in specs.values())
    info = lookup_order.agentopt
    assert info.description is not None
    with Candidate({"lookup_order.description": "Find an order."}).active():
        assert info.description.value == "Find an order."


def test_two_tools_of_one_name_are_an_error() -> None:
    def make(text: str):
        def search(q: str) -> str:
            return q

        search.__doc__ = text
        return search

    graph.tool(make("one"))
    graph.tool(make("one"))
    with pytest.raises(UserError, match=r"'search\.description' is declared twice"):
        graph.tool(make("two"))
    graph.tool(name="web.search")(make("two"))


def test_tool_with_effects_refuses_during_a_rollout_unless_stand_in_or_allowed() -> None:
    sent: list[str] = []

    @graph.tool(effects=True)
    def send(text: str) -> str:
        sent.append(text)
        return "sent"

    assert send("a") == "sent"
    here = RolloutScope(0, "c", "e", 0)
    with graph.record() as recording, graph.rollout(here), Candidate().active():
        with pytest.raises(graph.EffectsRefused, match=r"'send' has effects.*@send\.when_tuning.*--allow-effects"):
            send("b")
        with graph.allow_effects():
            assert send("c") == "sent"

        @send.when_tuning
        def pretend(text: str) -> str:
            return f"would send {text}"

        assert send("d") == "would send d"
    assert pretend("e") == "would send e"
    assert send("f") == "sent"
    assert sent == ["a", "c", "f"]
    assert [op.output for op in ops(recording, "tool")] == [None, "sent", "would send d"]


@pytest.mark.anyio
async def test_async_tool_with_a_plain_stand_in() -> None:
    @graph.tool(effects=True)
    async def pay(amount: int) -> str:
        raise AssertionError("paid")

    @pay.when_tuning
    def pretend(amount: int) -> str:
        return "pretended"

    with graph.rollout(RolloutScope(0, "c", "e")), Candidate().active():
        assert await pay(3) == "pretended"


@pytest.mark.parametrize("wrong", [3, "f", int, staticmethod(lambda_like), classmethod(lambda_like)])
@pytest.mark.parametrize("decorator", [graph.step, graph.tool, graph.agent])
def test_decorating_something_else_is_a_clear_error(decorator, wrong) -> None:
    with pytest.raises(UserError, match=r"decorate a def|put it below"):
        decorator(wrong)
