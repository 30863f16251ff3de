"""Grounded instructions: the data summary is made once per data set, the original comes first, tips vary, bounded."""

from __future__ import annotations

from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.graph import SetText
from agentopt.models import FunctionLM, Request, as_lm
from agentopt.optimizers import Grounded, GroundedOptions
from tests.optimizers import arena

pytestmark = pytest.mark.anyio


class Scribe:
    """Answers the four kinds of question of the proposer; counts them."""

    def __init__(self, **answers: Any) -> None:
        self.asked: dict[str, list[str]] = {kind: [] for kind in ("observe", "summary", "program", "module", "task")}
        self._answers = {
            "observe": "Parcels wait at gates.",
            "summary": "SUMMARY of parcels.",
            "program": "PROGRAM that answers.",
            "module": "MODULE that decides.",
            **answers,
        }
        self.lm = as_lm(FunctionLM(self._answer), "optimizer")

    def _answer(self, request: Request) -> Any:
        text = str(request.messages[-1]["content"])
        starts = {"These are": "observe", "Observations": "summary", "A program": "program", "The program:": "module"}
        kind = next((kind for start, kind in starts.items() if text.startswith(start)), "task")
        self.asked[kind].append(text)
        if kind == "task" and "task" not in self._answers:
            return {"instruction": f"Instruction {len(self.asked['task'])}."}
        return self._answers[kind]

    @property
    def counts(self) -> list[int]:
        return [len(asked) for asked in self.asked.values()]


async def test_the_writer_is_told_about_data_program_module_demonstrations_and_a_tip() -> None:
    scribe = Scribe()
    task = arena.RulesTask(k=2, rows=12, base=arena.improved(arena.BASE, {1}))
    [update] = await Grounded().propose(await arena.context(task, scribe.lm))
    assert update.edits == (SetText("rules.instruction", "Instruction 1."),)
    [text] = scribe.asked["task"]
    assert "SUMMARY of parcels." in text
    assert "PROGRAM that answers." in text
    assert "MODULE that decides." in text
    assert "Process the item." in text
    assert "answer_item" in text
    assert sum(f"{row.inputs['question']} -> {row.expected}" in text for row in task.train) == 3
    assert "was not followed" not in text


async def test_summaries_are_made_once_for_a_data_set_and_not_kept_for_another() -> None:
    scribe = Scribe()
    grounded = Grounded(GroundedOptions(batches=2, batch_size=4))
    task = arena.RulesTask(k=2, rows=12)
    first = await grounded.propose(await arena.context(task, scribe.lm, count=3))
    assert len(first) == 3
    assert scribe.counts == [2, 1, 1, 1, 3]
    await grounded.propose(await arena.context(task, scribe.lm, iteration=1))
    assert scribe.counts == [2, 1, 1, 1, 4]
    other = await arena.context(task, scribe.lm, train=task.validation, rollouts=())
    await grounded.propose(other)
    assert scribe.counts == [4, 2, 1, 1, 5]


async def test_the_first_instruction_is_the_original_and_all_are_different() -> None:
    scribe = Scribe()
    task = arena.RulesTask(k=2, rows=12)
    context = await arena.context(task, scribe.lm)
    found = await Grounded().instructions(context, context.specs["rules.instruction"], 4)
    assert found == [arena.BASE, "Instruction 1.", "Instruction 2.", "Instruction 3."]
    assert await Grounded().instructions(await arena.context(task, None), context.specs["rules.instruction"], 4) == [
        arena.BASE
    ]


async def test_tips_and_samples_differ_between_the_proposals_of_one_call() -> None:
    scribe = Scribe()
    task = arena.RulesTask(k=2, rows=12)
    updates = await Grounded().propose(await arena.context(task, scribe.lm, count=8))
    assert len({update.rationale for update in updates}) > 2
    assert len(set(scribe.asked["task"])) > 2


@pytest.mark.parametrize("junk", ["", "I'm sorry, I can't.", "{", "complete"])
async def test_junk_summaries_fall_back_to_what_was_counted(junk: str) -> None:
    scribe = Scribe(observe=junk, summary=junk, program=junk, module=junk)
    task = arena.RulesTask(k=2, rows=12)
    [_] = await Grounded().propose(await arena.context(task, scribe.lm))
    [text] = scribe.asked["task"]
    assert "12 examples with the input" in text


async def test_a_fresh_object_and_one_with_summaries_propose_the_same() -> None:
    task = arena.RulesTask(k=2, rows=12)
    lm = as_lm(arena.perfect_lm(), "optimizer")
    used = Grounded()
    await used.propose(await arena.context(task, lm, count=2))
    later = await arena.context(task, lm, count=2, iteration=5, seed=9)
    assert await used.propose(later) == await Grounded().propose(later)


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="batches must be at least 1"):
        GroundedOptions(batches=0)
