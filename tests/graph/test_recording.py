"""Recordings: what is collected, how calls are linked, and that nothing mixes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest

import agentopt.graph as ao


def call(name: str, output: Any, **inputs: Any) -> Any:
    with ao.operation(name, kind="step", inputs=inputs) as op:
        op.set_output(output)
    return output


def edges(trace: ao.Trace, name: str) -> list[tuple[str, str]]:
    record = trace.find(name)[-1]
    return [(trace.ops[parent].op, kind) for parent, kind in record.parents]


def test_outside_a_recording_an_operation_does_nothing() -> None:
    with ao.operation("search", inputs={"q": 1}) as op:
        op.set_output(1)
        op.report(usage=ao.Usage(calls=1), cost=1.0)
        op.annotate(model="m")
    assert ao.current_recording() is None
    assert not op.recorded


def test_a_call_is_a_record_with_everything_that_was_told() -> None:
    with (
        ao.record("run") as recording,
        ao.operation("agent", kind="agent", inputs={"q": "hi"}) as outer,
    ):
        assert ao.current_recording() is recording
        with ao.operation("lm", kind="lm", inputs={"messages": [{"role": "user", "content": "hi"}]}) as op:
            op.report(usage=ao.Usage(input_tokens=5, output_tokens=2, calls=1), cost=0.25)
            op.annotate(model="m", seed=7)
            op.set_output("hello")
        ao.report_usage(tokens=10, usd=0.5)
        outer.set_output("done")
    trace = recording.trace
    lm, agent = trace.ops
    assert (lm.op, lm.kind, lm.output, lm.parent_op, lm.meta) == ("lm", "lm", "hello", 1, {"model": "m", "seed": 7})
    assert (agent.output, agent.parents, trace.output_id, trace.output) == ("done", ((0, "nested"),), 1, "done")
    assert trace.usage == ao.Usage(input_tokens=15, output_tokens=2, calls=2)
    assert trace.cost == 0.75
    assert lm.started > 0 and lm.duration is not None and lm.duration >= 0
    assert trace.name == "run"


def test_the_cost_is_unknown_when_one_call_has_no_price() -> None:
    with ao.record() as recording:
        for cost in (0.1, None):
            with ao.operation("lm") as op:
                op.report(usage=ao.Usage(calls=1), cost=cost)
    assert recording.trace.cost is None


def test_an_error_in_a_call_is_recorded_and_goes_on() -> None:
    recording = ao.record()
    with (
        pytest.raises(ValueError, match="no"),
        recording,
        ao.operation("agent", kind="agent"),
        ao.operation("tool", kind="tool", inputs={"x": 1}),
    ):
        raise ValueError("no")
    trace = recording.trace
    assert [op.error.op if op.error else None for op in trace.ops] == ["tool", "tool", "tool"]
    assert trace.error is not None
    assert (trace.error.type, trace.error.op_id, trace.error.source_line) == ("ValueError", 0, 'raise ValueError("no")')


def test_inputs_and_outputs_do_not_change_afterwards() -> None:
    given: dict[str, Any] = {"inner": [1]}
    result: list[Any] = [given]
    with ao.record() as recording:
        call("step", result, given=given)
        given["inner"].append(2)
        result.append(3)
    record = recording.trace.find("step")[0]
    assert (record.inputs, record.output) == ({"given": {"inner": [1]}}, [{"inner": [1]}])


def test_large_and_custom_values_are_references() -> None:
    class Custom:
        pass

    with ao.record() as recording:
        call("step", list(range(2_000)), custom=Custom(), many=list(range(1_000)))
    record = recording.trace.find("step")[0]
    assert isinstance(record.output, ao.Reference) and record.output.type == "list"
    assert isinstance(record.inputs["custom"], ao.Reference)
    assert record.inputs["many"] == list(range(1_000))


def test_same_edge_when_the_very_object_is_passed_on() -> None:
    with ao.record() as recording:
        rows = call("load", [{"a": 1}])
        call("other", 5)
        call("count", 1, rows=rows)
        call("wrapped", 1, rows={"rows": rows})
        call("equal but another object", 1, rows=[{"a": 1}])
    trace = recording.trace
    assert edges(trace, "count") == [("load", "same")]
    assert edges(trace, "wrapped") == [("load", "same")]
    assert edges(trace, "equal but another object") == [("wrapped", "after")]
    assert trace.find("count")[0].sources == {"rows": 0}


def test_text_edges_for_equal_and_contained_texts_of_the_latest_sibling() -> None:
    with ao.record() as recording:
        call("first", "a long answer")
        call("again", "a long answer")
        call("label", "yes")
        call("uses label", 0, x="yes")
        call("quotes", "q", prompt="Given: a long answer. Go on.")
        call("extracts", "q2", part="long answer")
        call("short part", 0, part="long")
        call("chat", 0, messages=[{"role": "user", "content": "about a long answer and more"}])
        call("structured", {"category": "billing", "why": "the invoice is wrong"})
        call("field", 0, category="billing")
    trace = recording.trace
    assert edges(trace, "uses label") == [("label", "text")]
    assert edges(trace, "quotes") == [("again", "text")]
    assert edges(trace, "extracts") == [("again", "text")]
    assert edges(trace, "short part") == [("extracts", "after")]
    assert edges(trace, "chat") == [("again", "text")]
    assert edges(trace, "field") == [("structured", "text")]


def test_a_text_built_from_two_outputs_has_two_edges() -> None:
    with ao.record() as recording:
        one, two = call("one", "the first half"), call("two", "the second half")
        call("both", "", prompt=f"{one} and {two}")
    assert sorted(edges(recording.trace, "both")) == [("one", "text"), ("two", "text")]


def test_only_siblings_are_compared_by_text() -> None:
    with ao.record() as recording:
        call("before", "a long answer")
        with ao.operation("agent", kind="agent") as op:
            call("inside", 0, x="a long answer")
            op.set_output(1)
    assert edges(recording.trace, "inside") == []


def test_a_node_given_to_a_call_is_a_data_edge() -> None:
    p = ao.parameter("x", name="p")
    with ao.record() as recording:
        call("step", 1, prompt=p + "!")
    trace = recording.trace
    assert edges(trace, "step") == [("add", "data")]
    assert trace.find("step")[0].inputs == {"prompt": "x!"}
    assert ao.backward(trace, ao.Feedback(trace.output_id, "fb")).keys() == {"p"}


def test_parameter_reads_belong_to_the_open_op_and_outside_to_the_root() -> None:
    prompt = ao.prompt("Answer {q}", name="prompt")
    style = ao.prompt("brief", name="style")
    with ao.record() as recording:
        _ = prompt.value
        with ao.operation("step", kind="step") as op:
            _ = style.value
            _ = style.value
            op.set_output("out")
    trace = recording.trace
    assert edges(trace, "step") == [("style", "parameter")]
    root = trace.ops[-1]
    assert (root.kind, root.output, trace.output_id) == ("root", "out", root.id)
    assert set(edges(trace, "root")) == {("prompt", "parameter"), ("step", "nested")}
    assert trace.parameters["prompt"].kind == "prompt"
    assert ao.backward(trace, [ao.Feedback(root.id, "fb")]).keys() == {"prompt", "style"}


def test_control_flow_on_a_node_is_a_read() -> None:
    p = ao.parameter(3, name="p")
    with ao.record() as recording:
        three: Any = 3
        branch = ao.node(1) + 1 if p == three else ao.node(2)
    trace = recording.trace
    assert trace.output == 2
    assert ao.backward(trace, ao.Feedback(trace.output_id, "fb")).keys() == {"p"}
    assert ao.backward(trace, ao.Feedback(branch, "fb")).keys() == set()


def test_set_output_makes_the_root_the_output() -> None:
    with ao.record() as recording:
        call("step", "x")
        recording.set_output({"answer": "x"})
    assert recording.trace.output == {"answer": "x"}
    assert edges(recording.trace, "root") == [("step", "nested")]


def test_a_node_made_before_the_recording_brings_its_parents_along() -> None:
    p = ao.parameter("x", name="p")
    early = p + "y"
    with ao.record() as recording:
        result = early + "z"
    assert [op.op for op in recording.trace.ops] == ["p", "add", "add"]
    assert ao.backward(recording.trace, ao.Feedback(result, "fb")).keys() == {"p"}


def test_a_snapshot_of_a_running_recording_has_the_finished_calls() -> None:
    with ao.record() as recording, ao.operation("agent", kind="agent"):
        call("step", 1)
        assert [op.op for op in recording.trace.ops] == ["step"]
    assert [op.op for op in recording.trace.ops] == ["step", "agent"]


def test_a_recording_is_used_once() -> None:
    with ao.record() as recording:
        pass
    with pytest.raises(RuntimeError, match="once"):
        recording.__enter__()


def test_nested_recordings_do_not_mix() -> None:
    with ao.record() as one:
        call("before", 1)
        with ao.record() as two:
            call("inside", 2)
        call("after", 3)
    assert [op.op for op in two.trace.ops] == ["inside"]
    assert [op.op for op in one.trace.ops if op.kind == "step"] == ["before", "after"]


def test_d4_stop_tracing_is_reentrant_and_local_to_its_thread() -> None:
    inside, leave = threading.Event(), threading.Event()

    def stopped() -> None:
        with ao.stop_tracing():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=stopped)
    thread.start()
    assert inside.wait(60)
    with ao.record() as recording:
        call("while another thread is stopped", 1)
        with ao.stop_tracing():
            with ao.stop_tracing():
                pass
            call("stopped", 1)
            assert ao.current_recording() is None
        call("again", 1)
    leave.set()
    thread.join()
    assert [op.op for op in recording.trace.ops if op.kind == "step"] == ["while another thread is stopped", "again"]


@pytest.mark.anyio
async def test_d4_stop_tracing_is_local_to_its_task() -> None:
    async def stopped() -> None:
        with ao.stop_tracing():
            await anyio.sleep(0.01)

    async def traced() -> None:
        for place in range(3):
            call(f"call {place}", place)
            await anyio.sleep(0.005)

    with ao.record() as recording:
        async with anyio.create_task_group() as group:
            group.start_soon(stopped)
            group.start_soon(traced)
    assert len([op for op in recording.trace.ops if op.kind == "step"]) == 3


def test_d5_d6_a_hundred_threaded_runs_have_distinct_names_and_their_own_records() -> None:
    p = ao.parameter(1, name="p")

    def run(number: int) -> tuple[ao.Trace, list[str]]:
        @ao.bundle
        def add(x: int) -> int:
            return x + p.value + number

        with ao.record(str(number)) as recording:
            value: Any = ao.node(0)
            names = [value.name]
            for _ in range(20):
                value = add(value) + 1
                names.append(value.name)
        return recording.trace, names

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, range(100)))
    everything = [name for _, names in results for name in names]
    assert len(set(everything)) == len(everything)
    for number, (trace, _) in enumerate(results):
        assert (trace.name, len(trace.find("add"))) == (str(number), 40)
        assert trace.output == 20 * (number + 2)
        assert trace.find("p", kind="parameter")


@pytest.mark.anyio
async def test_two_candidates_run_at_the_same_time_with_their_own_values() -> None:
    p = ao.parameter("default", name="p")
    traces: dict[str, ao.Trace] = {}

    @ao.bundle
    async def program(x: str) -> str:
        await anyio.sleep(0.001)
        return x + p.value

    async def run(value: str) -> None:
        with ao.Candidate({"p": value}).active(), ao.record() as recording:
            for _ in range(3):
                await program(p + ":")
        traces[value] = recording.trace

    async with anyio.create_task_group() as group:
        for value in ("one", "two"):
            group.start_soon(run, value)
    for value, trace in traces.items():
        assert trace.parameters["p"].value == value
        assert trace.output == f"{value}:{value}"


def test_a_thread_with_the_bound_context_writes_into_the_recording() -> None:
    with ao.record() as recording:
        thread = threading.Thread(target=ao.bind_context(lambda: call("in a thread", 1)))
        thread.start()
        thread.join()
        other = threading.Thread(target=lambda: call("without context", 1))
        other.start()
        other.join()
    assert [op.op for op in recording.trace.ops] == ["in a thread"]


@pytest.mark.anyio
async def test_concurrent_siblings_are_not_after_each_other() -> None:
    async def run(name: str) -> None:
        with ao.operation(name, kind="step") as op:
            await anyio.sleep(0.01)
            op.set_output(1)

    with ao.record() as recording:
        async with anyio.create_task_group() as group:
            group.start_soon(run, "one")
            group.start_soon(run, "two")
    assert (edges(recording.trace, "one"), edges(recording.trace, "two")) == ([], [])


@pytest.mark.anyio
async def test_a_task_left_over_after_the_recording_writes_nothing() -> None:
    go = anyio.Event()

    async def late() -> None:
        await go.wait()
        call("late", 1)
        assert (ao.node(1) + 1).value == 2

    recording = ao.record()
    async with anyio.create_task_group() as group:
        with recording:
            group.start_soon(late)
            await anyio.sleep(0)
            call("early", 1)
        go.set()
    assert [op.op for op in recording.trace.ops] == ["early"]


def test_dropping_a_recording_frees_what_it_held_without_a_collection() -> None:
    import gc
    import weakref

    class Thing:
        pass

    gc.collect()
    gc.disable()
    try:
        thing = Thing()
        alive = weakref.ref(thing)
        with ao.record() as recording:
            call("step", [thing], thing=thing)
            ao.node(thing)
        del thing
        assert alive() is not None
        del recording
        assert alive() is None
    finally:
        gc.enable()
