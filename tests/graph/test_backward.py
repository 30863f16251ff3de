"""Backward: minimal subgraphs, several feedback items, linear size."""

from __future__ import annotations

from typing import Any

import pytest

import agentopt.graph as ao
from agentopt.errors import UserError


def names(records: Any) -> list[str]:
    return [record.op for record in records]


def test_the_minimal_subgraph_has_the_paths_and_cuts_the_branches() -> None:
    x, y, u = ao.parameter(3, name="x"), ao.node(4, name="y"), ao.node(7, name="u")

    @ao.bundle
    def policy(z: int) -> int:
        return z

    out = policy(x * y) + (u + 1) * 2
    sub = out.backward("make it larger", score=0.5)["x"]
    assert names(sub.ops) == ["mul", "policy", "add"]
    assert [(record.op, record.output) for record in sub.inputs] == [("y", 4), ("mul", 16)]
    assert (sub.parameter, sub.parameters["x"].value, sub.output.output) == ("x", 3, 28)
    assert (sub.feedback[0].text, sub.feedback[0].score) == ("make it larger", 0.5)


def test_two_parameters_exclude_each_others_private_nodes() -> None:
    a, b = ao.parameter(1, name="a"), ao.parameter(2, name="b")

    @ao.bundle
    def left(x: int) -> int:
        return x

    @ao.bundle
    def right(x: int) -> int:
        return x

    found = (left(a) + right(b)).backward("fb")
    assert names(found["a"].ops) == ["left", "add"]
    assert names(found["b"].ops) == ["right", "add"]
    assert names(found["a"].inputs) == ["right"]
    both = found["a"].union(found["b"])
    assert (names(both.ops), set(both.parameters), both.inputs) == (["left", "right", "add"], {"a", "b"}, ())


def test_a_parameter_as_its_own_target() -> None:
    found = ao.parameter("text", name="p").backward("rewrite it")
    assert (found["p"].ops, found["p"].output.output, found["p"].feedback[0].text) == ((), "text", "rewrite it")


def test_nothing_to_train_gives_nothing() -> None:
    assert (ao.node(1) + 1).backward("fb") == {}


def test_repeated_backward_with_different_feedback_is_independent() -> None:
    p = ao.parameter(1, name="p")
    out = p + 1
    first, second = out.backward("one"), out.backward("two")
    assert (first["p"].feedback[0].text, second["p"].feedback[0].text) == ("one", "two")
    assert len(first["p"].ops) == len(second["p"].ops) == 1


def test_different_feedback_on_a_shared_parameter_in_one_trace() -> None:
    shared, own = ao.parameter(1, name="shared"), ao.parameter(2, name="own")
    with ao.record() as recording:
        one = shared + 10
        two = shared * own
    trace = recording.trace
    found = ao.backward(trace, [ao.Feedback(one, "one", 0.0), ao.Feedback(two, "two", 1.0, weight=2.0)])
    assert [(item.text, item.weight) for item in found["shared"].feedback] == [("one", 1.0), ("two", 2.0)]
    assert [item.text for item in found["own"].feedback] == ["two"]
    assert names(found["shared"].ops) == ["add", "mul"]
    assert names(found["shared"].outputs) == ["add", "mul"]
    same_target = ao.backward(trace, [ao.Feedback(one, "a"), ao.Feedback(one, "b")])
    assert [item.text for item in same_target["shared"].feedback] == ["a", "b"]


def test_records_behind_the_target_are_not_part_of_it() -> None:
    p = ao.parameter(1, name="p")
    with ao.record() as recording:
        middle = p + 1
        _ = middle * 2
    found = ao.backward(recording.trace, ao.Feedback(middle, "fb"))
    assert names(found["p"].ops) == ["add"]


def test_parameters_hidden_inside_nested_functions_are_reached() -> None:
    flat, hidden, deep = (ao.parameter(value, name=name) for name, value in (("flat", 1), ("hidden", 2), ("deep", 3)))

    @ao.bundle
    def third(x: int) -> int:
        return x + deep.value

    @ao.bundle
    def second(x: int) -> int:
        return third(x) + hidden.value

    @ao.bundle
    def first(x: int) -> int:
        return second(x)

    for out in (first(flat), first(ao.node(0) + flat)):
        found = out.backward("fb")
        assert found.keys() == {"flat", "hidden", "deep"}
        assert names(found["deep"].ops) == ["third", "second", "first"]
    with ao.record():
        assert first(flat).backward("fb").keys() == {"flat", "hidden", "deep"}


def test_a_diamond_is_not_counted_twice() -> None:
    p = ao.parameter(1, name="p")
    y: Any = p + 0
    for _ in range(300):
        y = y + y
    sub = y.backward("fb")["p"]
    assert len(sub.ops) == 301


def test_bad_feedback_is_a_clear_error() -> None:
    trace = (ao.node(1) + 1).trace
    with pytest.raises(UserError, match="record 9 is not in the trace"):
        ao.backward(trace, ao.Feedback(9, "fb"))
    with pytest.raises(UserError, match="not used inside"):
        ao.backward(trace, ao.Feedback(ao.node(5), "fb"))
    with pytest.raises(UserError, match="a record id or a Node"):
        ao.backward(trace, ao.Feedback("last", "fb"))
    bad: Any = 5
    with pytest.raises(UserError, match="must be a string"):
        ao.backward(trace, ao.Feedback(0, bad))


def test_subgraphs_of_different_calls_are_not_joined() -> None:
    p = ao.parameter(1, name="p")
    out = p + 1
    with pytest.raises(UserError, match="one backward call"):
        out.backward("a")["p"].union(out.backward("b")["p"])


def test_100_000_operations_go_backward() -> None:
    p = ao.parameter(0, name="p")
    y: Any = p
    for _ in range(100_000):
        y = y + 1
    sub = y.backward("fb")["p"]
    assert (len(sub.ops), sub.inputs, sub.output.output) == (100_000, (), 100_000)


def test_one_operation_over_1_000_parameters_has_one_linear_union() -> None:
    leaves = [ao.node(place, trainable=True, name=f"p{place}") for place in range(1_000)]
    total = ao.bundle(lambda items: sum(items))(leaves)
    found = total.backward("fb")
    assert len(found) == 1_000
    first, *others = found.values()
    union = first.union(*others)
    assert (len(union.parameters), names(union.ops), union.inputs) == (1_000, ["list", "<lambda>"], ())
