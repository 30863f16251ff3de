"""`CapsuleLM`: what reaches the model behind it, what never changes, policies, traces, and use wherever a client is."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agentopt as ao
from agentopt.capsules import BudgetInfeasible, TokenBudget
from agentopt.capsules.agents._middleware import CapsuleLM, LiveOptions
from agentopt.capsules.agents._originals import Originals
from agentopt.capsules.counting._parts import parts_of
from agentopt.errors import UserError
from agentopt.models import (
    LM,
    FunctionLM,
    LMOptions,
    PriceTable,
    Reply,
    Request,
    ScriptedLM,
    UnknownModel,
    embedded_available,
    use,
)
from agentopt.models import ModelsConfig as Config
from agentopt.store import Store

pytestmark = pytest.mark.anyio

LONG = "The order was shipped on 3 May to the harbour office. " * 12
BUDGET = TokenBudget(6000, "bytes")
TOOL = {"type": "function", "function": {"name": "search", "description": "Find orders.", "parameters": {}}}


class Model(FunctionLM):
    """Answers with the number of what it got; keeps the requests."""

    def __init__(self, name: str = "double/model") -> None:
        self.requests: list[Request] = []
        super().__init__(self._answer, name=name)

    def _answer(self, request: Request) -> str:
        self.requests.append(request)
        return f"answer {len(request.messages)}"


def transcript(steps: int, *, task: str = "Find the order. Never email the customer.") -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You are a careful agent."},
        {"role": "user", "content": task},
    ]
    for number in range(steps):
        call = {"id": f"c{number}", "type": "function", "function": {"name": "search", "arguments": "{}"}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": f"c{number}", "content": f"{number}: {LONG}"})
    return messages


def count(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> int:
    return BUDGET.meter(messages, tools=tools or None).total([part.text for part in parts_of(messages)])


async def test_below_the_budget_the_request_is_what_was_given() -> None:
    model = Model()
    lm = CapsuleLM(model, TokenBudget(100_000, "bytes"))
    messages = transcript(3)
    reply = await lm.complete(messages, tools=[TOOL])
    assert reply.text == "answer 8"
    assert list(model.requests[0].messages) == messages and model.requests[0].tools == (TOOL,)
    assert model.requests[0].model == "double/model"
    report = lm.report()
    assert (report.requests, report.unchanged, report.compressed, report.masked) == (1, 1, 0, 0)
    assert report.tokens == report.original_tokens == count(messages, [TOOL])


async def test_above_the_budget_it_holds_and_tools_schemas_and_options_are_never_touched() -> None:
    model = Model()
    lm = CapsuleLM(model, BUDGET, keep=["harbour"])
    schema = {"type": "object", "properties": {"order": {"type": "integer"}}, "required": ["order"]}
    options = LMOptions(max_tokens=7, stop=("END",), extra={"tier": "flex"})
    request = Request("any", tuple(transcript(40)), (TOOL,), schema, ("a", "b"), options)
    await lm.send(request)
    sent = model.requests[0]
    assert (sent.tools, sent.schema, sent.choices, sent.options) == ((TOOL,), schema, ("a", "b"), options)
    assert count(sent.messages, [TOOL]) + len(json.dumps(schema)) <= 6000
    assert list(sent.messages[:2]) == transcript(0) and list(sent.messages[-6:]) == transcript(40)[-6:]
    report = lm.report()
    assert report.compressed == 1 and report.masked > 0 and report.steps > 0 and report.tokens < report.original_tokens
    assert request.messages == tuple(transcript(40))


async def test_the_same_messages_give_the_same_bytes_whatever_came_before() -> None:
    grown, fresh = Model(), Model()
    lm = CapsuleLM(grown, BUDGET)
    for steps in range(30):
        await lm.complete(transcript(steps))
    prefixes = [json.dumps(request.messages)[:-1] for request in grown.requests]
    frozen = sum(later.startswith(earlier) for earlier, later in itertools.pairwise(prefixes))
    assert frozen == 29 - lm.report().epochs and frozen > 12
    other = CapsuleLM(fresh, BUDGET)
    for steps in (29, 12, 29, 20):
        await other.complete(transcript(steps))
        assert fresh.requests[-1].messages == grown.requests[steps].messages
    assert other.name == lm.name != CapsuleLM(fresh, BUDGET, keep=["x"]).name
    assert lm.report().read > lm.report().tokens // 3


TURNS = st.lists(
    st.tuples(
        st.sampled_from(["tool", "chat", "note"]), st.sampled_from(["yes", LONG, "Error: no. " + LONG, "{x} " * 9])
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=30)
@given(TURNS, st.randoms(use_true_random=False), st.integers(1500, 6000))
def test_what_is_sent_is_a_function_of_the_messages(
    turns: list[tuple[str, str]], draw: random.Random, limit: int
) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Begin."}]
    places = [1]
    for number, (kind, text) in enumerate(turns):
        if kind == "tool":
            messages += transcript(number + 1)[-2:]
            messages[-1]["content"] = text
        elif kind == "chat":
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": f"And {number}?"}]
        else:
            messages.append({"role": "user", "content": text})
        places.append(len(messages))
    lm = CapsuleLM(Model(), TokenBudget(limit, "bytes"), on_infeasible="pass")
    asked = [lm.compress(Request("m", tuple(messages[:place]))).messages for place in places]
    order = list(enumerate(places))
    draw.shuffle(order)
    other = CapsuleLM(Model(), TokenBudget(limit, "bytes"), on_infeasible="pass")
    for number, place in order:
        assert other.compress(Request("m", tuple(messages[:place]))).messages == asked[number]
    assert lm.report().to_dict() == other.report().to_dict()


CONTENTS: list[Any] = [
    "",
    None,
    LONG,
    "ok",
    "x" * 900,
    "\ud83d",
    "日本語。" * 50,
    [{"type": "text", "text": LONG}, {"type": "image_url", "image_url": {"url": "data:x"}}],
    [],
    "[masked: 12 tokens]",
    "Observation: " + LONG,
    "Never stop. Error: no. " * 9,
    "```py\nprint(f'{a}')\n```\n" * 20,
]


def any_message(draw: random.Random) -> dict[str, Any]:
    roles = ["user", "assistant", "tool", "system", "developer", "function", "assistant", "tool", "user"]
    message: dict[str, Any] = {"role": draw.choice(roles), "content": draw.choice(CONTENTS)}
    if message["role"] == "assistant" and draw.random() < 0.6:
        function = {"name": draw.choice(["f", "ask_user"]), "arguments": draw.choice(["{}", LONG, ""])}
        calls: list[Any] = [{"id": f"c{draw.randint(0, 5)}", "type": "function", "function": function}]
        message["tool_calls"] = calls if draw.random() < 0.9 else [None, {"id": 3}, {"function": None}]
    if message["role"] == "tool":
        message["tool_call_id"] = f"c{draw.randint(0, 5)}"
    return message


@settings(max_examples=80)
@given(st.randoms(use_true_random=False), st.sampled_from([50, 300, 1000, 3000, 8000]), st.booleans())
def test_any_request_fits_or_says_what_would(draw: random.Random, limit: int, history: bool) -> None:
    messages = [any_message(draw) for _ in range(draw.randint(1, 25))]
    before = json.dumps(messages)
    options = LiveOptions(keep_last=draw.randint(1, 4), longest=draw.choice([None, None, 200, 20]))
    mode = draw.choice(["auto", "mask", "extract"])
    request = Request("m", tuple(messages))
    for _ in range(2):
        budget = TokenBudget(limit, "bytes")
        lm = CapsuleLM(Model(), budget, keep=["harbour"], mode=mode, history=history, options=options)  # pyright: ignore[reportArgumentType]
        try:
            sent = lm.compress(request).messages
        except BudgetInfeasible as error:
            assert limit < error.minimum
            limit = error.minimum  # and with this it succeeds
        else:
            assert count(sent) <= limit
            break
    else:
        raise AssertionError("the minimum was not enough")
    assert json.dumps(messages) == before


async def test_many_conversations_at_the_same_time_do_not_mix() -> None:
    model = Model()
    lm = CapsuleLM(model, BUDGET)

    async def talk(name: str) -> None:
        for steps in (5, 10, 15):
            await lm.complete(transcript(steps, task=f"Task of {name}."))

    async with anyio.create_task_group() as tasks:
        for number in range(8):
            tasks.start_soon(talk, str(number))
    alone = Model()
    single = CapsuleLM(alone, BUDGET)
    for number in range(8):
        for steps in (5, 10, 15):
            await single.complete(transcript(steps, task=f"Task of {number}."))
    key = lambda request: json.dumps(request.messages)  # noqa: E731
    assert sorted(map(key, model.requests)) == sorted(map(key, alone.requests))
    assert lm.report() == single.report() and lm.report().requests == 24


async def test_what_left_is_in_the_originals() -> None:
    model, originals = Model(), Originals(tokenizer="bytes")
    lm = CapsuleLM(model, BUDGET, options=LiveOptions(originals=originals, keep_last=1))
    plain = CapsuleLM(model, BUDGET, history=False)
    for client in (lm, plain):
        await client.complete(transcript(30))
        lines = [m["content"] for m in model.requests[-1].messages if "[masked: " in str(m["content"])]
        assert lines
        for line in lines:
            assert LONG in client.originals.get(line[line.rindex("cap:") :])


async def test_modes() -> None:
    model = Model()
    await CapsuleLM(model, BUDGET, mode="extract", history=False).complete(transcript(30))
    assert "[masked" not in json.dumps(model.requests[-1].messages)
    chat: list[dict[str, Any]] = []
    for number in range(30):
        chat += [
            {"role": "user", "content": f"Question {number}? Do not guess. {LONG}"},
            {"role": "assistant", "content": f"Answer {number}. {LONG}"},
        ]
    chat.append({"role": "user", "content": "What was said of question 7?"})
    await CapsuleLM(model, BUDGET).complete(chat)
    assert count(model.requests[-1].messages) <= 6000 and len(model.requests[-1].messages) == 61
    with pytest.raises(BudgetInfeasible):
        await CapsuleLM(model, BUDGET, mode="mask").complete(chat)


async def test_what_must_stay_and_does_not_fit_is_raised_or_passed_on() -> None:
    model = Model()
    messages = transcript(2, task=LONG * 20)
    strict = CapsuleLM(model, BUDGET)
    with pytest.raises(BudgetInfeasible) as caught:
        await strict.complete(messages)
    assert strict.report().infeasible == 1 and not model.requests
    await CapsuleLM(model, TokenBudget(caught.value.minimum, "bytes")).complete(messages)
    lenient = CapsuleLM(model, BUDGET, on_infeasible="pass")
    await lenient.complete(messages)
    assert list(model.requests[-1].messages) == messages and lenient.report().infeasible == 1


async def test_a_long_turn_full_of_documents_is_shortened_when_asked_for() -> None:
    model = Model()
    documents = "\n\n".join(
        f"Document {n} is about the {w}." for n, w in enumerate(["tide", "moon", "order 1042"] * 200)
    )
    lm = CapsuleLM(model, TokenBudget(2000, "bytes"), options=LiveOptions(longest=1500))
    await lm.complete(f"Answer from these.\n\n{documents}\n\nWhat is said of order 1042?")
    text = model.requests[0].messages[0]["content"]
    assert len(text) <= 1500 and "Answer from these." in text and "What is said of order 1042?" in text
    assert text.count("order 1042") > text.count("tide")


async def test_at_known_prices_what_costs_more_is_passed_on_and_said() -> None:
    prices = PriceTable().override({"anthropic/claude-haiku-4-5": (1.0, 5.0, 0.1)})
    soft, hard, unknown = Model("anthropic/claude-haiku-4-5"), Model("anthropic/claude-haiku-4-5"), Model()
    budget = TokenBudget(12_000, "bytes")
    passing = CapsuleLM(soft, budget, options=LiveOptions(prices=prices, dearer="pass"))
    holding = CapsuleLM(hard, budget, options=LiveOptions(prices=prices))
    without = CapsuleLM(unknown, budget, options=LiveOptions(prices=prices))
    for steps in range(5, 26):
        for lm in (passing, holding, without):
            await lm.complete(transcript(steps))
    assert all(count(request.messages) <= 12_000 for model in (hard, unknown) for request in model.requests)
    assert max(count(request.messages) for request in soft.requests) > 12_000
    assert passing.report().passed > 0 and passing.report().epochs < holding.report().epochs
    assert holding.report().passed == without.report().passed == 0
    fresh = CapsuleLM(soft, budget, options=LiveOptions(prices=prices, dearer="pass"))
    await fresh.send(Request("m", ({"role": "user", "content": "Begin. " + LONG}, *transcript(2)[2:], *transcript(0))))
    assert fresh.report().passed == 0


async def test_it_plays_a_role_and_its_record_is_in_the_trace(tmp_path: Path) -> None:
    model = Model()
    lm = CapsuleLM(model, BUDGET)
    with Store.open(tmp_path / "s.db") as store:
        config = Config({"agent": lm}, settings=LM(model, cache=store).settings)
        with use(config), ao.record() as recording:
            first = await ao.lm("agent").complete(transcript(20))
            again = await ao.lm("agent").complete(transcript(20))
        assert first.text == again.text and again.cached and len(model.requests) == 1
    calls = [op for op in recording.trace.ops if op.op == "lm"]
    done = [op for op in recording.trace.ops if op.op == "capsule"]
    assert len(calls) == 2 and len(done) == 1
    meta = done[0].meta or {}
    assert meta["limit"] == 6000 and meta["compressed"] == 1 and meta["masked"] > 0
    assert meta["tokens"] <= 6000 < meta["original_tokens"]
    assert (calls[0].meta or {})["model"] == lm.name and lm.name.endswith("#double/model")


def test_it_is_configured_like_any_model() -> None:
    ao.configure(models={"agent": CapsuleLM(ScriptedLM({"": "fine"}), BUDGET)})
    try:
        assert ao.lm("agent").complete_sync(transcript(20)).text == "fine"
    finally:
        from agentopt.models import reset

        reset()
    assert CapsuleLM(LM(Model()), BUDGET).complete_sync(transcript(20)).text.startswith("answer ")


async def test_streams_are_compressed_too() -> None:
    model = Model()
    pieces = [piece async for piece in LM(CapsuleLM(model, BUDGET)).stream(transcript(30))]
    assert "".join(pieces).startswith("answer ") and count(model.requests[0].messages) <= 6000
    assert CapsuleLM(model, BUDGET).deterministic and CapsuleLM(model, BUDGET).cacheable
    assert not CapsuleLM(ScriptedLM(["a"]), BUDGET).deterministic


async def test_repair_rounds_and_long_requests_work() -> None:
    model = ScriptedLM(["neither", "yes"])
    reply = await CapsuleLM(model, BUDGET).complete(transcript(30), choices=["yes", "no"])
    assert reply.text == "yes" and len(model.requests) == 2
    assert all(count(request.messages) <= 6000 for request in model.requests)
    big = Model()
    messages = transcript(20)
    messages[3]["content"] = "a row of a table\n" * 20_000  # enough characters to leave the event loop
    await CapsuleLM(big, BUDGET).complete(messages)
    assert count(big.requests[0].messages) <= 6000


def test_unusable_arguments() -> None:
    unusable: list[dict[str, Any]] = [{"mode": "rewrite"}, {"on_infeasible": "drop"}, {"keep": ["("]}]
    for arguments in unusable:
        with pytest.raises(UserError):
            CapsuleLM(Model(), BUDGET, **arguments)
    unusable = [{"longest": 0}, {"room": 2.0}, {"dearer": "maybe"}]
    for arguments in unusable:
        with pytest.raises(UserError):
            LiveOptions(**arguments)


def test_a_model_that_cannot_be_reached_yet_is_named_at_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    lm = CapsuleLM("openai/gpt-4.1-mini", BUDGET)
    assert lm.name.endswith("#openai/gpt-4.1-mini") and lm.cacheable and not lm.deterministic
    Config({"agent": lm})
    with pytest.raises(UnknownModel, match="OPENAI_API_KEY"):
        lm.complete_sync(transcript(2))
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    assert lm.client.name == "openai/gpt-4.1-mini"


@pytest.mark.embedded
@pytest.mark.skipif(not embedded_available(), reason="embedded engine or weights not installed")
async def test_the_embedded_model_answers_a_compressed_request() -> None:
    budget = TokenBudget(600, "embedded")
    lm = CapsuleLM("embedded/smollm2-135m-instruct", budget)
    messages = [*transcript(6)[:2]]
    for number in range(6):
        messages.append({"role": "assistant", "content": f"Action: search {number}"})
        messages.append({"role": "user", "content": f"Observation: {LONG}" if number < 5 else "Say one word."})
    reply: Reply = await lm.complete(messages, options=LMOptions(max_tokens=4))
    report = lm.report()
    assert report.compressed == 1 and report.tokens <= 600 < report.original_tokens
    assert abs(reply.usage.input_tokens - report.tokens) <= 8
    await lm.aclose()
