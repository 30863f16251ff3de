"""Append-only histories: the frozen prefix, epochs, what never leaves, the hard budget, and going on from a file."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.capsules import BudgetInfeasible, TokenBudget
from agentopt.capsules.agents._counter import Counter
from agentopt.capsules.agents._epochs import Sent, call_cost, extra_cost, leftover_cost
from agentopt.capsules.agents._history import History, HistoryOptions
from agentopt.capsules.agents._steps import read_all
from agentopt.capsules.counting._parts import parts_of
from agentopt.capsules.counting._tokenizers import resolve_tokenizer
from agentopt.capsules.gating._caching import CachingRule
from agentopt.errors import UserError

LONG = "The order was shipped on 3 May to the harbour office. " * 12
SYSTEM = {"role": "system", "content": "You are a careful agent. Answer in JSON."}
TASK = {"role": "user", "content": "Find the order. Do not email the customer."}
LATE = HistoryOptions(early=False)
NO_CACHE = CachingRule(1 << 60, scope="no cache")


def call(number: int, tool: str = "search", text: str = "") -> dict[str, Any]:
    function = {"name": tool, "arguments": json.dumps({"q": number})}
    calls = [{"id": f"c{number}", "type": "function", "function": function}]
    return {"role": "assistant", "content": text, "tool_calls": calls}


def result(number: int, text: str = LONG) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"c{number}", "content": f"{number}: {text}"}


def count(messages: list[dict[str, Any]], tokenizer: str = "bytes") -> int:
    return TokenBudget(1, tokenizer).meter(messages).total([part.text for part in parts_of(messages)])


def drive(history: History, steps: int, text: str = LONG) -> list[list[dict[str, Any]]]:
    """The messages of each call of an agent that makes `steps` steps."""
    history.extend([SYSTEM, TASK])
    sent = [history.messages()]
    for number in range(steps):
        history.extend([call(number), result(number, text)])
        sent.append(history.messages())
    return sent


def check_pairs(messages: list[dict[str, Any]]) -> None:
    """Every call is answered right after it, and nothing answers what was not called."""
    open_calls: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            open_calls.remove(message["tool_call_id"])
        else:
            assert not open_calls
            open_calls = [one["id"] for one in message.get("tool_calls", [])]


@pytest.mark.parametrize("tokenizer", ["o200k_base", "bytes", "words", "embedded"])
def test_counting_again_and_again_gives_what_the_meter_gives(tokenizer: str) -> None:
    try:
        resolve_tokenizer(tokenizer)
    except UserError:
        pytest.skip("vocabulary not on this machine")
    messages = [SYSTEM, TASK, call(1, text="é\ud83d"), result(1), {"role": "user", "name": "Ann", "content": "日本"}]
    tool = {"type": "function", "function": {"name": "search", "description": LONG, "parameters": {}}}
    counter = Counter(TokenBudget(1, tokenizer), [tool])
    for end in range(1, 6):
        meter = TokenBudget(1, tokenizer).meter(messages[:end], tools=[tool])
        expected = meter.total([part.text for part in parts_of(messages[:end])])
        assert counter.total(messages[:end]) == counter.total(messages[:end]) == expected


def test_what_left_for_the_budget_stays_out_when_more_is_masked_for_the_price() -> None:
    options = HistoryOptions(caching=CachingRule(100), room=0.5)
    history = History(TokenBudget(30_000, "bytes"), keep_last=2, options=options)
    history.extend([SYSTEM, TASK])
    epochs: list[tuple[str, int]] = []
    for number in range(150):
        assert count(history.messages()) <= 30_000
        if history.last is not None and history.last.compaction is not None and history.last.epoch:
            epochs.append((history.last.epoch, history.last.compaction.steps))
        history.extend([call(number), result(number)])
    assert [steps for _, steps in epochs] == sorted(steps for _, steps in epochs)
    first = next(place for place, (_, steps) in enumerate(epochs) if steps)
    assert {reason for reason, _ in epochs[first:]} == {"budget", "price"}


def test_below_the_budget_nothing_changes() -> None:
    history = History(TokenBudget(1_000_000, "bytes"), options=LATE)
    sent = drive(history, 20)
    assert sent[-1][-1] == result(19)
    assert len(sent[-1]) == 42 and history.usage.epochs == 0
    assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(sent))


def test_the_prefix_is_frozen_between_epochs_and_the_budget_always_holds() -> None:
    history = History(TokenBudget(12_000, "bytes"), keep_last=2, options=LATE)
    sent = drive(history, 60)
    assert all(count(messages) <= 12_000 for messages in sent)
    rewritten = sum(json.dumps(b[: len(a)]) != json.dumps(a) for a, b in itertools.pairwise(sent))
    assert rewritten == history.usage.epochs and 2 <= rewritten <= 20
    for messages in sent:
        check_pairs(messages)
        assert SYSTEM in messages and TASK in messages
    assert sent[-1][-4:] == [call(58), result(58), call(59), result(59)]
    usage = history.usage
    assert usage.calls == 61 and usage.read + usage.written == usage.sent == sum(map(count, sent))
    assert usage.read > 2 * usage.written


def test_what_left_can_be_read_back_by_its_handle() -> None:
    history = History(TokenBudget(6000, "bytes"), keep_last=1, options=LATE)
    sent = drive(history, 30)[-1]
    masked = [m["content"] for m in sent if m["role"] == "tool" and "masked: " in m["content"]]
    assert masked and history.last is not None and history.last.compaction is not None
    for line in masked:
        assert history.originals.get(line[line.rindex("capsule handle") :]) in [f"{n}: {LONG}" for n in range(30)]
    noted = next(line for line in masked if "steps around here left out" in line)
    transcript = history.originals.get(noted.partition("capsule handle ")[2][:20])
    assert "search" in transcript and LONG in transcript


def test_constraints_corrections_errors_and_keep_spans_never_leave() -> None:
    history = History(TokenBudget(9000, "bytes"), keep_last=2, keep=[r"TICKET-\d+"], options=LATE)
    filler = "I was thinking about the weather and the sea today. " * 10
    said = [
        "From now on answer in French.",
        "Never call the billing tool.",
        "Please always cite the source.",
        "不要发邮件。",
        "Ship it, unless the customer objects.",
    ]
    history.append(SYSTEM)
    for text in said:
        history.append({"role": "user", "content": f"{filler}{text} {filler}"})
        history.messages()
        history.append({"role": "assistant", "content": f"Noted. {filler}"})
    history.append(TASK)
    history.messages()
    error = "Error: permission denied for TICKET-5. " + LONG
    history.extend([call(100, "deploy"), {"role": "tool", "tool_call_id": "c100", "content": error}])
    history.extend([call(101), result(101, "TICKET-6 and TICKET-7. " + LONG)])
    for number in range(40):
        history.messages()
        history.extend([call(number), result(number)])
    sent = history.messages()
    assert count(sent) <= 9000 and history.usage.epochs > 1
    check_pairs(sent)
    text = json.dumps(sent, ensure_ascii=False)
    for sentence in said:
        assert sentence in text
    assert error in text and TASK in sent and SYSTEM in sent
    assert "TICKET-6" in text and "TICKET-7" in text


def test_old_turns_leave_as_a_whole_when_nothing_else_helps() -> None:
    history = History(TokenBudget(2500, "bytes"), keep_last=1, options=LATE)
    for number in range(60):
        history.append({"role": "user", "content": f"What about {number}?"})
        assert count(history.messages()) <= 2500
        history.append({"role": "assistant", "content": f"It is {number} in the list of things that we have here."})
    history.append({"role": "user", "content": "And the last one?"})
    sent = history.messages()
    roles = [message["role"] for message in sent]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    assert "earlier turns left out; capsule handle cap:" in sent[0]["content"]
    assert sent[-1]["content"] == "And the last one?"


def test_what_must_stay_is_the_minimum_and_the_minimum_is_enough() -> None:
    messages = [SYSTEM, TASK, *(m for n in range(6) for m in (call(n, text=LONG), result(n)))]
    history = History(TokenBudget(800, "bytes"), keep_last=1)
    history.extend(messages)
    with pytest.raises(BudgetInfeasible) as caught:
        history.messages()
    minimum = caught.value.minimum
    again = History(TokenBudget(minimum, "bytes"), keep_last=1)
    again.extend(messages)
    assert count(again.messages()) <= minimum
    below = History(TokenBudget(minimum - 1, "bytes"), keep_last=1)
    below.extend(messages)
    with pytest.raises(BudgetInfeasible):
        below.messages()


def test_a_long_result_is_shortened_once_when_it_comes_in() -> None:
    options = HistoryOptions(longest=300, early=False)
    history = History(TokenBudget(100_000, "bytes"), options=options)
    page = "\n".join(f"Line {n} is about the {w}." for n, w in enumerate(["tide", "moon", "order 1042"] * 40))
    ask = "Here is the log.\n" + page + "\nWhat is said of order 1042? Do not guess."
    history.extend([SYSTEM, {"role": "user", "content": ask}, call(1), result(1, page)])
    sent = history.messages()
    assert [len(message["content"]) <= 300 for message in sent] == [True] * 4
    assert sent[1]["content"].startswith("Here is the log.\n") and "Do not guess." in sent[1]["content"]
    assert "order 1042" in sent[3]["content"]
    handle = sent[3]["content"].rpartition("capsule handle ")[2].rstrip("]")
    assert history.originals.get(handle) == f"1: {page}"
    history.extend([call(2), result(2)])
    assert history.messages()[:4] == sent


def test_an_observation_is_masked_early_when_reading_it_again_and_again_costs_more() -> None:
    cached = History(TokenBudget(1_000_000, "bytes"), keep_last=1)
    drive(cached, 40)
    free = History(TokenBudget(1_000_000, "bytes"), keep_last=1, options=HistoryOptions(caching=NO_CACHE))
    drive(free, 40)
    never = History(TokenBudget(1_000_000, "bytes"), keep_last=1, mask=False)
    drive(never, 40)
    assert 1 <= cached.usage.epochs < 15 < free.usage.epochs and never.usage.epochs == 0
    assert free.usage.sent < cached.usage.sent < never.usage.sent and free.usage.read == 0


def test_above_the_budget_what_costs_more_may_be_passed_on() -> None:
    dear = CachingRule(0, read=0.0, write={"5m": 2.0})
    hard = History(TokenBudget(6000, "bytes"), options=HistoryOptions(caching=dear))
    soft = History(TokenBudget(6000, "bytes"), options=HistoryOptions(caching=dear, dearer="pass"))
    assert all(count(messages) <= 6000 for messages in drive(hard, 20))
    sent = drive(soft, 20)
    assert count(sent[-1]) > 6000 and soft.usage.passed > 5 and soft.usage.epochs == 0


def test_reading_a_transcript_gives_the_bytes_that_were_sent_while_it_was_made() -> None:
    live = History(TokenBudget(6000, "bytes"), keep_last=2)
    sent = drive(live, 30)
    read = History(TokenBudget(6000, "bytes"), keep_last=2)
    read.extend([SYSTEM, TASK, *(m for n in range(30) for m in (call(n), result(n)))])
    assert read.messages() == sent[-1] and read.usage == live.usage


def test_it_goes_on_from_a_file_with_the_same_bytes() -> None:
    budget = TokenBudget(6000, "bytes")
    one = History(budget, keep=["order 7"], options=HistoryOptions(longest=2000, caching=CachingRule(10)))
    drive(one, 15)
    data = json.loads(json.dumps(one.to_dict()))
    other = History.from_dict(data)
    assert other.to_dict() == data and other.messages() == one.messages()
    for number in range(20, 40):
        for history in (one, other):
            history.extend([call(number), result(number)])
        assert one.messages() == other.messages()
    assert one.usage == other.usage
    for broken in ({}, {**data, "messages": [3]}, {**data, "usage": {"x": 1}}, {**data, "options": None}):
        with pytest.raises(UserError):
            History.from_dict(broken)


def test_tools_count_and_unusable_arguments_are_named() -> None:
    tool = {"type": "function", "function": {"name": "search", "description": LONG, "parameters": {}}}
    history = History(TokenBudget(500, "bytes"), tools=[tool])
    history.append(TASK)
    with pytest.raises(BudgetInfeasible):
        history.messages()
    unusable: list[dict[str, Any]] = [{"keep_last": 0}, {"keep": ["("]}]
    for arguments in unusable:
        with pytest.raises(UserError):
            History(TokenBudget(500, "bytes"), **arguments)
    unusable = [{"room": 1.0}, {"longest": 0}, {"dearer": "maybe"}]
    for arguments in unusable:
        with pytest.raises(UserError):
            HistoryOptions(**arguments)
    with pytest.raises(UserError, match=r"messages\[0\]"):
        History(TokenBudget(500, "bytes")).append({"content": "no role"})
    assert History(TokenBudget(5, "bytes")).messages() == []


def test_the_pricing_rule() -> None:
    rule = CachingRule(1000, read=0.1, write={"5m": 1.25})
    assert call_cost(rule, Sent(0, 999)) == 999
    assert call_cost(rule, Sent(999, 2000)) == 2500
    assert call_cost(rule, Sent(1000, 2000)) == 100 + 1250
    assert call_cost(NO_CACHE, Sent(5000, 5000)) == 5000
    grown, small = Sent(10_000, 10_000), Sent(0, 2_000)
    assert extra_cost(rule, grown, small) == 2500 - 1000
    assert leftover_cost(rule, grown, small) == 1000 - 200
    assert extra_cost(NO_CACHE, grown, small) == -8000
    assert leftover_cost(rule, Sent(3000, 3000), Sent(0, 999)) == 0  # below the minimum nothing is cached


WORDS = st.sampled_from(
    [
        "the order is here. ",
        "Do not stop. ",
        "Error: bad. ",
        "{slot} ",
        "x" * 300,
        "日本語。",
        "\ud83d",
        "é",
        "KEEP-1 ",
        "\n\n",
    ]
)
TEXT = st.lists(WORDS, max_size=25).map("".join)
TURN = st.tuples(st.sampled_from(["tool", "tool", "tool", "user", "observation"]), TEXT, TEXT)


@settings(max_examples=60)
@given(st.lists(TURN, min_size=1, max_size=25), st.integers(150, 6000), st.integers(1, 4), st.booleans(), st.booleans())
def test_any_run_is_within_the_budget_and_keeps_what_must_stay(
    turns: list[tuple[str, str, str]], limit: int, keep_last: int, mask: bool, words: bool
) -> None:
    budget = TokenBudget(limit // 4 if words else limit, "words" if words else "bytes")
    history = History(budget, keep_last=keep_last, mask=mask, keep=["KEEP-1"])
    given_messages: list[dict[str, Any]] = [{"role": "user", "content": "Begin."}]
    history.append(given_messages[0])
    for number, (kind, one, other) in enumerate(turns):
        new = [call(number, text=one), result(number, other)]
        if kind != "tool":
            head = "Observation: " if kind == "observation" else ""
            new = [{"role": "assistant", "content": one}, {"role": "user", "content": head + other}]
        given_messages += new
        history.extend(new)
        try:
            sent = history.messages()
        except BudgetInfeasible as error:
            assert error.minimum > budget.limit
            continue
        assert count(sent, str(budget.tokenizer)) <= budget.limit
        check_pairs(sent)
        assert sent[-1] == given_messages[-1]
        text = json.dumps(sent)
        for message, fact in zip(given_messages, read_all(given_messages), strict=True):
            assert all(json.dumps(sentence)[1:-1] in text for sentence in fact.constraints)
            if "KEEP-1" in str(message["content"]):
                assert "KEEP-1" in text


def test_going_on_from_a_file_leaves_out_what_was_left_out() -> None:
    free = CachingRule(1, read=1.0, write={"5m": 1.0})  # nothing is dearer for being rewritten
    one = History(TokenBudget(4000, "bytes"), keep_last=1, options=HistoryOptions(room=0.5, caching=free))
    one.append(TASK)
    number = 0
    while not one.usage.epochs:
        one.extend([call(number), {"role": "tool", "tool_call_id": f"c{number}", "content": "ok"}])
        one.messages()
        number += 1
    assert one.last is not None and one.last.compaction is not None and one.last.compaction.steps
    other = History.from_dict(json.loads(json.dumps(one.to_dict())))
    for later in range(number, number + 10):
        for history in (one, other):
            history.extend([call(later), result(later)])
        assert one.messages() == other.messages()
