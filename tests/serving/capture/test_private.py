"""Nothing private reaches the store: secrets in any place of a request or reply of any route, cut up as streams are."""

from __future__ import annotations

import itertools
import json
import sqlite3
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.graph import Trace
from agentopt.serving._types import CHAT, COMPLETIONS, MESSAGES, RESPONSES
from agentopt.serving.capture import FeedbackStore, Recorder, Redaction
from agentopt.serving.capture._record import make_call
from tests.serving.capture.kit import exchange, put

SECRETS = ["first.last@mail.example.com", "+49 30 1234567-89", "4111-1111-1111-1111", "sk-proj-a1B2c3D4e5F6g7H8i9J0"]
ESCAPED = ["plain", "json", "ascii", "twice"]


def wrapped(secret: str, how: str) -> str:
    """The secret as a text in which it stands, or as JSON inside a text."""
    text = f"say {secret} now"
    if how == "plain":
        return text
    inner = "".join(f"\\u{ord(letter):04x}" for letter in text) if how == "ascii" else json.dumps(text)[1:-1]
    document = f'{{"to": "{inner}", "n": 1}}'
    return json.dumps({"again": document}) if how == "twice" else document


def body_of(route: str, text: str) -> dict[str, Any]:
    call = {"id": text, "type": "function", "function": {"name": "f", "arguments": text}}
    function: dict[str, Any] = {"name": "f", "description": text, "parameters": {text: {"enum": [text]}}}
    tool = {"type": "function", "function": function}
    common: dict[str, Any] = {
        "user": text,
        "metadata": {"who": text},
        "stop": [text],
        "agentopt": {"variables": {text: text}},
    }
    if route == COMPLETIONS:
        return {**common, "prompt": [text, text], "suffix": text}
    if route == RESPONSES:
        items = [
            {
                "role": "user",
                "content": [{"type": "input_text", "text": text}, {"type": "input_image", "image_url": text}],
            },
            {"type": "function_call", "call_id": text, "name": "f", "arguments": text},
            {"type": "function_call_output", "call_id": text, "output": text},
        ]
        return {**common, "instructions": text, "input": items, "tools": [{"type": "function", **function}]}
    if route == MESSAGES:
        blocks = [
            {"type": "text", "text": text},
            {"type": "tool_use", "id": text, "name": "f", "input": {text: text}},
            {"type": "tool_result", "tool_use_id": text, "content": [{"type": "text", "text": text}]},
        ]
        tools = [{"name": "f", "description": text, "input_schema": {"description": text}}]
        return {
            **common,
            "system": [{"type": "text", "text": text}],
            "messages": [{"role": "user", "content": blocks}],
            "tools": tools,
        }
    turns = [
        {"role": "system", "content": text, "name": text},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    return {**common, "messages": turns, "tools": [tool], "response_format": {"json_schema": {"name": text}}}


def stream_of(route: str, text: str, cuts: list[int]) -> bytes:
    """The text as the deltas of a stream that break it at `cuts`, in the reply's text and in a tool call."""
    edges = [0, *sorted({cut % (len(text) + 1) for cut in cuts}), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    events: list[dict[str, Any]] = []
    for piece in pieces:
        if route == COMPLETIONS:
            events.append({"choices": [{"index": 0, "text": piece}]})
        elif route == RESPONSES:
            events.append({"type": "response.output_text.delta", "delta": piece})
            events.append({"type": "response.function_call_arguments.delta", "output_index": 1, "delta": piece})
        elif route == MESSAGES:
            events.append({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece}})
            events.append({"type": "content_block_delta", "index": 1, "delta": {"partial_json": piece}})
            events.append({"type": "content_block_delta", "index": 2, "delta": {"thinking": piece}})
        else:
            call = {"index": 0, "function": {"name": "f", "arguments": piece}}
            events.append({"choices": [{"index": 0, "delta": {"content": piece, "reasoning_content": piece}}]})
            events.append({"choices": [{"index": 1, "delta": {"content": piece, "tool_calls": [call]}}]})
    events.append({"error": {"message": text}})
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode()


def readable(stored: str) -> list[str]:
    """What was stored, and what one gets by undoing its escapes time and again."""
    views = [stored]
    for _ in range(6):
        views.append(views[-1].encode("ascii", "backslashreplace").decode("unicode_escape", "replace"))
    return views


@settings(max_examples=120)
@given(
    route=st.sampled_from([CHAT, COMPLETIONS, RESPONSES, MESSAGES]),
    secret=st.sampled_from(SECRETS),
    how=st.sampled_from(ESCAPED),
    cuts=st.lists(st.integers(0, 400), max_size=6),
)
def test_no_secret_of_a_request_or_reply_is_in_its_record(route: str, secret: str, how: str, cuts: list[int]) -> None:
    text = wrapped(secret, how)
    assert any(secret in view for view in readable(text)), "the test itself must be able to find it"
    made = exchange(route=route, asked=text, session=text)
    made.body = made.sent = body_of(route, text)
    call = make_call(made, stream_of(route, text, cuts), Redaction())
    stored = json.dumps([Trace([call.op(0, {}, None)]).to_dict(), call.index])
    assert not [view for view in readable(stored) if secret in view]
    assert "[" in str(call.output) and call.error is not None and "[" in call.error.message


@pytest.mark.anyio
async def test_no_secret_is_in_any_row_of_the_store(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "s.db")
    recorder.start()
    texts = [wrapped(secret, how) for secret in SECRETS for how in ESCAPED]
    sink = FeedbackStore(recorder)
    for text in texts:
        made = exchange(session=text, asked=text)
        made.body = made.sent = body_of(CHAT, text)
        put(recorder, made, exchange(text, asked=text), reply=stream_of(CHAT, text, [7, 20, 21]))
        await sink.give({"request_id": made.id, "text": text, "expected": {text: [text]}, "score": 1}, None)
    assert recorder.close() == 0 and recorder.captured == 2 * len(texts)
    with sqlite3.connect(tmp_path / "s.db") as connection:
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        cells = [cell for name in names for row in connection.execute(f"SELECT * FROM {name}") for cell in row]
    connection.close()
    stored = [zlib.decompress(cell).decode() if isinstance(cell, bytes) else str(cell) for cell in cells]
    assert len(stored) > 10 * len(texts) and any("[email]" in cell for cell in stored)
    leaked = [cell for cell in stored for view in readable(cell) for secret in SECRETS if secret in view]
    assert not leaked, leaked[0][:500]
