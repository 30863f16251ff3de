"""`ao.capsule`: the order of the steps, and that text and recommendation are decided by different things."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

import agentopt as ao
from agentopt.capsules import Horizon

WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "glade", "heath", "inlet", "jetty", "knoll", "quarry")
PROSE = " ".join(
    f"The {word} report was filed in building {number} by the {word} team, and it covers {number * 3} pages."
    for number, word in enumerate(WORDS, start=11)
)
MESSAGES = [
    {"role": "system", "content": "You sort tickets. Answer with exactly one of: billing, shipping."},
    {"role": "user", "content": PROSE},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f"}}]},
    {"role": "tool", "tool_call_id": "c1", "content": PROSE},
    {"role": "user", "content": "Which team filed the cedar report?"},
]


def small(limit: int) -> ao.TokenBudget:
    return ao.TokenBudget(limit, tokenizer="words")


def test_a_text_within_its_budget_is_returned_as_it_is() -> None:
    made = ao.capsule("Be brief.  ", budget=small(5))
    assert (made.text, made.made, made.recommended) == ("Be brief.  ", "unchanged", "original")


def test_edits_that_lose_nothing_are_enough_where_they_are() -> None:
    text = "One two three.\n\n\n\n\n" + json.dumps({"a": [1, 2, 3], "b": {"c": None}}, indent=8)
    budget = ao.TokenBudget(60, tokenizer="bytes")
    made = ao.capsule(text, budget=budget)
    assert made.made == "lossless"
    assert made.tokens <= 60
    assert made.lossless_saved == made.original_tokens - made.tokens
    assert not made.dropped
    with_all = ao.capsule(text, budget=budget, options=ao.CapsuleOptions(lossless=False))
    assert with_all.made == "extract"


def test_extraction_keeps_whole_sentences_and_reports_the_rest() -> None:
    made = ao.capsule(PROSE, budget=small(60))
    assert made.made == "extract"
    assert made.tokens <= 60
    assert made.recommended == "capsule"
    for unit in made.dropped:
        assert unit.text in PROSE
    assert any("11" in unit.spans or "13" in unit.spans or unit.spans for unit in made.dropped)
    assert all(check.passed for check in made.checks)
    assert made.best == made.text


def test_keep_patterns_and_slots_are_never_dropped() -> None:
    text = PROSE + " Ask about ticket-77. Fill in {name} here."
    made = ao.capsule(text, budget=small(30), keep=[r"ticket-\d+"])
    assert "ticket-77" in made.text
    assert "{name}" in made.text
    assert ("ticket-77", "pattern") in made.kept


def test_the_minimum_that_an_infeasible_budget_names_is_feasible() -> None:
    text = " ".join(f"Keep slot {{s{number}}} here." for number in range(20))
    with pytest.raises(ao.BudgetInfeasible) as told:
        ao.capsule(text, budget=small(3))
    made = ao.capsule(text, budget=small(told.value.minimum))
    assert made.tokens <= told.value.minimum
    assert all(f"{{s{number}}}" in made.text for number in range(20))
    assert isinstance(told.value, ao.UserError)


def test_a_query_decides_what_stays() -> None:
    made = ao.capsule(PROSE, budget=small(20), query="Where was the quarry report filed?")
    assert "quarry" in made.text
    assert "heath" in made.text or "amber" not in made.text


def test_messages_keep_their_order_the_pairing_of_tools_and_the_last_turn() -> None:
    made = ao.capsule(MESSAGES, budget=ao.TokenBudget(200))
    assert made.tokens <= 200
    assert made.messages is not None
    assert made.messages[-1] == MESSAGES[-1]
    assert "exactly one of: billing, shipping" in made.messages[0]["content"]
    call = next(place for place, message in enumerate(made.messages) if message.get("tool_calls"))
    assert made.messages[call + 1]["role"] == "tool"
    assert made.messages[call + 1]["tool_call_id"] == "c1"


def test_tool_definitions_count_against_the_budget() -> None:
    tool = {"type": "function", "function": {"name": "look_up", "description": "Look. " * 30, "parameters": {}}}
    plain = ao.capsule(MESSAGES, budget=ao.TokenBudget(250))
    counted = ao.capsule(MESSAGES, budget=ao.TokenBudget(250), options=ao.CapsuleOptions(tools=(tool,)))
    assert counted.original_tokens > plain.original_tokens
    assert len(counted.text) < len(plain.text)


@pytest.mark.parametrize(
    ("source", "arguments", "said"),
    [
        ("x", {"mode": "magic"}, "mode: found 'magic'"),
        ("x", {"mode": "rewrite"}, "needs a model"),
        ("x", {"mode": "extract", "lm": ao.FunctionLM(lambda request: "x")}, "asks no model"),
        ("x", {"mode": "trained"}, "trained capsulator"),
        ([{"content": "x"}], {}, "messages[0]"),
        ([{"role": "user", "content": 3}], {}, "messages[0].content"),
        ("a (b", {"keep": ["(unclosed"]}, "unclosed"),
    ],
)
def test_bad_arguments_are_one_sentence(source: Any, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ao.UserError) as told:
        ao.capsule(source, budget=small(5), **arguments)
    assert said in str(told.value)


@pytest.mark.parametrize("limit", [0, -3, 1.5, True, "9"])
def test_a_budget_is_a_whole_number_of_at_least_one(limit: Any) -> None:
    with pytest.raises(ao.UserError, match="budget: found"):
        ao.TokenBudget(limit)


def writer(*replies: str) -> ao.FunctionLM:
    asked = iter(range(10**6))
    return ao.FunctionLM(lambda request: replies[next(asked) % len(replies)], name="writer")


def test_a_model_that_writes_nonsense_gives_way_to_extraction_with_a_reason(tmp_path: Path) -> None:
    options = ao.CapsuleOptions(store=tmp_path / "a.db")
    made = ao.capsule(PROSE, budget=small(60), lm=writer("I cannot do that.", "Team 99 left on Mars."), options=options)
    plain = ao.capsule(PROSE, budget=small(60))
    assert made.made == "extract"
    assert made.text == plain.text
    assert made.fallback


def test_a_capsule_is_kept_and_found_again_and_its_original_has_a_handle(tmp_path: Path) -> None:
    from agentopt.capsules import Originals
    from agentopt.store import Store

    asked: list[int] = []

    def reply(request: Any) -> str:
        asked.append(1)
        return "nothing of use"

    with Store.open(tmp_path / "a.db") as store:
        options = ao.CapsuleOptions(store=store)
        arguments: dict[str, Any] = {"budget": small(60), "lm": ao.FunctionLM(reply, name="w"), "options": options}
        first = ao.capsule(PROSE, **arguments)
        calls = len(asked)
        again = ao.capsule(PROSE, **arguments)
        assert again == first
        assert calls
        assert len(asked) == calls
        assert Originals(store).get(first.handle) == PROSE


def test_a_capsule_survives_its_json_form() -> None:
    made = ao.capsule(PROSE, budget=small(60), options=ao.CapsuleOptions(horizon=Horizon("openai/gpt-4.1-mini", 50)))
    assert ao.Capsule.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_the_price_changes_the_recommendation_and_not_the_text() -> None:
    text = PROSE * 6
    plain = ao.capsule(text, budget=ao.TokenBudget(900))
    # 2,700 tokens are cached by the provider, 900 are below what it caches: over many calls the original is cheaper.
    horizon = Horizon("anthropic/claude-opus-4-5", 500, output_tokens=10)
    priced = ao.capsule(text, budget=ao.TokenBudget(900), options=ao.CapsuleOptions(horizon=horizon))
    assert priced.text == plain.text
    assert priced.cost is not None
    assert (priced.recommended == "original") == (priced.cost.advice == "do not compress")


def agent(prompt: str, number: int) -> str:
    return "right" if "amber" in prompt or number % 3 else "wrong"


ROWS = [{"number": number, "expected": "right"} for number in range(200)]


def test_with_a_task_the_capsule_must_be_shown_not_to_harm(tmp_path: Path) -> None:
    options = ao.CapsuleOptions(store=tmp_path / "a.db")
    task = ao.Task(ROWS, agent, "exact_match")
    arguments: dict[str, Any] = {"budget": small(40), "task": task, "options": options}
    good = ao.capsule(PROSE, keep=["amber"], **arguments)
    assert good.gate is not None
    assert (good.gate.verdict, good.recommended) == ("accepted", "capsule")
    bad = ao.capsule(PROSE, query="Where were the quarry and heath reports filed?", **arguments)
    assert "amber" not in bad.text
    assert bad.gate is not None
    assert bad.gate.verdict == "rejected"
    assert (bad.recommended, bad.best) == ("original", PROSE)


def test_with_few_rows_the_verdict_is_undecided_and_the_user_decides() -> None:
    task = ao.Task(ROWS[:8], agent, "exact_match")
    made = ao.capsule(PROSE, budget=small(40), keep=["amber"], task=task)
    assert made.gate is not None
    assert (made.gate.verdict, made.recommended) == ("undecided", "original")
    bold = ao.CapsuleOptions(undecided="capsule")
    assert ao.capsule(PROSE, budget=small(40), keep=["amber"], task=task, options=bold).recommended == "capsule"
    mistakes: list[dict[str, Any]] = [{"undecided": "neither"}, {"scorer": "bm52"}, {"seed": -1}]
    for wrong in mistakes:
        with pytest.raises(ao.UserError, match=next(iter(wrong))):
            ao.CapsuleOptions(**wrong)


def test_the_plain_call_also_works_inside_a_running_loop() -> None:
    async def inside() -> tuple[str, str]:
        return ao.capsule(PROSE, budget=small(30)).text, (await ao.acapsule(PROSE, budget=small(30))).text

    one, other = asyncio.run(inside())
    assert one == other


def test_what_is_made_anew_for_every_question_is_priced_in_every_call() -> None:
    horizon = Horizon("openai/gpt-4.1-mini", 50, cached=True)
    text = PROSE * 12

    def cost(**arguments: Any) -> float:
        prefix = arguments.pop("prefix", None)
        options = ao.CapsuleOptions(horizon=horizon, prefix=prefix)
        made = ao.capsule(text, budget=ao.TokenBudget(1200), options=options, **arguments)
        assert made.cost is not None
        return made.cost.capsule_usd

    assert cost(query="cedar") > cost(query="cedar", prefix="static")


@pytest.mark.parametrize(
    ("source", "arguments", "says"),
    [
        (None, {}, "source: found NoneType"),
        (b"text", {}, "source: found bytes"),
        ({"role": "user", "content": "text"}, {}, "source: found dict"),
        ("text", {"budget": 300}, "budget: found 300"),
        ("text", {"keep": [3]}, "keep: found 3"),
    ],
)
def test_arguments_of_another_type_are_named(source: Any, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ao.UserError, match=says):
        ao.capsule(source, **{"budget": small(30), **arguments})


def test_models_without_a_name_of_their_own_share_no_stored_capsule(tmp_path: Path) -> None:
    options = ao.CapsuleOptions(store=tmp_path / "a.db")
    asked: list[str] = []

    def double(word: str) -> ao.FunctionLM:
        return ao.FunctionLM(lambda request: asked.append(word) or word)

    for word in ("one", "two"):
        ao.capsule(PROSE, budget=small(40), lm=double(word), options=options)
    assert {"one", "two"} <= set(asked)


def test_a_pattern_that_would_take_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentopt.capsules.units._keep._PATIENCE", 0.2)
    with pytest.raises(ao.UserError, match="took more than"):
        ao.capsule("a" * 60 + "! " + PROSE, budget=small(40), keep=["(a|aa)*$"])
