"""What every optimizer that asks a model must hold.

It finds a known optimum with a perfect model, no model can make the result worse or crash it, copied training text is
stopped, and equal contexts give equal updates.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import agentopt as ao
from agentopt.errors import UserError
from agentopt.graph import apply_edits, parameter_scope
from agentopt.models import LM, BudgetExhausted, FunctionLM, LMRateLimit, LMSettings, Request, RetryPolicy, as_lm
from agentopt.optimizers import ProposeContext, Update, resolve_optimizer
from tests.optimizers import arena

pytestmark = pytest.mark.anyio

NAMES = ("optoprime-multi", "textgrad", "opro", "reflection", "grounded")


async def proposals(name: str, context: ProposeContext) -> list[Update]:
    answer: Any = resolve_optimizer(name).propose(context)
    return await answer


def as_data(updates: list[Update]) -> str:
    return json.dumps([[edit.to_dict() for edit in update.edits] for update in updates], sort_keys=True)


@pytest.mark.parametrize("name", NAMES)
async def test_a_perfect_model_reaches_the_optimum(name: str) -> None:
    task = arena.RulesTask(k=3, rows=18)
    result = await arena.run(task, name, arena.perfect_lm(), rollouts=600)
    assert await task.score(result.best) == 1.0
    assert result.claim.status == "improved"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(2))
async def test_a_garbage_model_never_makes_it_worse_and_never_crashes(name: str, seed: int) -> None:
    base = arena.improved(arena.BASE, {1})
    task = arena.RulesTask(k=2, rows=10, base=base)
    result = await arena.run(task, name, arena.garbage_lm(seed=seed), rollouts=150, seed=seed)
    assert await task.score(result.best) >= 0.5
    assert result.claim.status != "worse"


@pytest.mark.parametrize("name", NAMES)
async def test_a_leaking_model_is_stopped(name: str) -> None:
    task = arena.RulesTask(k=2, rows=10)
    result = await arena.run(task, name, arena.leaking_lm(task), rollouts=150)
    assert not arena.leaks(task, result.best)


@pytest.mark.parametrize("name", NAMES)
async def test_a_model_that_is_right_now_and_then_still_gets_there(name: str) -> None:
    task = arena.RulesTask(k=2, rows=12)
    lm = ao.OracleLM(arena.perfect_reply, quality=0.5, seed=1)
    result = await arena.run(task, name, lm, rollouts=600)
    assert await task.score(result.best) == 1.0


@pytest.mark.parametrize("name", [*NAMES, "bootstrap"])
async def test_equal_contexts_give_equal_updates_that_are_legal_and_different(name: str) -> None:
    task = arena.RulesTask(k=3, rows=12, demos=True, base=arena.improved(arena.BASE, {1}))
    lm = as_lm(ao.OracleLM(arena.perfect_reply, quality=0.7), "optimizer")
    optimizer: Any = resolve_optimizer(name)
    found: list[str] = []
    for fresh in (optimizer, optimizer, resolve_optimizer(name)):
        context = await arena.context(task, lm, count=4)
        answer = fresh.propose(context)
        updates = answer if isinstance(answer, list) else await answer
        found.append(as_data(updates))
        hashes = [apply_edits(context.parent, update.edits, context.specs).hash for update in updates]
        assert len(set(hashes)) == len(hashes) <= 4
        assert updates
        assert all(update.source.startswith(name) for update in updates)
    assert found[0] == found[1] == found[2]


FRAGMENTS = {
    "optoprime-multi": "optoprime.task",
    "textgrad": "textgrad.update",
    "opro": "opro.task",
    "reflection": "reflection.task",
    "grounded": "grounded.task",
}
NEEDED = {
    "optoprime-multi": "{problem} {output_format}",
    "textgrad": "{value} {gradients}",
    "opro": "{history}",
    "reflection": "{current} {records}",
    "grounded": "{current}",
}


@pytest.mark.parametrize("name", NAMES)
async def test_meta_prompts_can_be_overridden_and_are_checked(name: str, tmp_path: Path) -> None:
    asked: list[str] = []

    def answer(request: Request) -> str:
        asked.append(arena.said(request))
        return arena.perfect_reply(request)

    body = f"MY WORDS {NEEDED[name]}"
    path = tmp_path / "own.txt"
    path.write_text(f"=== {FRAGMENTS[name]} ===\n{body}\n", encoding="utf-8")
    task = arena.RulesTask(k=2, rows=6)
    optimizer: Any = resolve_optimizer(name, template=path)
    await optimizer.propose(await arena.context(task, as_lm(FunctionLM(answer), "optimizer")))
    assert any("MY WORDS" in text for text in asked)
    path.write_text(f"=== {FRAGMENTS[name]} ===\n{body} {{nonsense}}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"unknown placeholder \{nonsense\}"):
        resolve_optimizer(name, template=path)


@pytest.mark.parametrize("name", NAMES)
async def test_without_a_model_nothing_is_proposed(name: str) -> None:
    task = arena.RulesTask(k=2, rows=6)
    assert await proposals(name, await arena.context(task, None)) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("error", [LMRateLimit("slow down"), BudgetExhausted("no money")])
async def test_f6_rate_limits_and_an_empty_budget_reach_the_search(name: str, error: Exception) -> None:
    task = arena.RulesTask(k=2, rows=6)
    settings = LMSettings(retry=RetryPolicy(max_wait=0.0))
    lm = LM(FunctionLM(lambda _: error), settings=settings)
    with pytest.raises(type(error)):
        await proposals(name, await arena.context(task, lm))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
@given(
    reply=st.text(max_size=80)
    | st.sampled_from(
        ["```\n```", "```", "``` ```", '{"instruction": 3}', '{"suggestion": [[[]]]}', "```json\n{]\n```", "\x00\ud7ff"]
    )
)
@pytest.mark.parametrize("name", NAMES)
async def test_wild_replies_give_legal_updates_or_drops(name: str, reply: str) -> None:
    with parameter_scope():
        task = arena.RulesTask(k=2, rows=6)
        context = await arena.context(task, as_lm(FunctionLM(lambda _: reply), "optimizer"), batch=2)
        for update in await proposals(name, context):
            apply_edits(context.parent, update.edits, context.specs)


@pytest.mark.parametrize(("name", "driver"), [("grounded+bootstrap", "bayes"), ("reflection", "pareto")])
async def test_the_pairs_that_make_mipro_and_gepa(name: str, driver: str) -> None:
    if driver == "bayes":
        pytest.importorskip("optuna")
    task = arena.RulesTask(k=4, rows=16, demos=True, base=arena.improved(arena.BASE, {1}))
    lm = ao.OracleLM(arena.perfect_reply, quality=0.6)
    result = await arena.run(task, name, lm, driver=driver, rollouts=500)
    assert await task.score(result.best) == 1.0
