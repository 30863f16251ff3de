"""OPRO: scored solutions in ascending order, bounded; a few examples; nothing of traces or feedback."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.graph import Candidate, SetDemos, SetText, apply_edits
from agentopt.models import FunctionLM, as_lm
from agentopt.optimizers import Opro, OproOptions, PastProposal, ProposeContext, Update
from tests.optimizers import arena

pytestmark = pytest.mark.anyio


def past(context: ProposeContext, parent: Candidate, text: str, **scores: Any) -> tuple[Candidate, PastProposal]:
    update = Update((SetText("rules.instruction", text),))
    child = apply_edits(parent, update.edits, context.specs)
    return child, PastProposal(child.hash, parent.hash, update, **scores)


def history_text(optimizer: Opro, context: ProposeContext) -> str:
    return str(optimizer.messages(context)[-1]["content"])


async def with_history(count: int = 3) -> ProposeContext:
    task = arena.RulesTask(k=2, rows=8, demos=True)
    context = await arena.context(task, None)
    baseline = context.parent
    found: list[PastProposal] = []
    first, entry = past(context, baseline, "Text with 0.7.", screen=0.4, validation=0.7, screen_parent=0.1)
    found.append(entry)
    _, entry = past(context, baseline, "Text with 0.3.", screen=0.3, screen_parent=0.2)
    found.append(entry)
    _, entry = past(context, first, "Text with 0.5.", screen=0.5, screen_parent=0.4)
    found.append(entry)
    for number in range(3, count):
        found.append(past(context, baseline, f"Filler {number}.", screen=number / 10_000)[1])
    return await arena.context(task, None, history=found, parent=first, rollouts=())


async def test_solutions_stand_in_ascending_order_with_their_best_known_scores() -> None:
    context = await with_history()
    text = history_text(Opro(), context)
    order = re.findall(r"(Process the item|Text with 0\.\d)", text)
    assert order == ["Process the item", "Text with 0.3", "Text with 0.5", "Text with 0.7"]
    assert [float(score) for score in re.findall(r"^score: (\S+)$", text, re.MULTILINE)] == [0.15, 0.3, 0.5, 0.7]


async def test_the_history_is_bounded_and_the_best_stay() -> None:
    context = await with_history(400)
    text = history_text(Opro(OproOptions(solutions=5)), context)
    assert len(re.findall(r"^score:", text, re.MULTILINE)) == 5
    assert text.index("Filler") < text.index("Text with 0.3") < text.index("Text with 0.7")
    small = history_text(Opro(OproOptions(history_tokens=60)), context)
    assert "Text with 0.7" in small
    assert "Filler" not in small


async def test_where_only_some_parameters_may_be_edited_the_others_edits_are_passed_over() -> None:
    context = await with_history()
    first = context.history[0]
    both = Update((SetDemos("rules.examples", []), SetText("rules.instruction", "Text with 0.9.")))
    history = [*context.history, PastProposal("x", first.candidate_hash, both, 0.9)]
    alone = {"rules.instruction": context.specs["rules.instruction"]}
    text = history_text(Opro(), replace(context, specs=alone, history=history))
    assert re.findall(r"Text with 0\.\d", text) == [f"Text with 0.{number}" for number in (3, 5, 7, 9)]


async def test_a_few_training_examples_are_shown_and_neither_feedback_nor_calls() -> None:
    task = arena.RulesTask(k=2, rows=8)
    context = await arena.context(task, None)
    text = history_text(Opro(), context)
    assert sum(str(row.inputs["question"]) in text for row in task.train) == 3
    assert "was not followed" not in text
    assert "answer_item" not in text


async def test_several_samples_of_one_question() -> None:
    texts = iter(["One.", "Two.", "Three."])
    asked: list[Any] = []

    def answer(request: Any) -> Any:
        asked.append(request)
        return {"reasoning": "", "suggestion": [{"name": "rules.instruction", "value": next(texts)}]}

    task = arena.RulesTask(k=2, rows=4)
    updates = await Opro().propose(await arena.context(task, as_lm(FunctionLM(answer), "optimizer"), count=3))
    assert [update.edits for update in updates] == [
        (SetText("rules.instruction", text),) for text in ("One.", "Two.", "Three.")
    ]
    assert len({request.messages[-1]["content"] for request in asked}) == 1
    assert [request.options.sample for request in asked] == [0, 1, 2]


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="solutions must be at least 1"):
        OproOptions(solutions=0)
