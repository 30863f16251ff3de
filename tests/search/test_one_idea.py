"""An optimizer that has one idea about each parent: every driver builds on it, though menus and elites are used up."""

from __future__ import annotations

import asyncio

import pytest

from agentopt.graph import Candidate, ParameterSpec, SetText
from agentopt.optimizers import ProposeContext, Tpe, Update
from agentopt.search import Budget, TuneOptions
from agentopt.search._bayes import Bayes
from agentopt.search._loop import Search, Setup
from agentopt.search._simulate import SyntheticRows, splits
from tests.search.test_drivers import every_driver, run

TOP = 2
WIDE = {"budget": Budget(rollouts=1500), "options": TuneOptions(screen_size=24, block_size=8)}
"""Minibatches on which a true gain shows."""


class OneIdea:
    """One more star than the parent has, however many proposals are wanted."""

    name = "one-idea"

    def propose(self, context: ProposeContext) -> list[Update]:
        (first, *_) = sorted(context.specs)
        text = str(context.parent.get(first))
        return [Update((SetText(first, f"{text}*"),), source=self.name)] if text.count("*") < TOP else []


def stars(candidate: Candidate) -> float:
    return 0.1 + 0.8 * str(candidate.get("part.a")).count("*") / TOP


@every_driver
@pytest.mark.parametrize("seed", range(4))
def test_one_idea_at_a_time_leads_to_the_top(driver: str, seed: int) -> None:
    specs = {"part.a": ParameterSpec(name="part.a", kind="prompt", default="start")}
    source = SyntheticRows(stars, seed=seed, alike=1.0)
    ran = run(driver, OneIdea(), source=source, seed=seed, specs=specs, **WIDE)
    assert str(ran.outcome.best.get("part.a")).count("*") == TOP


@pytest.mark.parametrize("seed", range(4))
def test_bayes_searches_numbers_for_as_long_as_the_budget_carries(seed: int) -> None:
    specs = {
        name: ParameterSpec(name=name, kind="number", default=0.0, low=0.0, high=1.0) for name in ("heat", "depth")
    }

    def skill(candidate: Candidate) -> float:
        heat, depth = (float(str(candidate.get(name, 0.0))) for name in specs)
        return 0.9 - abs(heat - 0.7) / 2 - abs(depth - 0.4) / 2

    setup = Setup(
        run_id="r",
        program_name="synthetic",
        specs=specs,
        source=SyntheticRows(skill, seed=seed),
        optimizer=Tpe(),
        driver=Bayes(),
        splits=splits(train=20, validation=24, test=40, seed=seed),
        budget=Budget(rollouts=900),
        emit=lambda event: None,
        options=TuneOptions(block_size=8),
        seed=seed,
    )
    search = Search(setup)
    outcome = asyncio.run(search.run())
    assert skill(outcome.best) > 0.75
    assert search.ledger.rollouts > 700
