"""Observation masking: what is replaced, what stays, and that calls keep their answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopt.capsules.agents._masking import mask
from agentopt.capsules.agents._originals import handle_of
from agentopt.errors import UserError

LONG = "The order 1042 was shipped on 3 May. " * 20


def call(number: int, tool: str = "search_orders", **arguments: Any) -> dict[str, Any]:
    function = {"name": tool, "arguments": json.dumps(arguments)}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": f"c{number}", "type": "function", "function": function}],
    }


def result(number: int, text: Any = LONG) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"c{number}", "content": text}


def run(*texts: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You help. " * 60},
        {"role": "user", "content": "Where is my order? " * 30},
    ]
    for number, text in enumerate(texts):
        messages += [call(number), result(number, text)]
    return messages


def test_old_results_become_one_line_and_the_rest_stays_as_it_is() -> None:
    messages = run(LONG, "a second one. " * 40, LONG, LONG)
    done = mask(messages, keep_last=2, tokenizer="words")
    assert [one.index for one in done.masked] == [3, 5]
    first = done.masked[0]
    assert done.messages[3] == {
        "role": "tool",
        "tool_call_id": "c0",
        "content": f"[masked: 160 tokens of search_orders; capsule handle {handle_of(LONG)}]",
    }
    assert (first.tool, first.tokens, first.handle, first.text) == ("search_orders", 160, handle_of(LONG), LONG)
    assert first.saved == 160 - 8
    changed = {one.index for one in done.masked}
    assert all(done.messages[n] == message for n, message in enumerate(messages) if n not in changed)
    assert messages == run(LONG, "a second one. " * 40, LONG, LONG)
    assert "capsule handle" not in mask(messages, handles=False, tokenizer="words").messages[3]["content"]


def test_masking_twice_changes_nothing_more() -> None:
    once = mask(run(LONG, LONG, LONG, LONG), keep_last=1, tokenizer="words")
    twice = mask(once.messages, keep_last=1, tokenizer="words")
    assert twice.messages == once.messages and twice.masked == ()


def test_short_results_and_a_text_that_only_begins_like_a_line() -> None:
    done = mask(run("yes", "[masked: not really a line] " + LONG, LONG), keep_last=1, tokenizer="words")
    assert [one.index for one in done.masked] == [5]


def test_unresolved_errors_stay_and_resolved_ones_do_not() -> None:
    error = "Error: the service is down. " + LONG
    repeated = run(LONG, error, error, "Traceback (most recent call last):\n" + LONG)
    repeated += [call(9, "other_tool"), result(9)]
    assert [one.index for one in mask(repeated, keep_last=1, tokenizer="words").masked] == [3, 5]
    unresolved = run(LONG, error, LONG)
    unresolved[4]["tool_calls"][0]["function"]["name"] = "other_tool"
    assert [one.index for one in mask(unresolved, keep_last=1, tokenizer="words").masked] == [3]
    resolved = run(LONG, error, LONG)
    assert [one.index for one in mask(resolved, keep_last=1, tokenizer="words").masked] == [3, 5]
    harmless = run('{"error": null, "rows": "' + LONG + '"}', LONG)
    harmless[4]["tool_calls"][0]["function"]["name"] = "other_tool"
    assert [one.index for one in mask(harmless, keep_last=1, tokenizer="words").masked] == [3]


def test_a_log_full_of_errors_is_no_error_and_of_many_failures_the_last_ones_stay() -> None:
    log = (
        "12:00 started\n12:01 all well\n12:02 still well\nERROR: disk\nError: net\n12:09 well\n12:10 well\n12:11 done\n"
    )
    done = mask(run(log + LONG, log + LONG + "1", LONG), keep_last=1, tokenizer="words")
    assert [one.index for one in done.masked] == [3, 5]
    failures = run(*(f"Error: failure {n}. {LONG}" for n in range(8)))
    assert [one.index for one in mask(failures, keep_last=1, tokenizer="words").masked] == [3, 5, 7, 9, 11]


def test_what_a_person_said_through_a_tool_stays() -> None:
    messages = run(LONG, LONG, LONG)
    messages[2]["tool_calls"][0]["function"]["name"] = "ask_user"
    assert [one.index for one in mask(messages, keep_last=1, tokenizer="words").masked] == [5]
    spoken = [
        {"role": "user", "content": "Tool output is not wanted: do not show it. " * 20},
        *run(LONG)[2:],
        *run(LONG)[2:],
    ]
    assert mask(spoken, keep_last=1, tokenizer="words").messages[0] == spoken[0]


def test_keep_spans_of_a_masked_result_stay_in_its_line() -> None:
    messages = run(f"{LONG} TICKET-77 {LONG} {{customer_name}} {LONG} TICKET-78", LONG)
    done = mask(messages, keep_last=1, keep=[r"TICKET-\d+"], tokenizer="words")
    lines = done.messages[3]["content"].splitlines()
    assert lines[0].startswith("[masked: ") and lines[1:] == ["TICKET-77", "{customer_name}", "TICKET-78"]


def test_agents_that_speak_plain_text_are_masked_too() -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Where is my order?"}]
    for number in range(4):
        messages += [
            {"role": "assistant", "content": f"Thought {number}. Action: search"},
            {"role": "user", "content": f"Observation: {LONG}"},
        ]
    messages.append({"role": "user", "content": "Thanks. " * 200})
    done = mask(messages, keep_last=2, tokenizer="words")
    assert [one.index for one in done.masked] == [2, 4]
    assert done.messages[0] == messages[0] and done.messages[-1] == messages[-1]


def test_content_lists_keep_their_images() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    done = mask(run([{"type": "text", "text": LONG}, picture], LONG), keep_last=1, tokenizer="words")
    text, image = done.messages[3]["content"]
    assert text["text"].startswith("[masked: 160 tokens") and image == picture


def test_the_last_result_is_never_masked_before_it_was_read() -> None:
    with pytest.raises(UserError, match="keep_last"):
        mask(run(LONG), keep_last=0)
    with pytest.raises(UserError, match=r"messages\[0\]"):
        mask(["text"])  # pyright: ignore[reportArgumentType]


TEXT = st.text(max_size=30) | st.just(LONG) | st.just("Error: no. " * 30) | st.just("{slot} " + LONG)
STEP = st.tuples(st.sampled_from(["call", "plain", "user", "two"]), TEXT, TEXT)


@given(st.lists(STEP, max_size=12), st.integers(1, 5))
def test_number_order_roles_and_ids_never_change(steps: list[tuple[str, str, str]], keep_last: int) -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "s"}]
    for number, (kind, one, other) in enumerate(steps):
        if kind == "call":
            messages += [call(number, one[:5]), result(number, other)]
        elif kind == "two":
            both = call(number, one[:5])
            both["tool_calls"].append({**both["tool_calls"][0], "id": "second"})
            messages += [both, result(number, one), {**result(number, other), "tool_call_id": "second"}]
        else:
            messages += [{"role": "assistant" if kind == "plain" else "user", "content": one}]
    done = mask(messages, keep_last=keep_last, tokenizer="bytes")
    assert len(done.messages) == len(messages)
    masked = {one.index: one for one in done.masked}
    for index, (before, after) in enumerate(zip(messages, done.messages, strict=True)):
        assert {k: v for k, v in before.items() if k != "content"} == {k: v for k, v in after.items() if k != "content"}
        if index not in masked:
            assert before == after
        else:
            assert before["role"] == "tool" and len(after["content"].encode()) < len(
                before["content"].encode("utf-8", "surrogatepass")
            )
            assert masked[index].text == before["content"]
            assert ("{slot}" in before["content"]) == ("{slot}" in after["content"])
