"""Reflective mutation: records per component, components in turn, one call, fenced text, program summary, no leaks."""

from __future__ import annotations

from typing import Any

import pytest

import agentopt as ao
from agentopt import graph
from agentopt.errors import UserError
from agentopt.evaluation import Dataset, Example
from agentopt.graph import SetText
from agentopt.models import FunctionLM, Request, as_lm
from agentopt.optimizers import ProposeContext, Reflection, ReflectionOptions
from tests.optimizers import arena

pytestmark = pytest.mark.anyio


class Mirror:
    """Answers with a fenced text; keeps what it was asked."""

    def __init__(self, say: Any = "```\nBetter.\n```") -> None:
        self.asked: list[str] = []
        self._say = say
        self.lm = as_lm(FunctionLM(self._answer), "optimizer")

    def _answer(self, request: Request) -> Any:
        self.asked.append(str(request.messages[-1]["content"]))
        return self._say(request) if callable(self._say) else self._say


async def two_parts(lm: Any, **changes: Any) -> ProposeContext:
    """A program of two calls with a prompt each."""
    plan = ao.prompt("Plan: {goal}", name="parts.plan")
    write = ao.prompt("Write it down.", name="parts.write")
    agent = FunctionLM(lambda request: f"<{request.messages[-1]['content']}>")

    @ao.agent
    async def work(goal: str) -> str:
        first = await agent.complete(user=plan.format(goal=goal))
        second = await agent.complete(system=write, user=first.text)
        return second.text.upper()

    task = arena.RulesTask(k=1, rows=1, scorer=arena.equal)
    task.program = work
    task.train = Dataset("train", [Example("", {"goal": goal}, "done") for goal in ("sail home", "bake bread")])
    specs = {name: spec for name, spec in graph.declared_parameters().items() if name.startswith("parts.")}
    parent = ao.Candidate({name: spec.default for name, spec in specs.items()})
    rollouts = await arena.rollouts(task, parent, count=2)
    fields: dict[str, Any] = {"specs": specs, "parent": parent, "rollouts": rollouts, "train": task.train, **changes}
    return await arena.context(task, lm, **fields)


async def test_records_hold_what_the_component_got_what_it_generated_and_the_feedback() -> None:
    mirror = Mirror()
    context = await two_parts(mirror.lm, program_summary="Plans and writes.", iteration=1)
    [update] = await Reflection().propose(context)
    assert update.edits == (SetText("parts.write", "Better."),)
    [text] = mirror.asked
    assert "### Inputs\n<Plan: sail home>\n### Generated Outputs\n<<Plan: sail home>>" in text
    assert "Expected 'done', got '<<PLAN: SAIL HOME>>'" in text
    assert "bake bread" in text
    assert "Plans and writes." in text
    assert "Write it down." in text


async def test_components_take_turns_over_iterations_or_all_change_together() -> None:
    seen: list[str] = []
    for iteration in range(4):
        mirror = Mirror("```\nBetter {goal}.\n```")
        context = await two_parts(mirror.lm, iteration=iteration)
        for update in await Reflection().propose(context):
            seen.extend(edit.name for edit in update.edits)
        assert len(mirror.asked) <= 4
        with_all = Mirror(
            lambda request: "```\nBetter" + (" {goal}" if "{goal}" in arena.said(request) else "") + "\n```"
        )
        everything = await two_parts(with_all.lm, iteration=iteration)
        [update] = await Reflection(ReflectionOptions(components="all")).propose(everything)
        assert {edit.name for edit in update.edits} == {"parts.plan", "parts.write"}
        assert len(with_all.asked) == 2
    assert seen == ["parts.plan", "parts.plan"]  # "{goal}" is no placeholder of the other one: dropped after repairs


async def test_a_lost_placeholder_is_put_back() -> None:
    mirror = Mirror("Here it is:\n```text\nMake a short plan.\n```\n")
    [update] = await Reflection().propose(await two_parts(mirror.lm, iteration=0))
    [edit] = update.edits
    assert isinstance(edit, SetText)
    assert edit.text.startswith("Make a short plan.")
    assert "{goal}" in edit.text
    assert len(mirror.asked) == 1


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("```\nOne\n```", "One"),
        ("Thinking...\n```markdown\nOne\n\nTwo\n```\nthat is it", "One\n\nTwo"),
        ("```\nUse\n```python\nx\n```\nlike this\n```", "Use\n```python\nx\n```\nlike this"),
        ("```\nnever closed", "never closed"),
        ('{"parts.write": "One"}', "One"),
    ],
)
async def test_the_text_is_read_from_the_fence(reply: str, text: str) -> None:
    [update] = await Reflection().propose(await two_parts(Mirror(reply).lm, iteration=1))
    assert update.edits == (SetText("parts.write", text),)


async def test_an_answer_without_a_fence_gets_one_more_chance() -> None:
    mirror = Mirror(lambda request: "```\nOne\n```" if len(request.messages) > 1 else "I would write it differently.")
    [update] = await Reflection().propose(await two_parts(mirror.lm, iteration=1))
    assert update.edits == (SetText("parts.write", "One"),)
    assert len(mirror.asked) == 2
    context = await two_parts((stubborn := Mirror("no idea")).lm, iteration=1)
    assert await Reflection().propose(context) == []
    assert len(stubborn.asked) == 2
    assert "could not be read" in context.dropped[0].problem


async def test_records_stay_within_their_budget_and_failing_ones_are_kept() -> None:
    task = arena.RulesTask(k=4, rows=24, base=arena.improved(arena.BASE, {1, 2, 3}))
    mirror = Mirror()
    context = await arena.context(task, mirror.lm, batch=24)
    await Reflection(ReflectionOptions(record_tokens=300)).propose(context)
    [text] = mirror.asked
    assert len(text) < 300 * 4 + 2500
    assert text.count("Rule 4") >= 3


async def test_code_is_shown_with_the_calls_of_it_and_rewritten() -> None:
    @ao.bundle(trainable=True, uses=())
    def double(x: int) -> int:
        """Doubles."""
        return x + 2

    @ao.agent
    def program(x: int) -> Any:
        return double(x).value

    task = arena.RulesTask(k=1, rows=1, scorer=arena.equal)
    task.program = program
    task.train = Dataset("train", [Example("", {"x": 5}, 10)])
    specs = {name: spec for name, spec in graph.declared_parameters().items() if spec.kind == "code"}
    parent = ao.Candidate({name: spec.default for name, spec in specs.items()})
    rollouts = await arena.rollouts(task, parent, count=1)
    mirror = Mirror('```python\ndef double(x: int) -> int:\n    """Doubles."""\n    return x * 2\n```')
    context = await arena.context(task, mirror.lm, specs=specs, parent=parent, rollouts=rollouts, train=task.train)
    [update] = await Reflection().propose(context)
    assert "return x * 2" in str(update.edits[0].to_dict())
    assert "### Generated Outputs\n7" in mirror.asked[0]


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="'round-robin' or 'all'"):
        ReflectionOptions(components="some")  # pyright: ignore[reportArgumentType]
