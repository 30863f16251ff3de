"""Modules: parameters through nesting, inheritance and containers; state."""

from __future__ import annotations

from typing import Any

import pytest

import agentopt.graph as ao
from agentopt.errors import UserError


class Base(ao.Module):
    shared = None

    def __init__(self) -> None:
        self.own = ao.parameter("a", name="own")

    @ao.bundle(trainable=True)
    def act(self, x: int) -> int:
        return x


class Mixin:
    def __init__(self) -> None:
        super().__init__()
        self.mixed = ao.parameter("m", name="mixed")


class Child(Mixin, Base):
    __slots__ = ("slotted",)
    on_class: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.slotted = ao.parameter("s", name="slotted")
        self.items = [ao.parameter(1, name="one"), (ao.parameter(2, name="two"), {"k": ao.parameter(3, name="three")})]
        self.alias = self.own
        self.plain = ao.node(5)
        self.inner = Inner()
        self.loop = self


class Inner(ao.Module):
    def __init__(self) -> None:
        self.deep = {"x": [ao.parameter("d", name="deep")]}


def test_parameters_are_found_through_nesting_inheritance_slots_and_containers() -> None:
    child = Child()
    names = ["Base.act.code", "deep", "mixed", "one", "own", "slotted", "three", "two"]
    assert sorted(child.parameters()) == names
    assert all(node.trainable for node in child.parameters().values())
    assert child.parameters()["own"] is child.own


def test_class_attributes_count() -> None:
    class Agent(ao.Module):
        tone = ao.parameter("calm", name="tone")

    assert list(Agent().parameters()) == ["tone"]


def test_state_has_stable_paths_and_loads_into_another_instance() -> None:
    child, other = Child(), Child()
    state = child.state()
    assert state["items.1.1.k"] == 3
    assert state["inner.deep.x.0"] == "d"
    other.load_state({**state, "own": "changed"})
    assert (other.own.value, child.own.value) == ("changed", "a")


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    class Agent(ao.Module):
        def __init__(self) -> None:
            self.a = ao.node(1, trainable=True)
            self.b = ao.node(2, trainable=True, constraint=lambda value: value < 10)

    agent = Agent()
    with pytest.raises(UserError, match="missing: b"):
        agent.load_state({"a": 3})
    with pytest.raises(UserError, match="unknown: c"):
        agent.load_state({"a": 3, "b": 2, "c": 1})
    with pytest.raises(UserError):
        agent.load_state({"a": 3, "b": 20})
    assert agent.state() == {"a": 1, "b": 2}


def test_the_module_decorator_keeps_the_class() -> None:
    class Plain:
        def __init__(self) -> None:
            self.p = ao.parameter("x", name="p")

        def state(self) -> str:
            return "its own"

    made = ao.module(Plain)
    assert made is Plain
    instance: Any = Plain()
    assert isinstance(instance, ao.Module)
    assert list(instance.parameters()) == ["p"]
    assert instance.state() == "its own"

    class Outer(ao.Module):
        def __init__(self) -> None:
            self.plain = Plain()

    assert list(Outer().parameters()) == ["p"]
