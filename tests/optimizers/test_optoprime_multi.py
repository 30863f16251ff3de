"""OptoPrime with several candidates: spread, second thoughts, several models; data and not likeness decides."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.graph import SetText
from agentopt.models import BudgetExhausted, FunctionLM, LMRefused, ModelsConfig, Request, as_lm, use
from agentopt.optimizers import OptoPrimeMulti, OptoPrimeMultiOptions, PastProposal, Update
from tests.optimizers import arena

pytestmark = pytest.mark.anyio


class Talker:
    """Suggests a text numbered by its calls; keeps the requests."""

    def __init__(self, name: str = "talker", say: Any = None) -> None:
        self.requests: list[Request] = []
        self.name = name
        self._say = say
        self.lm = as_lm(FunctionLM(self._answer), "optimizer")

    def _answer(self, request: Request) -> Any:
        self.requests.append(request)
        text = self._say(request) if self._say is not None else f"{self.name} {len(self.requests)}"
        if isinstance(text, BaseException):
            return text
        return {"reasoning": "because", "suggestion": [{"name": "rules.instruction", "value": text}]}


def texts(updates: list[Update]) -> list[str]:
    return [edit.text for update in updates for edit in update.edits if isinstance(edit, SetText)]


async def test_candidates_come_from_a_spread_of_temperatures_and_all_different_ones_are_returned() -> None:
    talker = Talker()
    task = arena.RulesTask(k=2, rows=4)
    updates = await OptoPrimeMulti().propose(await arena.context(task, talker.lm, count=5))
    assert texts(updates) == [f"talker {number}" for number in range(1, 6)]
    assert [request.options.temperature for request in talker.requests] == [0.0, 0.5, 0.9, 1.2, 0.0]
    assert len({request.options.sample for request in talker.requests}) == 5


async def test_with_one_candidate_a_step_the_steps_take_turns() -> None:
    one, two = Talker("one"), Talker("two")
    task = arena.RulesTask(k=2, rows=4)
    options = OptoPrimeMultiOptions(models=(one.lm, two.lm), temperatures=(0.0, 1.0), refine_every=0)
    context = await arena.context(task, None)
    found = [texts(await OptoPrimeMulti(options).propose(replace(context, iteration=turn))) for turn in range(4)]
    assert found == [["one 1"], ["two 1"], ["one 2"], ["two 2"]]
    assert [request.options.temperature for request in one.requests] == [0.0, 1.0]


async def test_alike_texts_are_not_merged_only_equal_ones_are_asked_again() -> None:
    answers = iter(["Do it.", "Do it.", "Do it!", "do it", "Do it now."])
    talker = Talker(say=lambda _: next(answers))
    task = arena.RulesTask(k=2, rows=4)
    updates = await OptoPrimeMulti().propose(await arena.context(task, talker.lm, count=4))
    assert texts(updates) == ["Do it.", "Do it!", "do it", "Do it now."]


async def test_a_model_that_repeats_itself_is_asked_a_bounded_number_of_times() -> None:
    talker = Talker(say=lambda _: "Always this.")
    task = arena.RulesTask(k=2, rows=4)
    context = await arena.context(task, talker.lm, count=4)
    assert texts(await OptoPrimeMulti().propose(context)) == ["Always this."]
    assert len(talker.requests) == 5
    talker.requests.clear()
    await OptoPrimeMulti(OptoPrimeMultiOptions(max_calls=3)).propose(context)
    assert len(talker.requests) == 3


async def test_every_third_candidate_is_second_thoughts_on_its_own_latest_one() -> None:
    talker = Talker()
    task = arena.RulesTask(k=2, rows=4)
    updates = await OptoPrimeMulti().propose(await arena.context(task, talker.lm, count=3))
    third = talker.requests[2].messages
    assert "talker 2" in str(third[-2]["content"])
    assert third[-2]["role"] == "assistant"
    assert "not been measured" in str(third[-1]["content"])
    assert [update.source for update in updates] == [
        "optoprime-multi.fresh",
        "optoprime-multi.fresh",
        "optoprime-multi.refined",
    ]


async def test_second_thoughts_start_from_the_best_measured_one_of_earlier_rounds() -> None:
    talker = Talker()
    task = arena.RulesTask(k=2, rows=4)
    history = [
        PastProposal(text, "p", Update((SetText("rules.instruction", text),), "", source), score, screen_parent=0.25)
        for text, score, source in [
            ("weak own", 0.5, "optoprime-multi.fresh"),
            ("best own", 0.75, "optoprime-multi.fresh"),
            ("better, but of another", 1.0, "reflection"),
        ]
    ]
    options = OptoPrimeMultiOptions(refine_every=2)
    context = await arena.context(task, talker.lm, count=2, history=history)
    await OptoPrimeMulti(options).propose(context)
    second = talker.requests[1].messages
    assert json.loads(str(second[-2]["content"]))["suggestion"][0]["value"] == "best own"
    assert "0.75" in str(second[-1]["content"])
    assert "0.25" in str(second[-1]["content"])


async def test_several_models_take_turns_as_roles_clients_and_lms() -> None:
    one, two, three = Talker("one"), Talker("two"), Talker("three")
    task = arena.RulesTask(k=2, rows=4)
    options = OptoPrimeMultiOptions(models=("expert", two.lm.client, three.lm), refine_every=0)
    with use(ModelsConfig({"expert": one.lm.client})):
        updates = await OptoPrimeMulti(options).propose(await arena.context(task, None, count=6))
    assert texts(updates) == ["one 1", "two 1", "three 1", "one 2", "two 2", "three 2"]


async def test_a_role_without_a_model_is_a_clear_error() -> None:
    task = arena.RulesTask(k=2, rows=4)
    options = OptoPrimeMultiOptions(models=("expert",))
    context = await arena.context(task, Talker().lm)
    with use(ModelsConfig({"agent": FunctionLM(lambda _: "")})), pytest.raises(UserError, match=r"'expert'.*agent"):
        await OptoPrimeMulti(options).propose(context)


async def test_a_failing_model_is_left_out_and_raises_only_when_nothing_else_came() -> None:
    bad = Talker("bad", say=lambda _: LMRefused("no"))
    good = Talker("good")
    task = arena.RulesTask(k=2, rows=4)
    context = await arena.context(task, good.lm, count=3)
    options = OptoPrimeMultiOptions(models=(bad.lm, good.lm), refine_every=0)
    assert texts(await OptoPrimeMulti(options).propose(context)) == ["good 1", "good 2", "good 3"]
    assert "no" in context.dropped[0].problem
    with pytest.raises(LMRefused):
        await OptoPrimeMulti(OptoPrimeMultiOptions(models=(bad.lm,))).propose(context)
    broke = Talker("broke", say=lambda _: BudgetExhausted("spent"))
    with pytest.raises(BudgetExhausted):
        await OptoPrimeMulti(OptoPrimeMultiOptions(models=(good.lm, broke.lm))).propose(context)


async def test_the_screen_picks_the_best_of_several_by_data() -> None:
    """A confident majority of bad candidates does not outvote the good one."""
    task = arena.RulesTask(k=2, rows=12)
    calls = iter(range(1000))

    def say(_: Request) -> str:
        number = next(calls)
        return task.optimum if number % 4 == 3 else f"Think hard, variant {number}."

    result = await arena.run(task, OptoPrimeMulti(), Talker(say=say).lm, rollouts=600)
    assert result.best.get("rules.instruction") == task.optimum


def test_options_are_checked() -> None:
    cases: list[dict[str, Any]] = [
        {"temperatures": ()},
        {"temperatures": (3.0,)},
        {"refine_every": 1},
        {"max_calls": 0},
    ]
    for wrong in cases:
        with pytest.raises(UserError, match=next(iter(wrong))):
            OptoPrimeMultiOptions(**wrong)
