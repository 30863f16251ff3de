"""The direct OpenAI-compatible client and the litellm client, both against the loopback server."""

from __future__ import annotations

import os
import subprocess
import sys
from email.utils import formatdate
from typing import Any

import anyio
import anyio.abc
import pytest

from agentopt import graph
from agentopt.errors import UserError
from agentopt.models import (
    LM,
    LiteLLMClient,
    LMOptions,
    LMRateLimit,
    LMRefused,
    LMSettings,
    LMUnavailable,
    OpenAICompatible,
    OpenAIOptions,
    Reply,
    Request,
    RetryPolicy,
    ThrottleTable,
    UnknownModel,
    _http,
)
from agentopt.models._wire import http_error, read_retry_after
from tests.models.conftest import VirtualClock
from tests.models.fake_server import FakeServer

pytestmark = pytest.mark.anyio


def ask(**fields: Any) -> Request:
    return Request("fake", ({"role": "user", "content": "hi there"},), **fields)


# ---- direct


async def test_every_option_reaches_the_server(server: FakeServer) -> None:
    options = LMOptions(temperature=0.5, max_tokens=9, seed=3, stop=("x",), top_p=0.9, extra={"user": "u"}, sample=2)
    await OpenAICompatible(server.url, "m", OpenAIOptions(api_key="secret")).send(ask(options=options))
    assert server.requests[0] == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi there"}],
        "temperature": 0.5,
        "max_tokens": 9,
        "seed": 3,
        "stop": ["x"],
        "top_p": 0.9,
        "user": "u",
    }
    assert server.headers[0]["authorization"] == "Bearer secret"


async def test_choices_can_be_enforced_by_schema_or_by_guided_choice(server: FakeServer) -> None:
    server.default = '{"answer": "b"}'
    schema = OpenAICompatible(server.url, "m", OpenAIOptions(choices="schema"))
    assert (await LM(schema).complete("x", choices=["a", "b"])).text == "b"
    enum = server.requests[0]["response_format"]["json_schema"]["schema"]["properties"]["answer"]["enum"]
    assert enum == ["a", "b"]
    await LM(OpenAICompatible(server.url, "m2", OpenAIOptions(choices="guided"))).complete("x", choices=["a", "b"])
    assert server.requests[1]["guided_choice"] == ["a", "b"]


async def test_choice_logprobs_come_from_the_first_token(server: FakeServer) -> None:
    tops = [{"token": "pos", "logprob": -0.1}, {"token": " neg", "logprob": -2.5}, {"token": "The", "logprob": -4.0}]
    server.default = {"text": "positive", "logprobs": {"content": [{"token": "pos", "top_logprobs": tops}]}}
    client = OpenAICompatible(server.url, "m", OpenAIOptions(logprobs=True))
    reply = await client.send(ask(choices=("positive", "negative")))
    assert server.requests[0]["top_logprobs"] == 20
    assert reply.logprobs == {"positive": -0.1, "negative": -2.5}


async def test_stream_events_that_break_across_reads_are_put_together(server: FakeServer) -> None:
    server.default = "ünïcode text in many small pieces"
    pieces = [piece async for piece in OpenAICompatible(server.url, "m").stream(ask())]
    assert isinstance(pieces[-1], Reply)
    assert "".join(piece for piece in pieces if isinstance(piece, str)) == pieces[-1].text == server.default
    assert pieces[-1].usage.input_tokens == 2


async def test_an_error_status_while_streaming_is_raised(server: FakeServer) -> None:
    server.default = {"status": 429}
    with pytest.raises(LMRateLimit):
        async for _ in OpenAICompatible(server.url, "m").stream(ask()):
            pass


async def test_connections_are_kept_alive_and_one_the_server_closed_is_not_used_again(server: FakeServer) -> None:
    client = OpenAICompatible(server.url, "m")
    for _ in range(5):
        await client.send(ask())
    assert server.connections == 1
    server.script([{"drop": True}])
    with pytest.raises(LMUnavailable, match="broke the connection"):
        await client.send(ask())
    await client.send(ask())
    assert server.connections == 2
    await client.aclose()
    await client.send(ask())
    assert server.connections == 3


async def test_a_body_cut_short_is_a_retryable_failure() -> None:
    async def half(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, half)
        with pytest.raises(LMUnavailable) as caught:
            await OpenAICompatible(f"http://127.0.0.1:{port}", "m").send(ask())
        assert caught.value.retryable
        group.cancel_scope.cancel()


async def test_a_proxy_in_the_environment_is_used(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.port}")
    client = OpenAICompatible("http://models.invalid/v1", "m")
    assert isinstance(client._transport, _http.HttpxTransport)
    try:
        assert (await client.send(ask())).text == "ok"
    finally:
        await client.aclose()
    monkeypatch.setenv("NO_PROXY", "models.invalid")
    assert isinstance(OpenAICompatible("http://models.invalid/v1", "m")._transport, _http.H11Transport)


def test_a_base_url_must_be_http() -> None:
    with pytest.raises(UserError, match="expected http"):
        OpenAICompatible("localhost:8000", "m")


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after": formatdate(0, usegmt=True)}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read_in_all_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert read_retry_after(headers) == seconds


def test_an_exhausted_quota_is_not_a_rate_limit() -> None:
    error = http_error("m", 429, {}, b'{"error": {"message": "pay", "code": "insufficient_quota"}}')
    assert isinstance(error, LMRefused)


# ---- litellm (one process imports it once: it takes seconds)


def litellm_test(test: Any) -> Any:
    """Litellm and what it loads late give warnings of their own, which are not ours to fix."""
    return pytest.mark.slow(pytest.mark.filterwarnings("ignore")(test))


def litellm_lm(server: FakeServer, clock: VirtualClock) -> LM:
    client = LiteLLMClient("openai/gpt-4o-mini", base_url=server.url, api_key="x")
    return LM(client, settings=LMSettings(clock=clock, throttle=ThrottleTable(clock=clock), retry=RetryPolicy()))


@litellm_test
async def test_litellm_completes_streams_prices_and_retries_by_our_rules(
    server: FakeServer, clock: VirtualClock
) -> None:
    lm = litellm_lm(server, clock)
    reply = await lm.complete("two words", options=LMOptions(seed=5, stop=("z",)))
    assert reply.text == "ok"
    assert reply.usage == graph.Usage(input_tokens=2, output_tokens=1, calls=1, tries=1)
    assert reply.cost == pytest.approx((2 * 0.15 + 1 * 0.6) / 1e6)
    assert server.requests[0]["model"] == "gpt-4o-mini"
    assert server.requests[0]["seed"] == 5
    server.script([{"status": 429, "retry_after": 10}, {"status": 500}, {"text": "later"}])
    reply = await lm.complete("y")
    assert (reply.text, reply.usage.tries) == ("later", 3)
    assert clock.slept[0] == 10
    assert len(server.requests) == 4
    server.default = "one two three"
    assert "".join([piece async for piece in lm.stream("z")]) == "one two three"
    server.default = {"status": 401, "message": "who are you"}
    with pytest.raises(LMRefused, match="who are you"):
        await lm.complete("w")
    server.default = '{"a": 1}'
    assert (await lm.complete("v", output=dict[str, int])).parsed == {"a": 1}


@litellm_test
def test_litellm_serves_sync_and_several_loops(server: FakeServer, clock: VirtualClock) -> None:
    lm = litellm_lm(server, clock)
    assert lm.complete_sync("a").text == "ok"

    async def one() -> str:
        return (await lm.complete("b")).text

    assert [anyio.run(one), anyio.run(one)] == ["ok", "ok"]


@litellm_test
async def test_litellm_without_a_provider_is_an_unknown_model(clock: VirtualClock) -> None:
    with pytest.raises(UnknownModel, match="provider"):
        await LM(LiteLLMClient("no-such-model-anywhere"), settings=LMSettings(clock=clock)).complete("x")


# ---- imports

_OFFLINE = """
import socket, sys
def refuse(*args, **kwargs): raise AssertionError("a socket was opened")
socket.socket.connect = refuse
socket.create_connection = refuse
socket.getaddrinfo = refuse
import agentopt, agentopt.models as models
models.connect("anthropic/claude-haiku-4-5")
models.connect("openai-compatible:http://localhost:1/v1#m")
models.lm("agent")
heavy = {"litellm", "openai", "httpx", "scipy", "numpy", "pydantic", "xllamacpp", "sqlalchemy"} & set(sys.modules)
print(",".join(sorted(heavy)))
"""


def test_d14_importing_and_connecting_opens_no_socket_and_loads_no_llm_library() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _OFFLINE], capture_output=True, text=True, check=True, env=os.environ.copy()
    )
    assert done.stdout.strip() == ""
