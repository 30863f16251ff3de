"""Replies of all routes, whole and streamed, errors and broken ones: what is read is what was said."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopt.serving._types import CHAT, COMPLETIONS, MESSAGES, RESPONSES
from agentopt.serving.capture._replies import Answer, read_reply


def stream(*events: Any, done: bool = True, newline: str = "\n") -> bytes:
    lines = [f"data: {event if isinstance(event, str) else json.dumps(event)}{newline}{newline}" for event in events]
    return "".join([*lines, f"data: [DONE]{newline}{newline}" if done else ""]).encode()


def chat(delta: dict[str, Any], index: int = 0, finish: str | None = None) -> dict[str, Any]:
    return {"model": "m", "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}


def said(answer: Answer) -> list[str]:
    return [choice.text for choice in answer.choices]


def test_chat_whole_with_several_choices_and_a_tool_call() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    body = {
        "model": "m",
        "choices": [
            {"index": 1, "message": {"content": "two"}, "finish_reason": "length"},
            {"index": 0, "message": {"content": None, "tool_calls": [call]}, "finish_reason": "tool_calls"},
        ],
    }
    answer = read_reply(CHAT, json.dumps(body).encode())
    assert said(answer) == ["", "two"]
    assert list(answer.choices[0].calls.values()) == [{"id": "c1", "name": "look", "arguments": '{"at": 1}'}]
    assert (answer.choices[0].finish, answer.complete, answer.error) == ("tool_calls", True, None)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_chat_stream_with_choices_and_tool_calls_in_pieces(newline: str) -> None:
    def piece(index: int, text: str, name: str | None = None) -> dict[str, Any]:
        function = {"arguments": text} | ({"name": name} if name else {})
        return {"tool_calls": [{"index": index, "function": function} | ({"id": f"c{index}"} if name else {})]}

    answer = read_reply(
        CHAT,
        stream(
            chat({"role": "assistant", "content": "a"}),
            chat({"content": "x"}, 1),
            chat({"content": "b", "reasoning_content": "hm"}),
            chat(piece(0, '{"q"', "find")),
            chat(piece(1, "{}", "stop")),
            chat(piece(0, ": 1}")),
            chat({}, 0, "tool_calls"),
            newline=newline,
        ),
    )
    assert said(answer) == ["ab", "x"]
    assert [call["arguments"] for call in answer.choices[0].calls.values()] == ['{"q": 1}', "{}"]
    assert answer.choices[0].reasoning == ["hm"] and answer.complete


def test_a_stream_that_broke_off_gives_what_came_and_is_not_complete() -> None:
    body = stream(chat({"content": "half "}), chat({"content": "a"}), done=False)
    assert said(read_reply(CHAT, body[:-3])) == ["half "]
    assert not read_reply(CHAT, body).complete
    failed = read_reply(CHAT, stream(chat({"content": "half "}), {"error": {"message": "it died"}}, done=False))
    assert (said(failed), failed.error, failed.complete) == (["half "], "it died", False)


def test_completions_whole_and_streamed() -> None:
    whole = read_reply(COMPLETIONS, b'{"choices": [{"index": 0, "text": "hello", "finish_reason": "stop"}]}')
    parts = [{"choices": [{"index": 0, "text": text, "finish_reason": None}]} for text in ("hel", "lo")]
    assert said(whole) == said(read_reply(COMPLETIONS, stream(*parts))) == ["hello"]


def test_responses_whole_and_streamed() -> None:
    output = [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "message", "content": [{"type": "output_text", "text": "yes"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    ]
    response = {"model": "m", "status": "completed", "output": output, "error": None}
    whole = read_reply(RESPONSES, json.dumps(response).encode())
    assert (said(whole), whole.choices[0].finish, whole.complete) == (["yes"], "stop", True)
    assert next(iter(whole.choices[0].calls.values()))["name"] == "f"
    deltas = [{"type": "response.output_text.delta", "delta": text} for text in ("y", "es")]
    item = {"type": "function_call", "call_id": "c", "name": "f", "arguments": ""}
    call = [
        {"type": "response.output_item.added", "output_index": 1, "item": item},
        {"type": "response.function_call_arguments.delta", "output_index": 1, "delta": "{}"},
    ]
    broken = read_reply(RESPONSES, stream(*deltas, *call, done=False))
    assert (said(broken), broken.complete) == (["yes"], False)
    assert list(broken.choices[0].calls.values()) == [{"id": "c", "name": "f", "arguments": "{}"}]
    full = read_reply(RESPONSES, stream(*deltas, {"type": "response.completed", "response": response}, done=False))
    assert (said(full), full.complete) == (["yes"], True)
    assert read_reply(RESPONSES, stream({"type": "error", "message": "no"}, done=False)).error == "no"


def test_messages_whole_and_streamed() -> None:
    blocks = [{"type": "text", "text": "yes"}, {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}]
    whole = read_reply(MESSAGES, json.dumps({"content": blocks, "stop_reason": "tool_use"}).encode())
    events = [
        {"type": "message_start", "message": {"model": "m"}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "yes"}},
        {"type": "content_block_start", "index": 1, "content_block": {**blocks[1], "input": {}}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": '{"a": 1}'}},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}},
        {"type": "message_stop"},
    ]
    streamed = read_reply(MESSAGES, stream(*events, done=False))
    for answer in (whole, streamed):
        assert (said(answer), answer.choices[0].finish, answer.complete) == (["yes"], "tool_use", True)
        assert list(answer.choices[0].calls.values()) == [{"id": "t", "name": "f", "arguments": '{"a": 1}'}]
    failed = read_reply(MESSAGES, stream({"type": "error", "error": {"message": "busy"}}, done=False))
    assert failed.error == "busy"


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b'{"error": {"message": "too long"}}', "too long"),
        (b'{"error": "plain"}', "plain"),
        (b"", "there was no reply"),
        (b"<html>502</html>", "neither JSON nor server-sent events"),
        (b'{"half": ', "not a JSON object"),
    ],
)
def test_what_is_no_reply_says_so(body: bytes, error: str) -> None:
    answer = read_reply(CHAT, body)
    assert error in (answer.error or "") and not answer.complete


NAMES = ["choices", "delta", "message", "content", "tool_calls", "function", "index", "type", "output", "item", "error"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(NAMES),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    route=st.sampled_from([CHAT, COMPLETIONS, RESPONSES, MESSAGES]),
    values=st.lists(JSON, max_size=3),
    as_stream=st.booleans(),
)
def test_no_reply_whatever_its_shape_raises(route: str, values: list[Any], as_stream: bool) -> None:
    body = stream(*[json.dumps(value) for value in values]) if as_stream else json.dumps(values[:1]).encode()
    read_reply(route, body)
    read_reply(route, body[: len(body) // 2])
    if values:
        read_reply(route, json.dumps(values[0]).encode())


def test_an_absurd_choice_number_does_not_fill_the_memory() -> None:
    answer = read_reply(CHAT, stream(chat({"content": "x"}, 10**9)))
    assert len(answer.choices) <= 128


WORDS = st.text(max_size=4) | st.sampled_from(['"', "\\", "\n", "\u2028", "\ud83d", 'a", "content": "b', "[DONE]", ""])
DELTAS = st.one_of(
    WORDS.map(lambda text: {"content": text}),
    WORDS.map(lambda text: {"role": "assistant", "content": text}),
    WORDS.map(lambda text: {"content": text, "reasoning_content": "hm"}),
    WORDS.map(lambda text: {"refusal": text}),
    st.lists(WORDS, max_size=2).map(lambda texts: {"content": [{"type": "text", "text": text} for text in texts]}),
)
EVENTS = st.one_of(
    st.tuples(DELTAS, st.sampled_from([0, 0, 0, 1, -1]), st.sampled_from([None, None, None, "stop"])).map(
        lambda given: chat(*given)
    ),
    st.tuples(WORDS, WORDS).map(
        lambda two: {"choices": [{"index": place, "delta": {"content": text}} for place, text in enumerate(two)]}
    ),
    WORDS.map(lambda text: {"error": {"message": text}}),
    WORDS.map(lambda text: {"choices": [{"index": 0, "text": text}], "model": "m"}),
    WORDS.map(lambda text: {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}),
    WORDS.map(lambda text: {"type": "content_block_start", "content_block": {"type": "text", "text": text}}),
)


@given(
    route=st.sampled_from([CHAT, COMPLETIONS, RESPONSES, MESSAGES]),
    kinds=st.lists(st.tuples(EVENTS, st.integers(1, 3)), max_size=6),
    ascii_only=st.booleans(),
)
def test_events_that_repeat_each_other_say_what_they_say_one_by_one(
    route: str, kinds: list[tuple[dict[str, Any], int]], ascii_only: bool
) -> None:
    events = [event for event, times in kinds for _ in range(times)]
    # With a number of its own in front, no event has the beginning of another: each is read as a whole.
    numbered = [{"number": place} | event for place, event in enumerate(events)]

    def read(given: list[dict[str, Any]]) -> Answer:
        texts = [json.dumps(event, ensure_ascii=ascii_only) for event in given]
        return read_reply(route, "".join(f"data: {text}\n\n" for text in texts).encode("utf-8", "replace"))

    assert read(events) == read(numbered)


def test_a_second_text_of_the_same_name_is_not_taken_for_the_first() -> None:
    twice = '{"choices": [{"index": 0, "delta": {"content": "first", "content": "second"}}]}'
    beside = '{"content": "no", "choices": [{"index": 0, "delta": {"content": "yes"}}]}'
    for event, expected in ((twice, "second"), (beside, "yes")):
        assert said(read_reply(CHAT, stream(*[event] * 12))) == [expected * 12]


def test_an_event_that_begins_like_the_others_and_ends_otherwise_is_read_whole() -> None:
    answer = read_reply(
        CHAT, stream(*[chat({"content": "a"})] * 9, chat({"content": "b", "refusal": "c"}, 0, "length"))
    )
    assert (said(answer), answer.choices[0].finish) == (["a" * 9 + "bc"], "length")
