"""Plain OpenAI clients, unaware of agentopt, are answered as calls of the rollout that made them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import openai
import pytest

from agentopt import graph, models
from agentopt.models import FunctionLM, LMRateLimit, ModelsConfig, Reply, Request, ToolCall
from agentopt.models._capture import PLACEHOLDER_KEY, Capture, capture_environment, capture_session

PROMPT = graph.prompt("default instruction", name="test_capture.instruction")


def _echo(request: Request) -> str:
    return f"{request.messages[0]['content']} | {request.messages[-1]['content']}"


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Capture]:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    models.reset()
    models.configure(models={"agent": FunctionLM(_echo)})
    with Capture() as running:
        yield running
    models.reset()


def _messages(text: str) -> list[Any]:
    return [{"role": "system", "content": str(PROMPT)}, {"role": "user", "content": text}]


def test_client_made_from_the_environment_is_answered_by_the_agent_model(capture: Capture) -> None:
    with openai.OpenAI() as client:
        reply = client.chat.completions.create(model="gpt-4o-mini", messages=_messages("hello"))
    assert reply.choices[0].message.content == "default instruction | hello"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None and reply.usage.total_tokens > 0


def test_environment_and_http_library_are_restored_after_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://example.invalid/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-user")
    send = httpx.Client.send
    with Capture() as running:
        assert os.environ["OPENAI_BASE_URL"] == running.base_url
        assert os.environ["OPENAI_API_KEY"] == "sk-user"
        assert httpx.Client.send is not send
    assert os.environ["OPENAI_BASE_URL"] == "http://example.invalid/v1"
    assert httpx.Client.send is send
    assert capture_environment() == {}


def test_call_is_recorded_inside_the_step_that_made_it_and_metered(capture: Capture) -> None:
    @graph.step
    def ask(text: str) -> str | None:
        with openai.OpenAI() as client:
            return client.chat.completions.create(model="x", messages=_messages(text)).choices[0].message.content

    with capture_session(), graph.metered() as meter, graph.record() as recording:
        ask("hi")
    trace = recording.trace
    call = next(op for op in trace.ops if op.kind == "lm")
    step = next(op for op in trace.ops if op.op.endswith("ask"))
    assert call.parent_op == step.id
    assert "test_capture.instruction" in trace.parameters
    assert meter.usage.calls == 1


@pytest.mark.anyio
async def test_concurrent_rollouts_of_one_shared_async_client_keep_their_candidates(capture: Capture) -> None:
    replies: dict[str, set[str | None]] = {}
    async with openai.AsyncOpenAI() as client:

        async def rollout(name: str) -> None:
            with graph.Candidate({"test_capture.instruction": name}).active(), capture_session():
                for number in range(5):
                    reply = await client.chat.completions.create(model="x", messages=_messages(f"q{number}"))
                    replies.setdefault(name, set()).add(reply.choices[0].message.content)

        async with anyio.create_task_group() as group:
            for name in ("first", "second", "third"):
                group.start_soon(rollout, name)
    assert replies == {name: {f"{name} | q{i}" for i in range(5)} for name in ("first", "second", "third")}


@pytest.mark.anyio
async def test_concurrent_rollouts_are_recorded_and_metered_apart_also_with_a_sync_client(capture: Capture) -> None:
    client = openai.OpenAI()
    calls: dict[str, tuple[int, list[str]]] = {}

    def program(name: str, count: int) -> None:
        with capture_session(), graph.metered() as meter, graph.record() as recording:
            for number in range(count):
                client.chat.completions.create(model="x", messages=[{"role": "user", "content": f"{name}{number}"}])
        shown = [op.meta["messages"][-1]["content"] for op in recording.trace.ops if op.kind == "lm" and op.meta]
        calls[name] = (meter.usage.calls, shown)

    async with anyio.create_task_group() as group:
        for name, count in (("a", 3), ("b", 4), ("c", 2)):
            group.start_soon(anyio.to_thread.run_sync, program, name, count)
    client.close()
    assert calls == {n: (k, [f"{n}{i}" for i in range(k)]) for n, k in (("a", 3), ("b", 4), ("c", 2))}


@pytest.mark.anyio
async def test_streams_arrive_in_pieces_sync_and_async_with_usage_on_request(capture: Capture) -> None:
    async with openai.AsyncOpenAI() as client:
        stream = await client.chat.completions.create(
            model="x", messages=_messages("one two"), stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "default instruction | one two"
    assert len(chunks) > 3
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0

    def read() -> str:
        with openai.OpenAI() as plain:
            events = plain.chat.completions.create(model="x", messages=_messages("x y"), stream=True)
            return "".join(event.choices[0].delta.content or "" for event in events)

    assert await anyio.to_thread.run_sync(read) == "default instruction | x y"


def test_streamed_call_belongs_to_its_rollout(capture: Capture) -> None:
    with (
        graph.Candidate({"test_capture.instruction": "mine"}).active(),
        capture_session(),
        graph.metered() as meter,
        graph.record() as recording,
        openai.OpenAI() as client,
    ):
        for _ in client.chat.completions.create(model="x", messages=_messages("s"), stream=True):
            pass
    assert [op.output for op in recording.trace.ops if op.kind == "lm"] == ["mine | s"]
    assert meter.usage.calls == 1


def test_tool_calls_come_back_in_openai_form_streamed_or_not(capture: Capture) -> None:
    answer = Reply("", tool_calls=(ToolCall("call_1", "weather", {"city": "Oslo"}),), finish_reason="tool_calls")
    tools: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    with models.use(ModelsConfig({"agent": FunctionLM(lambda _: answer)})), openai.OpenAI() as client:
        reply = client.chat.completions.create(model="x", messages=_messages("w"), tools=tools)
        events = list(client.chat.completions.create(model="x", messages=_messages("w"), tools=tools, stream=True))
    [call] = reply.choices[0].message.tool_calls or []
    assert call.type == "function" and call.function.arguments == '{"city": "Oslo"}'
    assert reply.choices[0].finish_reason == "tool_calls"
    deltas = [call for event in events for call in event.choices[0].delta.tool_calls or []]
    assert deltas[0].function is not None and deltas[0].function.name == "weather"


def test_thread_without_context_is_refused_while_several_rollouts_run(capture: Capture) -> None:
    found: list[Exception] = []

    def lost() -> None:
        with openai.OpenAI() as client:
            try:
                client.chat.completions.create(model="x", messages=[{"role": "user", "content": "?"}])
            except openai.APIStatusError as error:
                found.append(error)

    with capture.session(), capture.session():
        thread = threading.Thread(target=lost)
        thread.start()
        thread.join()
    [error] = found
    assert isinstance(error, openai.ConflictError)
    assert "ThreadPoolExecutor" in error.message


def test_thread_without_context_belongs_to_the_only_rollout(capture: Capture) -> None:
    def lost() -> None:
        with openai.OpenAI() as client:
            client.chat.completions.create(model="x", messages=[{"role": "user", "content": "?"}])

    with graph.metered() as meter, capture_session():
        thread = threading.Thread(target=lost)
        thread.start()
        thread.join()
    assert meter.usage.calls == 1


def test_subprocess_given_the_rollouts_environment_belongs_to_it_among_several(capture: Capture) -> None:
    script = (
        "import json, os, urllib.request\n"
        "body = json.dumps({'model': 'x', 'messages': [{'role': 'user', 'content': 'from child'}]}).encode()\n"
        "url = os.environ['OPENAI_BASE_URL'] + '/chat/completions'\n"
        "request = urllib.request.Request(url, body, {'content-type': 'application/json'})\n"
        "print(json.load(urllib.request.urlopen(request))['choices'][0]['message']['content'])\n"
    )
    with capture.session(), graph.metered() as meter, capture_session():
        environment = {**os.environ, **capture_environment()}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
    assert done.stdout.strip() == "from child | from child"
    assert meter.usage.calls == 1


def test_upstream_errors_arrive_as_the_clients_own_exceptions_and_are_not_retried_by_it(capture: Capture) -> None:
    seen: list[Request] = []

    def fail(request: Request) -> str:
        seen.append(request)
        raise LMRateLimit("the provider said 429", status=429)

    with models.use(ModelsConfig({"agent": FunctionLM(fail)})), capture.session() as session, openai.OpenAI() as client:
        with pytest.raises(openai.RateLimitError, match="429"):
            client.chat.completions.create(model="x", messages=_messages("a"))
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="x", messages=_messages("b"), stream=True)
    assert len(seen) == 2
    assert [type(error) for error in session.errors] == [LMRateLimit, LMRateLimit]


def test_bad_bodies_and_routes_get_openai_error_json(capture: Capture) -> None:
    with openai.OpenAI() as client:
        with pytest.raises(openai.BadRequestError, match="messages"):
            client.chat.completions.create(model="x", messages=[])
        with pytest.raises(openai.InternalServerError, match="Responses API"):
            client.responses.create(model="x", input="hello")
        with pytest.raises(openai.InternalServerError, match="OPENAI_API_KEY"):
            client.embeddings.create(model="x", input="hello")
        assert [model.id for model in client.models.list()]
    stranger = httpx.post(f"http://127.0.0.1:{capture.port}/v1/chat/completions", json={})
    assert stranger.status_code == 404


def test_legacy_completions_and_several_samples(capture: Capture) -> None:
    with openai.OpenAI() as client:
        done = client.completions.create(model="x", prompt=["a", "b"])
        many = client.chat.completions.create(model="x", messages=_messages("n"), n=2, temperature=0)
    assert [choice.text for choice in done.choices] == ["a | a", "b | b"]
    assert [choice.index for choice in many.choices] == [0, 1]


def test_key_of_the_user_is_never_replaced_and_placeholder_only_fills_a_gap(capture: Capture) -> None:
    assert os.environ["OPENAI_API_KEY"] == PLACEHOLDER_KEY
    assert capture.base_url not in ("", "http://127.0.0.1:0")


@pytest.mark.anyio
async def test_client_that_goes_away_cancels_the_call(capture: Capture) -> None:
    begun, cancelled = threading.Event(), threading.Event()

    async def slow(request: Request) -> str:
        begun.set()
        try:
            await anyio.sleep(600)
        except BaseException:
            cancelled.set()
            raise
        return "late"

    with models.use(ModelsConfig({"agent": FunctionLM(slow)})):
        async with openai.AsyncOpenAI(max_retries=0) as client:
            call = asyncio.create_task(client.chat.completions.create(model="x", messages=_messages("slow")))
            assert await anyio.to_thread.run_sync(begun.wait, 60)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        assert await anyio.to_thread.run_sync(cancelled.wait, 60)


@pytest.mark.embedded
def test_embedded_model_serves_captured_calls(capture: Capture) -> None:
    with models.use(ModelsConfig({"agent": "embedded/smollm2-135m-instruct"})), openai.OpenAI() as client:
        reply = client.chat.completions.create(
            model="x", messages=[{"role": "user", "content": "Say hello"}], max_tokens=8, temperature=0
        )
        stream = client.chat.completions.create(
            model="x", messages=[{"role": "user", "content": "Say hello"}], max_tokens=8, temperature=0, stream=True
        )
        text = "".join(event.choices[0].delta.content or "" for event in stream)
        chosen = client.chat.completions.create(
            model="x",
            messages=[{"role": "user", "content": "Is fire hot?"}],
            extra_body={"guided_choice": ["yes", "no"]},
        )
    assert reply.choices[0].message.content == text != ""
    assert chosen.choices[0].message.content in {"yes", "no"}
