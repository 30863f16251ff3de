"""TextGrad: one gradient per edge, merged at each node, so calls are linear; bounded; failing rows only."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

import agentopt as ao
from agentopt import graph
from agentopt.errors import UserError
from agentopt.evaluation import Dataset, Example
from agentopt.graph import SetText, SetValue
from agentopt.models import FunctionLM, Request, as_lm
from agentopt.optimizers import TextGrad, TextGradOptions
from tests.optimizers import arena
from tests.optimizers.conftest import World

pytestmark = pytest.mark.anyio


class Writer:
    """Answers gradients with a numbered text and updates with a value; keeps what it was asked."""

    def __init__(self, gradient: str = "The parts of it are wrong.", value: str = "new") -> None:
        self.gradients: list[str] = []
        self.updates: list[str] = []
        self._gradient = gradient
        self._value = value
        self.lm = as_lm(FunctionLM(self._answer), "optimizer")

    def _answer(self, request: Request) -> Any:
        text = str(request.messages[-1]["content"])
        if request.schema is None:
            self.gradients.append(text)
            return self._gradient.replace("#", str(len(self.gradients)))
        self.updates.append(text)
        name = request.schema["properties"]["suggestion"]["items"]["properties"]["name"]["enum"][0]
        return {"reasoning": "why", "suggestion": [{"name": name, "value": self._value}]}


def _mixed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def ladder(depth: int) -> World:
    """Two values that are made from both values of the level before, `depth` times: 2**depth paths, 4 edges a level."""
    start = ao.parameter("start", name="ladder.start")

    @ao.bundle
    def left(a: str, b: str) -> str:
        return "L" + _mixed(a + b)

    @ao.bundle
    def right(a: str, b: str) -> str:
        return "R" + _mixed(b + a)

    @ao.agent
    def climb(x: str) -> Any:
        a, b = left(start, start), right(start, start)
        for _ in range(depth):
            a, b = left(a, b), right(a, b)
        return (a + b).value

    return World(climb, Dataset("train", [Example("", {"x": "1"}, "other")]), dict(graph.declared_parameters()))


@pytest.mark.parametrize("depth", [0, 1, 2, 5, 12, 40])
async def test_calls_are_linear_on_diamonds_where_the_paths_double(depth: int) -> None:
    writer = Writer("The parts are wrong in way #.")
    world = ladder(depth)
    context = world.context(lm=writer.lm)
    [update] = await TextGrad(TextGradOptions(max_calls=10_000)).propose(context)
    assert update.edits == (SetValue("ladder.start", "new"),)
    # Two edges into the first level, four a level, two into the sum. The agent hands the sum on: no call.
    assert len(writer.gradients) == 2 + 4 * depth + 2
    assert len(writer.updates) == 1
    assert max(map(len, writer.gradients)) < 8000


async def test_what_arrives_at_a_node_is_merged_once_before_it_goes_further() -> None:
    writer = Writer("Way # is wrong.")
    context = ladder(1).context(lm=writer.lm)
    await TextGrad(TextGradOptions(max_calls=100)).propose(context)
    # Ways 1 and 2 reach the last left and right; 3 and 4 go from right to the first two values, 5 and 6 from left.
    first_two = writer.gradients[-2:]
    assert ["Way 4" in first_two[0], "Way 6" in first_two[0], "Way 3" in first_two[0]] == [True, True, False]
    assert ["Way 3" in first_two[1], "Way 5" in first_two[1], "Way 4" in first_two[1]] == [True, True, False]


@pytest.mark.parametrize("bound", [1, 2, 3, 7, 20])
async def test_max_calls_bounds_everything_and_criticism_still_arrives(bound: int) -> None:
    writer = Writer()
    context = ladder(10).context(lm=writer.lm, count=3)
    [update, *_] = await TextGrad(TextGradOptions(max_calls=bound)).propose(context)
    assert update.edits == (SetValue("ladder.start", "new"),)
    assert len(writer.gradients) + len(writer.updates) <= bound


async def test_only_failing_rollouts_get_gradients() -> None:
    writer = Writer()
    task = arena.RulesTask(k=4, rows=8, base=arena.improved(arena.BASE, {1, 2, 3}))
    await TextGrad().propose(await arena.context(task, writer.lm))
    assert len(writer.gradients) == 2  # one edge for each of the two rows of kind 4
    assert all("Rule 4" in text for text in writer.gradients)
    writer = Writer()
    solved = ao.Candidate({"rules.instruction": task.optimum})
    assert await TextGrad().propose(await arena.context(task, writer.lm, parent=solved)) == []
    assert not writer.gradients
    assert not writer.updates


async def test_every_parameter_that_is_blamed_gets_one_update_and_all_go_together() -> None:
    writer = Writer("It should say more.", "Write shorter.")
    draft = ao.prompt("Draft an answer.", name="two.draft")
    polish = ao.prompt("Polish the draft.", name="two.polish")
    agent = FunctionLM(lambda request: f"reply to {len(str(request.messages))} characters")
    unused = ao.prompt("Never read.", name="two.unused")
    assert unused

    @ao.agent
    async def write(x: str) -> str:
        first = await agent.complete(system=draft, user=x)
        second = await agent.complete(system=polish, user=first.text)
        return second.text.upper()

    task = arena.RulesTask(k=1, rows=2, scorer=arena.equal)
    task.program = write
    train = Dataset("train", [Example("", {"x": "a"}, "right"), Example("", {"x": "b"}, "right")])
    task.train = train
    rollouts = await arena.rollouts(task, ao.Candidate({}), count=2)
    specs = {name: spec for name, spec in graph.declared_parameters().items() if name.startswith("two.")}
    parent = ao.Candidate({name: spec.default for name, spec in specs.items()})
    context = await arena.context(task, writer.lm, specs=specs, rollouts=rollouts, train=train, parent=parent)
    [update] = await TextGrad().propose(context)
    edits = (SetText("two.draft", "Write shorter."), SetText("two.polish", "Write shorter."))
    assert sorted(update.edits, key=lambda edit: edit.name) == sorted(edits, key=lambda edit: edit.name)
    assert len(writer.updates) == 2
    # A row: output to the second call, from there to polish and to the first call, from there to draft.
    assert len(writer.gradients) == 2 * 4
    assert all("2 failing cases" in text for text in writer.updates)


@pytest.mark.parametrize("junk", ["", "I'm sorry, I can't help with that.", "{", "1 2 3"])
async def test_in_place_of_a_junk_gradient_the_criticism_itself_goes_on(junk: str) -> None:
    writer = Writer(junk)
    task = arena.RulesTask(k=2, rows=4)
    context = await arena.context(task, writer.lm)
    await TextGrad().propose(context)
    assert "Rule 1" in writer.updates[0]
    assert "Rule 2" in writer.updates[0]
    assert len(context.dropped) == len(writer.gradients)


async def test_a_failed_call_is_criticised_with_its_error() -> None:
    writer = Writer()
    start = ao.parameter("start", name="broken.start")

    @ao.bundle
    def half(text: str) -> str:
        raise ValueError(f"cannot halve {text}")

    @ao.agent
    def program(x: str) -> Any:
        return half(start).value

    world = World(program, Dataset("train", [Example("", {"x": "1"}, "y")]), dict(graph.declared_parameters()))
    [update] = await TextGrad().propose(world.context(lm=writer.lm))
    assert update.edits == (SetValue("broken.start", "new"),)
    assert "cannot halve start" in writer.gradients[-1]


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="max_calls must be at least 1"):
        TextGradOptions(max_calls=0)
