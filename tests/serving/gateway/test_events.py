"""Events split at any byte: what is passed on is whole, in order, and lacks only what was to be cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopt.serving._types import RESPONSES, Refusal
from agentopt.serving.gateway._errors import error_event
from agentopt.serving.gateway._events import Events, tail_usage

TEXT = st.text(max_size=20) | st.sampled_from(
    ['"usage":{', "\n\n", "data: [DONE]", '"usage": {"prompt_tokens": 9}', "\r\n"]
)


def content(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}], "usage": None}).encode()


def usage(prompt: int, completion: int) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "prompt_tokens_details": {"cached_tokens": 1}}
    return b"data: " + json.dumps({"choices": [], "usage": counts}).encode()


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[bytes], bytes, list[bytes]]:
    """Whole events with their ends, the usage event among them, and the pieces in which they come."""
    end = draw(st.sampled_from([b"\n\n", b"\r\n\r\n"]))
    plain = [content(text) + end for text in draw(st.lists(TEXT, max_size=5))]
    if draw(st.booleans()):
        plain.insert(0, b": comment" + end)
    counted = usage(draw(st.integers(0, 99)), draw(st.integers(0, 99))) + end
    whole = [*plain, counted, b"data: [DONE]" + end]
    data = b"".join(whole)
    cuts = sorted(draw(st.sets(st.integers(1, len(data) - 1), max_size=30)))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    return whole, counted, pieces


@given(streams(), st.booleans())
def test_split_at_any_byte(stream: tuple[list[bytes], bytes, list[bytes]], cut: bool) -> None:
    whole, counted, pieces = stream
    events = Events(cut_usage=cut)
    passed = b""
    for piece in pieces:
        passed += events.feed(piece)
        assert not passed or passed.endswith((b"\n\n", b"\n\r\n"))
        assert not events.open
    assert events.rest() == b""
    expected = [event for event in whole if not (cut and event == counted)]
    assert passed == b"".join(expected)
    assert events.use is not None
    assert counted == usage(events.use.prompt, events.use.completion) + counted[len(counted.rstrip()) :]
    assert events.use.cached == 1


def test_a_usage_event_with_content_is_kept() -> None:
    events = Events(cut_usage=True)
    data = b'data: {"choices":[{"delta":{}}],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n'
    assert events.feed(data) == data
    assert events.use is not None
    assert events.use.total == 7


@pytest.mark.parametrize("odd", [b'data: {"usage":{"a\n\n', b'data: ["usage",{"usage":{}}]\n\n', b'x"usage":{\n\n'])
def test_what_only_looks_like_usage_is_passed(odd: bytes) -> None:
    events = Events(cut_usage=True)
    assert events.feed(odd) == odd
    assert events.use is None or events.use.total == 0


def test_an_endless_event_is_passed_on_unfinished() -> None:
    events = Events(cut_usage=True, bound=1000)
    passed = b"".join(events.feed(b"x" * 300) for _ in range(10))
    assert len(passed) >= 2000
    assert events.open
    assert events.feed(b"end\n\n").endswith(b"end\n\n")
    assert not events.open


def test_an_event_without_its_empty_line_is_passed_at_the_end() -> None:
    events = Events(cut_usage=True)
    assert events.feed(b"data: a\n\ndata: [DONE]\n") == b"data: a\n\n"
    assert events.rest() == b"data: [DONE]\n"


def test_counts_of_the_other_routes() -> None:
    events = Events(cut_usage=False)
    events.feed(b'data: {"type":"message_start","message":{"usage":{"input_tokens":7,"output_tokens":1}}}\n\n')
    events.feed(b'data: {"type":"message_delta","usage":{"output_tokens":5}}\n\n')
    assert events.use is not None
    assert (events.use.prompt, events.use.completion) == (7, 5)
    events = Events(cut_usage=False)
    events.feed(b'data: {"response":{"usage":{"input_tokens":2,"output_tokens":3}}}\n\n')
    assert events.use is not None
    assert events.use.total == 5


@given(TEXT, st.integers(0, 1000))
def test_the_count_at_the_end_of_a_reply(text: str, tokens: int) -> None:
    body = json.dumps(
        {"choices": [{"text": text}], "usage": {"prompt_tokens": tokens, "completion_tokens": 1}}
    ).encode()
    use = tail_usage(body[len(body) // 3 :])
    assert use is not None
    assert (use.prompt, use.completion) == (tokens, 1)
    assert tail_usage(b'{"choices": []}') is None


def test_what_a_reply_repeats_of_the_request_is_no_count() -> None:
    counts = {"prompt_tokens": 70, "completion_tokens": 30}
    for fake in ({"prompt_tokens": 0}, {"input_tokens": 10**9}, {"prompt_tokens": {"type": "integer"}}):
        for reply in ({"usage": counts, "tools": [{"usage": fake}]}, {"tools": [{"usage": fake}] * 9, "usage": counts}):
            use = tail_usage(json.dumps(reply).encode())
            assert use is not None
            assert (use.prompt, use.completion) == (70, 30)
    end = json.dumps({"usage": counts, "last": {"usage": {"prompt_tokens": 0}}}).encode()[1:]  # of a long reply
    use = tail_usage(b'"usage":{},' * 50_000 + end)
    assert use is not None and use.total == 100


def test_errors_of_the_responses_form_go_on_with_the_numbers() -> None:
    last = b'data: {"type":"x","sequence_number":7}\n\n'
    event = error_event(RESPONSES, Refusal(502, "gone", code="engine_died"), last)
    assert json.loads(event.split(b"data: ")[1])["sequence_number"] == 8
