"""From an answer to a legal update: one chance to be readable, a few to be legal, the rest dropped and recorded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import agentopt as ao
from agentopt import graph
from agentopt.errors import UserError
from agentopt.graph import SetNumber, SetText
from agentopt.models import FunctionLM, LMOptions, Request, as_lm
from agentopt.optimizers import Playbook, ProposeContext, Symbolic, Update, load_templates
from agentopt.optimizers._repair import Draft, propose_legal
from tests.optimizers import arena

pytestmark = pytest.mark.anyio


class Script:
    """Drafts in order, whatever is asked; keeps the requests."""

    def __init__(self, drafts: Sequence[Draft]) -> None:
        self.requests: list[Request] = []
        self._drafts = list(drafts)
        self.lm = as_lm(FunctionLM(self._answer), "optimizer")

    def _answer(self, request: Request) -> str:
        self.requests.append(request)
        return str(len(self.requests) - 1)

    def read(self, reply: Any) -> Draft:
        return self._drafts[min(int(reply), len(self._drafts) - 1)]


async def setup() -> ProposeContext:
    task = arena.RulesTask(k=1, rows=1, base="Do {this}.")
    ao.number(0.0, 1.0, name="rules.number", default=0.5)
    assert task.program
    specs = {name: spec for name, spec in graph.declared_parameters().items() if name.startswith("rules.")}
    return await arena.context(task, None, specs=specs, rollouts=())


async def run(script: Script, context: ProposeContext, repairs: int = 3) -> Update | None:
    return await propose_legal(
        context,
        script.lm,
        [{"role": "user", "content": "?"}],
        options=LMOptions(),
        read=script.read,
        source="test",
        repairs=repairs,
    )


GOOD = SetText("rules.instruction", "Do {this} well.")
LOST = SetText("rules.instruction", "Do it well.")
NUMBER = SetNumber("rules.number", 0.7)
OUTSIDE = SetNumber("rules.number", 7.0)


async def test_legal_edits_are_taken_at_once_with_the_reason() -> None:
    script = Script([Draft([GOOD, NUMBER], "why")])
    assert await run(script, await setup()) == Update((GOOD, NUMBER), "why", "test")
    assert len(script.requests) == 1


async def test_only_the_illegal_part_is_sent_back_and_only_that_is_replaced() -> None:
    other = SetNumber("rules.number", 0.1)
    script = Script([Draft([LOST, NUMBER]), Draft([GOOD, other])])
    context = await setup()
    assert await run(script, context) == Update((NUMBER, GOOD), "", "test")
    asked = str(script.requests[1].messages[-1]["content"])
    assert "{this}" in asked
    assert "rules.number" not in asked
    assert context.dropped == []


async def test_what_stays_illegal_is_dropped_after_the_repairs_and_the_rest_is_used() -> None:
    script = Script([Draft([LOST, NUMBER])])
    context = await setup()
    assert await run(script, context) == Update((NUMBER,), "", "test")
    assert len(script.requests) == 4
    [drop] = context.dropped
    assert drop.tries == 4
    assert "{this}" in drop.problem
    script = Script([Draft([OUTSIDE])])
    context = await setup()
    assert await run(script, context, repairs=1) is None
    assert [drop.tries for drop in context.dropped] == [2]


async def test_an_empty_answer_takes_the_illegal_edits_back() -> None:
    script = Script([Draft([LOST, NUMBER]), Draft()])
    context = await setup()
    assert await run(script, context) == Update((NUMBER,), "", "test")
    assert len(script.requests) == 2
    assert [drop.tries for drop in context.dropped] == [2]


async def test_an_unreadable_answer_gets_one_chance_an_unreadable_repair_costs_a_try() -> None:
    script = Script([Draft(unreadable="no JSON"), Draft([GOOD])])
    assert await run(script, await setup()) == Update((GOOD,), "", "test")
    script = Script([Draft(unreadable="no JSON")])
    context = await setup()
    assert await run(script, context) is None
    assert len(script.requests) == 2
    assert "no JSON" in context.dropped[0].problem
    script = Script([Draft([LOST]), Draft(unreadable="what?"), Draft([GOOD])])
    assert await run(script, await setup()) == Update((GOOD,), "", "test")
    assert len(script.requests) == 3


async def test_problems_of_reading_are_sent_back_and_the_whole_answer_may_change_then() -> None:
    script = Script([Draft([NUMBER], problems=["unknown operation 'fly'"]), Draft([GOOD])])
    assert await run(script, await setup()) == Update((NUMBER, GOOD), "", "test")
    assert "unknown operation 'fly'" in str(script.requests[1].messages[-1]["content"])
    stubborn = Script([Draft(problems=["unknown operation 'fly'"])])
    context = await setup()
    assert await run(stubborn, context) is None
    assert [drop.problem for drop in context.dropped] == ["unknown operation 'fly'"]


async def test_no_edits_and_no_problems_is_no_change() -> None:
    script = Script([Draft()])
    context = await setup()
    assert await run(script, context) is None
    assert context.dropped == []
    assert len(script.requests) == 1


async def test_several_edits_of_one_parameter_are_judged_in_their_order() -> None:
    first = SetText("rules.instruction", "First {this}.")
    script = Script(
        [Draft([first, LOST, GOOD])],
    )
    update = await run(script, await setup(), repairs=0)
    assert update is not None
    assert update.edits == (first, GOOD)


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (Playbook, {"lessons": ["Say why."], "operations": [{"op": "drop", "ids": ["p9"], "text": ""}]}),
        (Symbolic, {"comments": "Bad.", "suggestion": "Better.", "analysis": "", "text": "Do it."}),
    ],
)
async def test_the_words_of_a_repair_can_be_overridden(optimizer: Any, said: Any, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("=== repair.illegal ===\nNOT SO: {problems}\n=== repair.unreadable ===\nNOT SO: {error}\n")
    asked: list[str] = []

    def answer(request: Request) -> str:
        asked.append(str(request.messages[-1]["content"]))
        return json.dumps(said)

    task = arena.RulesTask(k=1, rows=2, base="Do {this}.")
    ao.principles(["Be kind."], name="rules.book")
    specs = {name: spec for name, spec in graph.declared_parameters().items() if name.startswith("rules.")}
    rollouts = (await arena.context(task, None)).rollouts
    context = await arena.context(task, as_lm(FunctionLM(answer), "optimizer"), specs=specs, rollouts=rollouts)
    await optimizer(template=own).propose(context)
    assert any(text.startswith("NOT SO:") for text in asked)


@pytest.mark.parametrize("name", ["reflection.task", "textgrad.update", "opro.task", "symbolic.prompt", "code.task"])
def test_a_fragment_without_what_it_is_about_is_refused(name: str, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text(f"=== {name} ===\nImprove it.\n")
    with pytest.raises(UserError, match=f"'{name}' must contain the placeholder"):
        load_templates(own)
