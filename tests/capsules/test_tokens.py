"""The budget, the meter, and counting by asking a server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import agentopt as ao
from agentopt.capsules import Meter, TokenBudget
from agentopt.capsules.counting._token_endpoint import Endpoint
from agentopt.capsules.counting._tokenizers import resolve_tokenizer
from agentopt.errors import UserError

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 12 x 7?", "name": "ann"},
]


@pytest.mark.parametrize("limit", [0, -3, True, 2.5, "9"])
def test_a_budget_is_a_whole_number_of_at_least_one(limit: Any) -> None:
    with pytest.raises(UserError, match="at least 1"):
        TokenBudget(limit)


def test_a_text_counts_as_it_is_sent() -> None:
    meter = TokenBudget(2, "cl100k_base").meter()
    assert isinstance(meter, Meter) and meter.messages is None
    assert meter.total(["Hello", " world"]) == 2 and meter.fits(["Hello world"])
    assert not meter.fits(["Hello world!"])
    assert meter.units(["Hello", "Hello world!", ""]) == [1, 3, 0]


def test_openai_messages_carry_the_documented_overhead() -> None:
    meter = TokenBudget(100, "gpt-4o").meter(CHAT)
    count = resolve_tokenizer("o200k_base").count
    texts = ["system", "Be brief.", "user", "What is 12 x 7?", "ann"]
    assert meter.total(["Be brief.", "What is 12 x 7?"]) == sum(map(count, texts)) + 2 * 3 + 1 + 3
    assert meter.total(["Be", "What?"]) < meter.total(["Be brief.", "What is 12 x 7?"])


def test_calls_names_and_tools_count() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "price", "arguments": '{"item": "tea"}'}}
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": "Price of tea?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "3 EUR"},
    ]
    bare = [{key: value for key, value in message.items() if key in ("role", "content")} for message in chat]
    tools = [{"type": "function", "function": {"name": "price", "parameters": {"type": "object"}}}]
    for name in ("o200k_base", "bytes", "embedded"):
        if name == "embedded":  # its template knows no calls and refuses a message without text
            chat[1]["content"] = bare[1]["content"] = ""
        texts = [str(message["content"]) for message in chat if message["content"] is not None]
        full = TokenBudget(9, name).meter(chat).total(texts)
        if name != "embedded":
            assert full > TokenBudget(9, name).meter(bare).total(texts)
            assert TokenBudget(9, name).meter(chat, tools=tools).total(texts) > full


def test_only_the_texts_of_a_content_list_are_parts() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 9_000}}
    chat = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}]
    meter = TokenBudget(50, "o200k_base").meter(chat)
    assert meter.total(["What is this?"]) < 20
    assert meter.total(["What is this, please?"]) > meter.total(["What is this?"])
    told = [check.detail for check in ao.capsule(chat, budget=TokenBudget(50)).checks]
    assert told == ["1 stay as they are and are not counted"]


def test_a_message_that_was_emptied_costs_what_is_sent_of_it() -> None:
    chat = [*CHAT, {"role": "assistant", "content": "84"}, {"role": "user", "content": "Sure?"}]
    meter = TokenBudget(99, "o200k_base").meter(chat)
    without = TokenBudget(99, "o200k_base").meter([chat[0], chat[3]])
    assert meter.total(["Be brief.", "", "", "Sure?"]) == without.total(["Be brief.", "Sure?"])
    short = TokenBudget(99, "o200k_base").meter([*chat[:2], {"role": "assistant", "content": "[omitted]"}, chat[3]])
    assert meter.total(["Be brief.", "What?", "", "Sure?"]) == short.total(["Be brief.", "What?", "[omitted]", "Sure?"])


Answer = Callable[[str, dict[str, Any]], "tuple[int, Any]"]


@contextmanager
def server(answer: Answer) -> Generator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """A local server that gives what `answer(path, body)` says; with the requests it got."""
    seen: list[tuple[str, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, body))
            status, reply = answer(self.path, body)
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_address[1]}", seen
        finally:
            http.shutdown()
            thread.join()


def vllm(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    if "messages" in body:
        return 200, {"count": 7 * len(body["messages"]) + len(body.get("tools", []))}
    if "prompt" not in body:
        return 400, {"error": {"message": "prompt: field required"}}
    return 200, {"count": len(body["prompt"].split()), "max_model_len": 99, "tokens": []}


def llama(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    if path.endswith("/apply-template"):
        return 200, {"prompt": " ".join(str(message["content"]) for message in body["messages"]) + " >"}
    return 200, {"tokens": list(range(len(body.get("content", "").split())))}


@pytest.mark.parametrize(("answer", "form", "chat"), [(vllm, "prompt", 14), (llama, "content", 8)])
def test_both_forms_of_tokenize(answer: Answer, form: str, chat: int) -> None:
    with server(answer) as (url, seen):
        tokenizer = resolve_tokenizer(f"{url}/v1?model=large")
        assert tokenizer.count_many(["one two", "three", "", "one two"]) == [2, 1, 0, 2]
        assert tokenizer.count("a\ud800 b") == 2
        asked = [body for _, body in seen if form in body]
        assert {path for path, _ in seen} == {"/tokenize"}
        assert sum(body[form] == "three" for body in asked) == 1
        assert ("model" in asked[-1]) == (form == "prompt")
        before = len(seen)
        assert tokenizer.count("three") == 1 and len(seen) == before  # remembered
        assert TokenBudget(9, tokenizer).meter(CHAT).total(["Be brief.", "What is 12 x 7?"]) == chat


def test_what_a_server_can_answer_wrongly() -> None:
    cases: list[tuple[Answer, str]] = [
        (lambda path, body: (404, {"detail": "Not Found"}), "404"),
        (lambda path, body: (200, b"<html>"), "no JSON"),
        (lambda path, body: (200, {"length": 3}), "expected a count"),
        (lambda path, body: (200, {"tokens": []}), "no tokens"),
        (lambda path, body: (200, {"count": True}), "expected a count"),
    ]
    for answer, words in cases:
        with server(answer) as (url, _), pytest.raises(UserError, match=words):
            Endpoint(url).count("a text")


def test_no_server_is_one_sentence() -> None:
    with server(llama) as (url, _):
        pass
    with pytest.raises(UserError, match="no answer from"):
        Endpoint(url).count("a text")
