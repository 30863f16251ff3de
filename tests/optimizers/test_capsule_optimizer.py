"""The capsulator as an optimizer: shorter prompts at the same score, never a worse one, variables and order kept."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

import agentopt as ao
from agentopt.errors import UserError
from agentopt.graph import ParameterSpec
from agentopt.models import Request
from agentopt.optimizers import Auto, Capsules, CapsulesOptions, PastProposal, ProposeContext, resolve_optimizer
from tests.optimizers.arena import RULES, RulesTask, context, garbage_lm, perfect_lm, run

pytestmark = pytest.mark.anyio

FILLER = (
    "You are a careful assistant who works for a large company with many offices.",
    "Our company was founded long ago and we are proud of every parcel that reaches its owner.",
    "Thank you for the attention that you give to this work every single day.",
    "People like a friendly tone, and a friendly tone makes the day better.",
    "The weather in the harbour is often windy, and the gulls are loud in the morning.",
    "We hope that you enjoy working on the items that are shown to you here.",
)
BLOATED = "\n\n".join(
    [*FILLER[:3], "Process the item.", RULES[0], RULES[1], *FILLER[3:], *FILLER[:2], RULES[2], *FILLER[2:]]
)
SHORTER = ao.TuneOptions(screen_size=8, max_failures=50, objectives=("score", "tokens"))


def bloated(**changes: Any) -> RulesTask:
    """The arena's task, solved from the start by a prompt that is mostly filler."""
    return RulesTask(k=3, base=BLOATED, **changes)


def instruction(update: Any, program: str = "rules") -> str:
    """The text that an update gives the instruction."""
    return next(edit.text for edit in update.edits if edit.name == f"{program}.instruction")


@pytest.mark.parametrize("driver", ["auto", "greedy", "climb"])
async def test_a_bloated_prompt_ends_shorter_with_the_same_score(driver: str) -> None:
    task = bloated()
    result = await run(task, "capsule", garbage_lm(), driver=driver, rollouts=1500, options=SHORTER)
    text = str(result.best["rules.instruction"])
    assert len(text) < 0.6 * len(BLOATED)
    assert all(rule in text for rule in RULES[:3])
    assert await task.score(result.best) == 1.0
    tokens = [row["prompt_tokens"] for row in result.trade_offs if row["score"] == 1.0]
    assert min(tokens) < 0.8 * max(tokens)


async def test_with_the_score_alone_nothing_shorter_replaces_a_perfect_prompt() -> None:
    task = bloated()
    result = await run(task, "capsule", garbage_lm(), rollouts=400)
    assert result.best["rules.instruction"] == BLOATED


async def test_auto_shortens_only_when_tokens_count() -> None:
    task = bloated()
    given = await context(task, count=12)
    names = {arm.optimizer.name for arm in Auto().arms(given)}
    wanted = {arm.optimizer.name for arm in Auto().arms(replace(given, objectives=("score", "tokens")))}
    assert "capsule" not in names
    assert wanted == names | {"capsule"}
    result = await run(task, "auto", garbage_lm(), rollouts=1500, options=SHORTER)
    assert len(str(result.best["rules.instruction"])) < len(BLOATED)
    assert await task.score(result.best) == 1.0


async def test_proposals_are_shorter_legal_and_the_same_each_time() -> None:
    task = bloated()
    given = await context(task, count=40)
    first = await Capsules().propose(given)
    assert first == await Capsules().propose(given)
    texts = [instruction(update) for update in first]
    assert len(set(texts)) == len(texts) > 5
    assert all(0 < len(text) < len(BLOATED) for text in texts)
    assert {update.source for update in first} >= {"capsule.extract", "capsule.drop"}


async def test_what_was_tried_is_not_proposed_again() -> None:
    task = bloated()
    given = await context(task, count=1)
    tried: list[PastProposal] = []
    texts: list[str] = []
    for _ in range(6):
        (update,) = await Capsules().propose(replace(given, history=tuple(tried)))
        texts.append(instruction(update))
        child = given.parent.with_values({"rules.instruction": texts[-1]})
        tried.append(PastProposal(child.hash, given.parent.hash, update))
    assert len(set(texts)) == 6


def template_context(text: str, count: int = 30, lm: Any = None) -> ProposeContext:
    """A context of one prompt of its own."""
    prompt = ao.prompt(text, name="letter.instruction")
    spec: ParameterSpec = prompt.spec
    parent = ao.Candidate({spec.name: spec.default})
    return ProposeContext("letter", parent, {spec.name: spec}, RulesTask(k=1).train, count=count, lm=lm)


async def test_variables_and_escaped_braces_stay() -> None:
    text = (
        "You write letters. You are friendly, and you like your work very much indeed.\n\n"
        "Answer the question {question} for the customer {customer!r} in a few words.\n\n"
        "The weather is often windy. The gulls are loud in the morning, and the sea is grey.\n\n"
        'Reply with JSON such as {{"answer": "..."}}.'
    )
    given = template_context(text)
    updates = await Capsules().propose(given)
    assert updates and not given.dropped
    for update in updates:
        shorter = update.edits[0].text  # pyright: ignore[reportAttributeAccessIssue]
        assert "{question}" in shorter and "{customer!r}" in shorter and '{{"answer": "..."}}' in shorter
        shorter.format(question="q", customer="c")


async def test_only_the_placeholder_stays_not_every_mention_of_its_name() -> None:
    text = (
        "Answer {question} in a few words.\n\n"
        "Every question is dear to us, and a question a day keeps us young.\n\n"
        "People say that the question matters more than what is said about it."
    )
    updates = await Capsules().propose(template_context(text))
    assert any("dear to us" not in instruction(update, "letter") for update in updates)


async def test_one_sentence_that_must_stay_has_nothing_shorter() -> None:
    given = template_context("Answer {question}.")
    assert await Capsules().propose(given) == []


async def test_fewer_demonstrations_are_tried_down_to_none() -> None:
    task = bloated(demos=True)
    shown = [{"input": f"item {number}", "output": "red" if number % 2 else "blue"} for number in range(8)]
    given = await context(task, count=60)
    parent = given.parent.with_values({"rules.examples": shown})
    updates = await Capsules().propose(replace(given, parent=parent))
    sets = [edit.items for update in updates for edit in update.edits if edit.name == "rules.examples"]  # pyright: ignore[reportAttributeAccessIssue]
    assert sorted(len(items) for items in sets) == [0, 2, 4, 6, 7]
    four = next(items for items in sets if len(items) == 4)
    assert sorted(item["output"] for item in four) == ["blue", "blue", "red", "red"]
    assert all(item in shown for item in four)


async def test_a_model_that_writes_is_asked_and_its_junk_is_dropped() -> None:
    task = bloated()
    given = replace(await context(task, garbage_lm(), count=60), optimizer_model="writer-70b")
    updates = await Capsules().propose(given)
    assert updates and all(update.source != "capsule.rewrite" for update in updates)
    assert any(drop.source == "capsule.rewrite" for drop in given.dropped)


def telegraphic(request: Request) -> str:
    """The text of a request for a rewriting without its function words; marks are written as they are asked for."""
    material = re.split(r"^-----\w+-----$", str(request.messages[1]["content"]), flags=re.MULTILINE)[1]
    text = re.sub(r"\[\[(\d+):[^\]]*\]\]", r"[[\1]]", material)
    return re.sub(
        r"\b(?:You are|a|the|who|for|with|that|was|and we are|this|is|of|it|to|you|are|We)\s", "", text
    ).strip()


async def test_a_good_rewriting_is_proposed() -> None:
    text = " ".join(FILLER) + " Process the item. " + " ".join(RULES[:3])
    lm = perfect_lm(telegraphic)
    given = replace(template_context(text, count=60, lm=lm), optimizer_model="writer-70b")
    updates = await Capsules(CapsulesOptions(ratios=(0.8,))).propose(given)
    found = [update.edits[0].text for update in updates if update.source == "capsule.rewrite"]  # pyright: ignore[reportAttributeAccessIssue]
    assert found and all(rule.partition(":")[0] in found[0] for rule in RULES[:3]), given.dropped
    weak = await Capsules().propose(replace(given, optimizer_model="small-1b"))
    assert all(update.source != "capsule.rewrite" for update in weak)


def test_it_has_a_name_and_checks_its_options() -> None:
    assert resolve_optimizer("capsule").name == "capsule"
    for bad in ({"ratios": ()}, {"ratios": (1.5,)}, {"parts": 1}, {"max_calls": -1}):
        with pytest.raises(UserError):
            CapsulesOptions(**bad)  # pyright: ignore[reportArgumentType]
