from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import agentopt as ao
from agentopt.errors import UserError
from agentopt.graph import AddPrinciple, Candidate, CountPrinciples, Edit, SetText, declared_parameters
from agentopt.optimizers import LearningRate, Symbolic, SymbolicOptions
from agentopt.optimizers.symbolic import EditBound, change_ratio
from tests.optimizers import arena
from tests.optimizers.symbolic_model import Model, last, question

WIDE = EditBound(edits=4, ratio=1.0, tokens=500)


def parent() -> tuple[Candidate, dict[str, Any]]:
    specs = dict(declared_parameters())
    return Candidate({name: spec.default for name, spec in specs.items()}), specs


def kept(bound: EditBound, edits: list[Edit]) -> tuple[list[Edit], list[str]]:
    candidate, specs = parent()
    return bound.keep(candidate, edits, specs)


@pytest.mark.parametrize(
    ("schedule", "factors"), [("constant", (1, 1, 1)), ("linear", (1, 0.65, 0.3)), ("cosine", (1, 0.65, 0.3))]
)
def test_the_rate_falls_by_its_schedule_and_stays_at_its_floor(schedule: Any, factors: tuple[float, ...]) -> None:
    rate = LearningRate(edits=10, tokens=1000, schedule=schedule, steps=11, floor=0.3)
    assert [round(rate.factor(iteration), 9) for iteration in (0, 5, 10)] == list(factors)
    assert rate.factor(500) == rate.factor(10)
    assert [rate.at(iteration).edits for iteration in (0, 10)] == [10, round(10 * factors[-1])]
    assert [rate.at(iteration).tokens for iteration in (0, 10)] == [1000, round(1000 * factors[-1])]


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(1, 30), st.floats(0.01, 1.0))
def test_the_rate_never_rises(schedule: Any, steps: int, floor: float) -> None:
    rate = LearningRate(schedule=schedule, steps=steps, floor=floor)
    bounds = [rate.at(iteration) for iteration in range(40)]
    for before, after in pairwise(bounds):
        assert after.edits <= before.edits
        assert after.ratio <= before.ratio + 1e-9
        assert after.tokens <= before.tokens
    assert all(bound.edits >= 1 and bound.tokens >= 1 and bound.ratio > 0 for bound in bounds)


@pytest.mark.parametrize("wrong", [{"edits": 0}, {"ratio": 0.0}, {"ratio": 1.5}, {"floor": 0.0}, {"schedule": "step"}])
def test_a_rate_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="LearningRate"):
        LearningRate(**wrong)


@pytest.mark.parametrize("wrong", [{"kinds": ()}, {"kinds": ("code",)}, {"order": "up"}, {"cases": 0}, {"loss": "x"}])
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="SymbolicOptions"):
        SymbolicOptions(**wrong)


def test_change_ratio_counts_words() -> None:
    words = [f"w{number}" for number in range(100)]
    text = " ".join(words)
    assert change_ratio(text, text) == 0.0
    assert change_ratio(text, " ".join(words[:90])) == pytest.approx(0.1)
    assert change_ratio(text, " ".join([*words[:50], "new", *words[51:]])) == pytest.approx(0.01)
    assert change_ratio(text, "all of it is other") == pytest.approx(1.0)
    # A sentence may always be added to a very short text.
    assert change_ratio("Answer.", "Answer. Be brief and exact.") <= 0.2


@given(st.text("ab \n", max_size=60), st.text("ab \n", max_size=60))
def test_change_ratio_is_a_distance(one: str, two: str) -> None:
    assert change_ratio(one, two) == change_ratio(two, one)
    assert 0.0 <= change_ratio(one, two) <= 1.0
    assert (change_ratio(one, two) == 0.0) == (one.split() == two.split())


def test_too_many_edits_are_cut_and_named() -> None:
    ao.principles(name="p")
    edits: list[Edit] = [AddPrinciple("p", f"Rule number {number} is new.") for number in range(6)]
    good, problems = kept(WIDE, edits)
    assert good == edits[:4]
    assert len(problems) == 2
    assert "at most 4" in problems[0]


def test_a_rewrite_beyond_the_ratio_is_refused_and_one_within_is_kept() -> None:
    words = [f"w{number}" for number in range(60)]
    ao.prompt(" ".join(words), name="p")
    bound = replace(WIDE, ratio=0.2)
    little, much = " ".join([*words[:55], "x"]), "x " * 60
    assert kept(bound, [SetText("p", little)]) == ([SetText("p", little)], [])
    good, problems = kept(bound, [SetText("p", much)])
    assert good == []
    assert "at most 20%" in problems[0]


def test_added_tokens_are_summed_over_the_update() -> None:
    ao.prompt("Begin.", name="p")
    ao.prompt("Begin.", name="q")
    long = "Begin. " + "word " * 40
    good, problems = kept(replace(WIDE, tokens=60), [SetText("p", long), SetText("q", long)])
    assert good == [SetText("p", long)]
    assert "at most 60 may be added" in problems[0]


def test_counters_do_not_count_and_illegal_edits_are_left_to_their_own_checks() -> None:
    ao.principles(["One rule."], name="p")
    edits: list[Edit] = [CountPrinciples("p", ("p1",)), AddPrinciple("p", "Two."), SetText("nowhere", "x")]
    assert kept(replace(WIDE, edits=1), edits) == (edits, [])


@pytest.mark.anyio
async def test_an_answer_that_is_too_bold_is_sent_back_and_then_within_the_bound() -> None:
    task = arena.RulesTask(base=" ".join(f"step{number}" for number in range(60)))
    small = task.base + " Be exact."

    def answer(request: Any) -> dict[str, str]:
        return {"analysis": "", "text": small if "may change now, keep" in last(request) else "all other words " * 20}

    model = Model({"text": answer})
    options = SymbolicOptions(rate=LearningRate(ratio=0.1, schedule="constant"))
    [update] = await Symbolic(options).propose(await arena.context(task, model))
    assert update.edits == (SetText("rules.instruction", small),)
    assert len([request for request in model.requests if model.kind(request) == "text"]) == 2


@pytest.mark.anyio
async def test_the_bound_is_worded_and_decays_over_iterations() -> None:
    task = arena.RulesTask()
    texts: list[str] = []
    for iteration in (0, 30):
        model = Model({"text": {"analysis": "", "text": "Process the item well."}})
        await Symbolic().propose(await arena.context(task, model, iteration=iteration))
        texts.append(question(model.asked("text")[0]))
    assert "At most 6 changes" in texts[0]
    assert "Be bold" in texts[0]
    assert "At most 2 changes" in texts[1]
    assert "small, careful changes" in texts[1]


@pytest.mark.anyio
async def test_what_stays_too_bold_is_dropped_after_three_repairs() -> None:
    task = arena.RulesTask(base=" ".join(f"step{number}" for number in range(60)))
    model = Model({"text": {"analysis": "", "text": "all other words " * 20}})
    context = await arena.context(task, model)
    options = SymbolicOptions(rate=LearningRate(ratio=0.1, schedule="constant"))
    assert await Symbolic(options).propose(context) == []
    assert len([request for request in model.requests if model.kind(request) == "text"]) == 4
    [dropped] = context.dropped
    assert (dropped.source, dropped.tries) == ("symbolic.prompt", 4)
    assert "may change now" in dropped.problem
