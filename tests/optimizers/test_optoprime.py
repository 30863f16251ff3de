from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentopt import graph
from agentopt.graph import SetChoice, SetNumber, SetText, apply_edits
from agentopt.models import LM, BudgetExhausted, LMRateLimit, LMRefused, Request
from agentopt.optimizers import OptoPrime, PastProposal, Update

GOOD = "Sort the support ticket into billing, shipping or technical."


def says(text: Any) -> str:
    return json.dumps({"reasoning": "labels are missing", "suggestion": [{"name": "toy.instruction", "value": text}]})


@pytest.mark.anyio
async def test_a_good_model_improves_the_program(make: Any) -> None:
    world = make.classifier()
    world.lm = LM(make.client(lambda _: says(GOOD)))
    context = world.context()
    updates = await OptoPrime().propose(context)
    assert [update.edits for update in updates] == [(SetText("toy.instruction", GOOD),)]
    assert updates[0].rationale == "labels are missing"
    child = apply_edits(context.parent, updates[0].edits, context.specs)
    assert world.score(world.baseline) < 0.4
    assert world.score(child) == 1.0


GARBAGE = [
    "", "   ", "I'm sorry, I can't help with that.", "{", '{"suggestion": {"toy.instruction": "cut of', "null", "[]",
    "lorem " * 400, "```json\n```", "TERMINATE", "\x00\ud7ff",
    '{"suggestion": {"toy.instruction": ""}}', '{"suggestion": {"toy.instruction": null}}', '{"suggestion": 3}',
    '{"suggestion": {"toy.instruction": ["a", 1]}}', '{"suggestion": {"other": "x"}}',
]  # fmt: skip


@pytest.mark.anyio
@pytest.mark.parametrize("reply", GARBAGE)
async def test_D12_a_garbage_model_gives_no_crash_and_no_illegal_update(make: Any, reply: str) -> None:
    world = make.classifier(variables=True)
    client = make.client(lambda _: reply)
    world.lm = LM(client)
    context = world.context(count=2)
    updates = await OptoPrime().propose(context)
    for update in updates:
        apply_edits(context.parent, update.edits, context.specs)
    assert len(client.requests) <= 2 * 8


@pytest.mark.anyio
async def test_a_none_reply_is_dropped_and_recorded(make: Any) -> None:
    world = make.classifier()
    world.lm = LM(make.client(lambda _: ""))
    context = world.context()
    assert await OptoPrime().propose(context) == []
    assert "could not be read" in context.dropped[0].problem


@pytest.mark.anyio
async def test_an_illegal_value_is_sent_back_with_its_error_and_repaired(make: Any) -> None:
    world = make.classifier(variables=True)

    def answer(request: Request) -> str:
        again = "loses the variable" in str(request.messages[-1]["content"])
        return says(GOOD + " {ticket}" if again else GOOD)

    world.lm = LM(make.client(answer))
    updates = await OptoPrime().propose(world.context())
    assert updates[0].edits == (SetText("toy.instruction", GOOD + " {ticket}"),)


@pytest.mark.anyio
async def test_a_value_that_stays_illegal_is_dropped_after_three_repairs(make: Any) -> None:
    world = make.classifier(variables=True)
    client = make.client(lambda _: says(GOOD))
    world.lm = LM(client)
    context = world.context()
    assert await OptoPrime().propose(context) == []
    assert len(client.requests) == 4
    assert context.dropped[0].tries == 4
    assert "{ticket}" in context.dropped[0].problem


@pytest.mark.anyio
async def test_an_unreadable_answer_gets_one_repair_round_with_the_error(make: Any) -> None:
    world = make.classifier()

    def answer(request: Request) -> Any:
        if request.schema is not None:
            return LMRefused("no schemas here")
        return says(GOOD) if "could not be read" in str(request.messages[-1]["content"]) else "well, {maybe"

    world.lm = LM(make.client(answer))
    updates = await OptoPrime().propose(world.context())
    assert updates[0].edits == (SetText("toy.instruction", GOOD),)


@pytest.mark.anyio
async def test_a_proposal_that_was_tried_before_is_not_made_again(make: Any) -> None:
    world = make.classifier()
    world.lm = LM(make.client(lambda _: says(GOOD)))
    context = world.context()
    [update] = await OptoPrime().propose(context)
    child = apply_edits(context.parent, update.edits, context.specs)
    history = [PastProposal(child.hash, context.parent.hash, Update(update.edits), 0.5)]
    assert await OptoPrime().propose(world.context(history=history)) == []


@pytest.mark.anyio
async def test_numbers_and_choices_are_coerced_and_kept_in_bounds(make: Any) -> None:
    world = make.classifier()
    graph.number(0.0, 1.0, name="toy.threshold", default=0.5)
    graph.choice(["fast", "slow"], name="toy.mode")
    world.specs = dict(graph.declared_parameters())
    values = [("toy.threshold", "0.75"), ("toy.mode", "SLOW")]
    reply = {"reasoning": "", "suggestion": [{"name": name, "value": value} for name, value in values]}
    world.lm = LM(make.client(lambda _: json.dumps(reply)))
    [update] = await OptoPrime().propose(world.context())
    assert set(update.edits) == {SetNumber("toy.threshold", 0.75), SetChoice("toy.mode", "slow")}


@pytest.mark.anyio
async def test_F6_rate_limits_and_an_empty_budget_reach_the_search_loop(make: Any) -> None:
    for error in (LMRateLimit("slow down"), BudgetExhausted("no money")):
        world = make.classifier()
        world.lm = LM(make.client(lambda _, error=error: error))
        with pytest.raises(type(error)):
            await OptoPrime().propose(world.context())


@pytest.mark.anyio
async def test_without_a_model_or_rollouts_nothing_is_proposed(make: Any) -> None:
    world = make.classifier()
    assert await OptoPrime().propose(world.context()) == []
    world.lm = LM(make.client(lambda _: says(GOOD)))
    assert await OptoPrime().propose(world.context(rollouts=())) == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(
    text=st.text(max_size=120)
    | st.sampled_from(["{ticket}", "{other} {ticket}", "{ticket.x}", "{{ticket}}", "{ticket"])
)
@pytest.mark.anyio
async def test_template_variables_survive_wild_replies(make: Any, text: str) -> None:
    with graph.parameter_scope():
        world = make.classifier(variables=True, size=6)
        world.lm = LM(make.client(lambda _: says(text)))
        context = world.context(batch=2)
        for update in await OptoPrime().propose(context):
            child = apply_edits(context.parent, update.edits, context.specs)
            assert "T-1" in str(child.get("toy.instruction")).format(ticket="T-1")
