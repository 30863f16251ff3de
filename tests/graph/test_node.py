"""Nodes: values, operators, containers, parameters."""

from __future__ import annotations

import copy
import gc
import math
import operator
from typing import Any

import pytest

import agentopt.graph as ao
from agentopt.errors import UserError


def parents(node: Any) -> set[str]:
    """Names of the records the Node's own record depends on."""
    trace = node.trace
    return {trace.ops[parent].op for parent, _ in trace.ops[trace.output_id].parents}


@pytest.mark.parametrize(
    ("function", "x", "y"),
    [
        (operator.add, 3, 4),
        (operator.add, "a", "b"),
        (operator.sub, 3, 4),
        (operator.mul, 3, 4),
        (operator.truediv, 3, 4),
        (operator.floordiv, 30, 4),
        (operator.mod, 30, 4),
        (operator.mod, "%s!", "x"),
        (operator.pow, 3, 4),
        (operator.and_, 6, 3),
        (operator.or_, 6, 3),
        (operator.xor, 6, 3),
        (operator.lshift, 6, 3),
        (operator.rshift, 600, 3),
        (divmod, 17, 5),
        (operator.lt, 1, 2),
        (operator.gt, 1, 2),
        (operator.le, 1, 2),
        (operator.ge, 1, 2),
        (operator.getitem, [5, 6], 1),
    ],
)
def test_a_binary_operator_gives_a_node_with_both_operands_as_inputs(function: Any, x: Any, y: Any) -> None:
    left, right = ao.node(x, name="left"), ao.node(y, name="right")
    both = function(left, right)
    assert isinstance(both, ao.Node)
    assert both.value == function(x, y)
    assert parents(both) == {"left", "right"}
    plain_right = function(left, y)
    assert plain_right.value == function(x, y)
    assert parents(plain_right) == {"left"}
    assert list(plain_right.trace.ops[-1].inputs.values()) == [x, y]
    formats_itself = function is operator.mod and isinstance(x, str)  # str % node reads the node
    if function is not operator.getitem and not formats_itself:
        reflected = function(x, right)
        assert (reflected.value, parents(reflected)) == (function(x, y), {"right"})


@pytest.mark.parametrize("function", [operator.neg, operator.pos, abs, math.floor, math.ceil, math.trunc, round])
def test_a_unary_operator_gives_a_node(function: Any) -> None:
    x = ao.node(-2.5, name="x")
    assert function(x).value == function(-2.5)
    assert parents(function(x)) == {"x"}


def test_round_with_digits_and_invert() -> None:
    assert round(ao.node(2.567), 2).value == 2.57
    assert (~ao.node(5)).value == ~5


def test_equality_and_conversions_give_plain_values() -> None:
    x = ao.node(3)
    assert (x == 3) is True
    assert (x != ao.node(3)) is False
    assert (int(x), float(x), complex(x), str(x), f"{x:>3}", bool(x), [10, 20, 30, 40][x]) == (
        3,
        3.0,
        3 + 0j,
        "3",
        "  3",
        True,
        40,
    )
    assert len(ao.node([1, 2])) == 2
    assert 1 in ao.node([1, 2])
    assert ",".join([str(ao.node("a")), "b"]) == "a,b"


def test_membership_is_by_value_in_a_list_and_by_identity_in_a_set() -> None:
    x, y = ao.node(1), ao.node(1)
    assert y in [x]
    assert y not in {x}
    assert x in {x}


@pytest.mark.parametrize(("left", "right"), [(True, True), (True, False), (False, True), (False, False)])
def test_and_or_short_circuit_like_python(left: bool, right: bool) -> None:
    x, y = ao.node(left), ao.node(right)
    assert ((x and y) is (y if left else x), (x or y) is (x if left else y)) == (True, True)
    assert ao.not_(x).value == (not left)


def test_functions_for_what_has_no_operator() -> None:
    x, y, yes = ao.node(1, name="x"), ao.node(2, name="y"), ao.node(True, name="yes")
    assert (ao.cond(yes, x, y).value, parents(ao.cond(yes, x, y))) == (1, {"yes", "x", "y"})
    joined = ao.join(", ", [x, y])
    assert joined.value == "1, 2"
    assert {op.op for op in joined.trace.ops} >= {"x", "y"}
    assert ao.in_(x, [1]).value is True
    assert ao.is_(x, y).value is False
    assert ao.length(ao.node("abc")).value == 3
    assert ao.equal(x, 1).value is True


def test_items_of_a_container_of_nodes_lead_back_to_them() -> None:
    x, y = ao.node(1, name="x"), ao.node(2, name="y")
    packed = ao.node([x, {"k": y}])
    assert packed.value == [1, {"k": 2}]
    second = packed[1]["k"]
    assert second.value == 2
    assert "y" in {op.op for op in second.trace.ops}


@pytest.mark.parametrize(
    "value", [[1, 2, 3], (1, 2, 3), "abc", {1, 2, 3}, {"a": 1, "b": 2}, range(3), frozenset({4}), bytearray(b"ab")]
)
def test_iteration_gives_linked_nodes(value: Any) -> None:
    container = ao.node(value, name="container")
    elements = list(container)
    assert [element.value for element in elements] == list(value)
    assert all(parents(element) == {"container"} for element in elements)


def test_a_dict_gives_linked_keys_values_and_items() -> None:
    table = ao.node({"a": 1, "b": 2}, name="table")
    assert {key.value: value.value for key, value in table.items()} == {"a": 1, "b": 2}
    assert [value.value for value in table.values()] == [1, 2]
    assert [key.value for key in table] == ["a", "b"]
    assert all("table" in {op.op for op in value.trace.ops} for value in table.values())


def test_attributes_and_methods_of_the_value_are_traced() -> None:
    text = ao.node("hello {}", name="text")
    word = ao.node("you", name="word")
    filled = text.format(word)
    assert filled.value == "hello you"
    assert parents(filled) == {"text", "word"}
    assert text.upper().split(" ")[0].value == "HELLO"
    number = ao.node(3 + 4j, name="number")
    assert (number.real.value, parents(number.imag)) == (3.0, {"number"})
    with pytest.raises(AttributeError):
        _ = text.no_such_method
    with pytest.raises(AttributeError, match="private"):
        _ = text._secret


def test_an_attribute_that_node_has_itself_is_reached_by_getattr_and_call() -> None:
    class Thing:
        value = 5

        def backward(self, by: int) -> int:
            return self.value - by

    thing = ao.node(Thing())
    assert thing.getattr("value").value == 5
    assert thing.call("backward", by=2).value == 3


def test_a_callable_value_has_the_function_and_its_arguments_as_parents() -> None:
    function = ao.node(lambda x: x + 1, name="function")
    result = function(ao.node(1, name="x"))
    assert (result.value, parents(result)) == (2, {"function", "x"})


def test_mutation_through_operators_keeps_what_was_recorded_before() -> None:
    numbers = ao.node([1, 2], name="numbers")
    before = numbers + [3]  # noqa: RUF005
    numbers[0] = ao.node(9, name="nine")
    numbers.append(4)
    last = numbers.pop()
    del numbers[1]
    assert (numbers.value, before.value, last.value) == ([9], [1, 2, 3], 4)
    assert before.trace.ops[-1].inputs["x"] == [1, 2]
    assert {op.op for op in numbers.trace.ops} == {"numbers", "nine", "setitem", "append", "pop", "delitem"}
    table = ao.node({"a": 1})
    table.update({"b": ao.node(2, name="two")})
    table["c"] = 3
    assert table.value == {"a": 1, "b": 2, "c": 3}
    assert "two" in {op.op for op in table.trace.ops}


def test_d10_a_container_changed_behind_the_nodes_back_gets_a_new_record() -> None:
    original = [1]
    numbers = ao.node(original, name="numbers")
    before = numbers + [2]  # noqa: RUF005
    original.append(5)
    after = numbers + [2]  # noqa: RUF005
    assert before.trace.ops[-1].inputs["x"] == [1]
    assert after.trace.ops[-1].inputs["x"] == [1, 5]
    assert "mutated" in {op.op for op in after.trace.ops}


def test_clone_keeps_a_parent_and_a_deep_copy_has_none() -> None:
    x = ao.node([1], name="x")
    assert parents(x.clone()) == {"x"}
    assert parents(copy.copy(x)) == {"x"}
    deep = copy.deepcopy(x)
    assert (deep.name, deep.value, parents(deep)) == ("x_copy", [1], set())
    deep[0] = 2
    assert x.value == [1]


def test_a_node_of_a_node_is_that_node_and_a_parameter_of_a_node_has_its_value() -> None:
    x = ao.node(1)
    assert ao.node(x) is x
    trainable = ao.node(x, trainable=True)
    assert (trainable.trainable, trainable.value, x.trainable) == (True, 1, False)


def test_a_node_is_not_pickled() -> None:
    with pytest.raises(TypeError, match=r"node\.value"):
        ao.node(1).__reduce__()


def test_an_operator_that_fails_is_a_record_with_place_and_inputs() -> None:
    x, zero = ao.parameter(1, name="x"), ao.node(0, name="zero")
    with pytest.raises(ZeroDivisionError) as caught:
        _ = x / zero
    error = caught.value
    assert isinstance(error, ao.ExecutionError)
    assert (error.record.op, dict(error.record.inputs)) == ("truediv", {"x": "1", "y": "0"})
    assert error.record.file == __file__
    assert error.record.source_line == "_ = x / zero"
    assert error.node.backward(error.feedback).keys() == {"x"}


def test_names_of_unnamed_nodes_differ() -> None:
    assert ao.node(1).name != ao.node(1).name
    assert (ao.node(1) + 1).name.startswith("add")


def test_custom_values_are_kept_by_reference() -> None:
    class Box:
        def __init__(self, inside: int) -> None:
            self.inside = inside

    box = Box(3)
    traced = ao.node(box)
    assert traced.value is box
    doubled = traced.inside * 2
    recorded = doubled.trace.ops[0].output
    assert isinstance(recorded, ao.Reference)
    assert (recorded.value, recorded.mutable, recorded.type.endswith("Box")) == (box, True, True)


# --- parameters


def test_a_parameter_is_a_trainable_leaf_with_a_description_and_a_constraint() -> None:
    p = ao.parameter("be brief", name="style", description="how to answer", constraint="one sentence")
    found = (p + ".").backward("too long")["style"].parameters["style"]
    assert (found.value, found.description, found.constraint) == ("be brief", "how to answer", "one sentence")
    assert (p.name, p.trainable, p.description) == ("style", True, "how to answer")


def test_a_constraint_refuses_and_a_projection_corrects_values() -> None:
    p = ao.parameter(
        5, name="p", constraint=lambda value: value < 10 or "must stay below 10", projection=lambda value: abs(value)
    )
    p.value = -7
    assert p.value == 7
    with pytest.raises(UserError, match="must stay below 10"):
        p.value = 12
    assert p.value == 7
    with pytest.raises(UserError, match="below 10"):
        ao.parameter(11, name="q", constraint=lambda value: value < 10 or "must stay below 10")


def test_the_active_candidate_gives_a_parameters_value() -> None:
    p = ao.parameter(1, name="p")
    fixed = p + 1
    with ao.Candidate({"p": 10}).active():
        assert (p.value, (p + 1).value) == (10, 11)
        with ao.Candidate({"p": 20}).active():
            assert (p + 1).value == 21
        trace = (p + 1).trace
        assert trace.parameters["p"].value == 10
    assert (p.value, fixed.value, fixed.trace.parameters["p"].value) == (1, 2, 1)


def test_a_parameter_is_not_mutated_in_place_but_a_clone_is() -> None:
    p = ao.parameter([1], name="p")
    with pytest.raises(TypeError, match="clone"):
        p[0] = 2
    x = p.clone()
    x[0] = 2
    assert (x.value, p.value, x.backward("f").keys()) == ([2], [1], {"p"})


def test_a_handle_used_with_a_node_is_a_parent() -> None:
    style = ao.prompt("briefly", name="style")
    text = ao.node("Answer ") + style
    assert (text.value, text.backward("fb").keys()) == ("Answer briefly", {"style"})
    assert text.trace.parameters["style"].kind == "prompt"
    with ao.Candidate({"style": "at length"}).active():
        assert (ao.node("Answer ") + style).value == "Answer at length"


def test_one_name_is_one_parameter() -> None:
    ao.parameter(1, name="same")
    ao.parameter(1, name="same")
    with pytest.raises(UserError, match="same"):
        ao.parameter(2, name="same")


# --- memory and switches


def test_a_chain_of_100_000_operations_is_freed_at_once_and_without_a_cycle() -> None:
    class Marker:
        pass

    import weakref

    gc.collect()
    gc.disable()
    try:
        first = ao.node(Marker(), name="first")
        alive = weakref.ref(first.value)
        y: Any = ao.equal(first, 0) + 0
        del first
        for _ in range(100_000):
            y = y + 1
        assert alive() is not None
        del y
        assert alive() is None
    finally:
        gc.enable()


def test_stop_tracing_gives_plain_values_and_nests() -> None:
    x = ao.node(2)
    with ao.stop_tracing():
        with ao.stop_tracing():
            assert type(x + 1) is int
        assert type(x + 1) is int  # D4: the inner block's end must not switch tracing on
        assert [type(item) for item in ao.node([1, 2])] == [int, int]
        assert type(ao.node("a").upper()) is str
        items = ao.node([1])
        items.append(2)
        assert items.value == [1, 2]
    assert isinstance(x + 1, ao.Node)
