"""What passes through the gateway, and what does not."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from agentopt.serving._types import (
    CHAT,
    COMPLETIONS,
    COUNT,
    EMBEDDINGS,
    FORWARDED,
    MESSAGES,
    RESPONSES,
    Choice,
    Exchange,
    Key,
    Phase,
    Refusal,
)
from agentopt.serving.fake_engine import CLOSED, OPEN
from agentopt.serving.gateway import Gateway, Limits
from agentopt.serving.gateway._forward import Answer, charged
from tests.serving.gateway.kit import HELLO, Names, Notes, Ring, events, house, words

pytestmark = pytest.mark.anyio
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO},
    COMPLETIONS: {"prompt": "hello wide world"},
    EMBEDDINGS: {"input": "hello"},
    RESPONSES: {"input": "hello"},
    MESSAGES: {"messages": HELLO, "max_tokens": 5},
    COUNT: {"messages": HELLO},
}


async def test_the_openai_client_lists_chats_and_streams() -> None:
    async with house() as home:
        url = f"http://127.0.0.1:{home.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as client:
            assert [model.id async for model in client.models.list()] == ["fake"]
            messages: list[Any] = HELLO
            whole = await client.chat.completions.create(model="fake", messages=messages)
            assert whole.choices[0].message.content == "hello wide world"
            stream = await client.chat.completions.create(model="fake", messages=messages, stream=True)
            chunks = [chunk async for chunk in stream]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hello wide world"
            with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
                await client.chat.completions.create(model="other", messages=messages)
        assert (await home.notes.one(2)).stream


@pytest.mark.parametrize("route", sorted(FORWARDED))
async def test_every_route_answers_and_its_tokens_are_counted(route: str) -> None:
    async with house() as home:
        reply = await home.ask(route, **BODIES[route])
        assert reply.status_code == 200
        assert reply.headers["x-request-id"].startswith("req_")
        assert reply.headers["cache-control"] == "no-store"
        exchange = await home.notes.one()
        assert exchange.id == reply.headers["x-request-id"]
        if route != COUNT:
            assert exchange.use is not None
            assert exchange.use.prompt > 0
        assert home.names.held == ["+fake", "-fake"]


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("split", [False, True])
async def test_the_usage_event_reaches_only_who_asked_for_it(route: str, wanted: bool, split: bool) -> None:
    async with house() as home:
        options: dict[str, Any] = {"stream_options": {"include_usage": True}} if wanted else {}
        reply = await home.ask(route, **BODIES[route], **options, stream=True, fake={"split": split})
        found = events(reply.text)
        assert found[-1] == "[DONE]"
        assert any(isinstance(event, dict) and event.get("usage") for event in found) is wanted
        exchange = await home.notes.one()
        assert exchange.use is not None
        assert (exchange.use.prompt, exchange.use.completion) == (3, 3)
        assert home.fake.requests[-1].json()["stream_options"] == {"include_usage": True}
        assert "stream_options" not in exchange.body or wanted


async def test_a_stream_is_the_same_with_and_without_the_gateway() -> None:
    async with house() as home:
        body: dict[str, Any] = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{home.fake.address.port}") as direct:
            expected = (await direct.post(CHAT, json=body)).text
        got = (await home.ask(CHAT, **body)).text
        assert got.replace("fake-00000002", "fake-00000001") == expected


@pytest.mark.parametrize("route", [RESPONSES, MESSAGES])
async def test_streams_with_named_events_pass_and_are_counted(route: str) -> None:
    async with house() as home:
        reply = await home.ask(route, **BODIES[route], stream=True)
        assert "event: " in reply.text
        use = (await home.notes.one()).use
        assert use is not None
        assert use.prompt > 0
        assert use.completion > 0


async def test_nothing_of_the_client_but_the_body_reaches_the_engine() -> None:
    async with house(keyring=Ring(secret=Key("k1", "me")), fake={"token": "inner"}) as home:
        headers = {
            "Authorization": "Bearer secret",
            "X-Request-Id": "mine-1",
            "Cookie": "a=b",
            "X-Forwarded-For": "1.2.3.4",
            "X-Evil": "1",
            "User-Agent": "someone",
            "Accept-Language": "xx",
            "traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01",
        }
        reply = await home.ask(headers=headers)
        received = home.fake.requests[-1]
        assert received.path == CHAT
        assert sorted(dict(received.headers)) == [
            "accept",
            "authorization",
            "content-length",
            "content-type",
            "host",
            "traceparent",
            "x-request-id",
        ]
        assert received.header("authorization") == "Bearer inner"
        assert received.header("x-request-id") == reply.headers["x-request-id"] != "mine-1"
        assert "set-cookie" not in reply.headers
        assert "server" not in reply.headers
        assert (await home.notes.one()).client_request_id == "mine-1"
        await home.ask(headers={"Authorization": "Bearer secret", "traceparent": "garbage"})
        assert home.fake.requests[-1].header("traceparent") is None


async def test_an_unchanged_body_goes_through_byte_by_byte() -> None:
    async with house() as home:
        raw = b'{ "messages":[{"role":"user","content":"caf\xc3\xa9"}],\n "model": "fake", "odd": 1e5 }'
        await home.client.post(CHAT, content=raw, headers={"content-type": "application/json"})
        assert home.fake.requests[-1].body == raw
        raw = b' { "messages":[{"role":"user","content":"{\\""}], "stream":true}'
        reply = await home.client.post(CHAT, content=raw, headers={"content-type": "application/json"})
        sent = home.fake.requests[-1]
        assert sent.json() == {**json.loads(raw), "model": "fake", "stream_options": {"include_usage": True}}
        assert sent.body.endswith(raw[3:])
        assert words(reply.text) == '{"'
        long: dict[str, Any] = {"messages": [{"role": "user", "content": "x" * 1_000_000}], "fake": {"text": "a"}}
        assert (await home.ask(**long)).status_code == 200
        assert home.fake.requests[-1].json()["messages"] == long["messages"]


async def test_names_are_rewritten_and_notes_become_headers() -> None:
    def system(route: str, body: dict[str, Any]) -> dict[str, Any]:
        return {**body, "messages": [{"role": "system", "content": "short"}, *body["messages"]]}

    names = Names({"support": Choice("fake", variant="best", rewrite=system), "knows": Choice("fake", adapter="fake")})
    async with house(names=names) as home:
        reply = await home.ask(model="support", stream=True)
        assert reply.headers["x-agentopt-variant"] == "support/best"
        sent = home.fake.requests[-1].json()
        assert sent["model"] == "fake"
        assert sent["messages"][0]["content"] == "short"
        exchange = await home.notes.one()
        assert (exchange.asked, exchange.model, exchange.variant) == ("support", "fake", "best")
        assert exchange.body == {"model": "support", "messages": HELLO, "stream": True}
        assert exchange.sent == sent
        await home.ask(model="knows")
        assert (await home.notes.one(2)).adapter == "fake"


async def test_a_choice_may_finish_whole_replies_and_no_streams() -> None:
    def shout(route: str, body: bytes) -> bytes:
        return body.replace(b"hello", b"HELLO")

    async with house(names=Names({"loud": Choice("fake", finish=shout)})) as home:
        assert "HELLO wide world" in (await home.ask(model="loud")).text
        assert words((await home.ask(model="loud", stream=True)).text) == "hello wide world"


async def test_observers_get_the_reply_they_want_up_to_a_bound() -> None:
    async with house(notes=Notes(wants=True), limits=Limits(kept_bytes=2000, grace_seconds=0.2)) as home:
        short = await home.ask(stream=True)
        await home.ask(stream=True, fake={"chunks": 200})
        await home.notes.one(2)
        assert home.notes.seen[0][1] == short.content
        assert home.notes.seen[1][1] is None


async def test_all_other_routes_of_the_engine_are_unreachable() -> None:
    async with house() as home:
        for path in {*OPEN, *CLOSED} - FORWARDED - {"/health", "/v1/models"}:
            for method in ("GET", "POST", "PUT", "DELETE"):
                reply = await home.client.request(method, path)
                assert reply.status_code == 404, (method, path)
                assert reply.json()["error"]["code"] == "not_found"
        for path in (
            "//v1/models",
            "/v1/../metrics",
            "/v1/models/../../metrics",
            "/v1/chat%2Fcompletions",
            "/V1/models",
        ):
            reply = await home.raw(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            assert reply.startswith(b"HTTP/1.1 404 "), path
        assert len(home.fake.requests) == 0


async def test_methods_heads_and_states() -> None:
    async with house() as home:
        reply = await home.client.get(CHAT)
        assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
        reply = await home.client.post("/health")
        assert (reply.status_code, reply.headers["allow"]) == (405, "GET, HEAD")
        for path in ("/health", "/ready", "/v1/models", "/v1/models/fake"):
            got, head = await home.client.get(path), await home.client.head(path)
            assert (got.status_code, head.status_code, head.content) == (200, 200, b"")
            assert head.headers["content-length"] == str(len(got.content))
        assert (await home.client.options("/v1/models")).status_code == 405
        home.engine.phase = Phase.RESTARTING
        assert (await home.client.get("/health")).status_code == 200
        assert (await home.client.get("/ready")).status_code == 503
        reply = await home.ask()
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
        assert reply.json()["error"]["code"] == "engine_restarting"
        home.engine.phase = Phase.FAILED
        assert "retry-after" not in (await home.ask()).headers


async def test_models_with_odd_names_are_found() -> None:
    async with house(names=Names({"org/name:8b": Choice("fake")})) as home:
        for path in ("/v1/models/org/name:8b", "/v1/models/org%2Fname%3A8b"):
            assert (await home.client.get(path)).json()["id"] == "org/name:8b"
        missing = await home.client.get("/v1/models/nobody")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


async def test_a_route_that_the_engine_lacks_is_501() -> None:
    async with house(abilities=lambda had: replace(had, routes=frozenset({CHAT}))) as home:
        reply = await home.ask(EMBEDDINGS, input="x")
        assert reply.status_code == 501
        assert "/v1/chat/completions" in reply.json()["error"]["message"]
        assert len(home.fake.requests) == 0


async def test_an_engine_without_usage_in_streams_is_not_asked_for_it() -> None:
    async with house(abilities=lambda had: replace(had, stream_usage=False)) as home:
        assert words((await home.ask(stream=True)).text) == "hello wide world"
        assert "stream_options" not in home.fake.requests[-1].json()


async def test_keys_see_and_ask_only_their_models() -> None:
    names = Names({"a/one": Choice("fake"), "b/two": Choice("fake")})
    ring = Ring(secret=Key("k1", "me", models=("a/*",)), all=Key("k2", "you"))
    async with house(keyring=ring, names=names) as home:
        mine = {"Authorization": "Bearer secret"}
        listed = (await home.client.get("/v1/models", headers=mine)).json()["data"]
        assert [entry["id"] for entry in listed] == ["a/one"]
        assert (await home.client.get("/v1/models/b/two", headers=mine)).status_code == 404
        assert (await home.ask(model="a/one", headers=mine)).status_code == 200
        for model in ({"model": "b/two"}, {}):
            reply = await home.ask(headers=mine, **model)
            assert (reply.status_code, reply.json()["error"]["type"]) == (403, "permission_error")
        assert (await home.ask(headers={"Authorization": "bearer all"})).status_code == 200
        assert ring.admitted == ["k1", "k1", "k1", "k2"]
        assert ring.released == [("k1", 6), ("k1", 0), ("k1", 0), ("k2", 6)]


async def test_a_key_s_limits_are_told_as_the_keyring_says() -> None:
    ring = Ring(secret=Key("k1", "me"))
    async with house(keyring=ring) as home:
        mine = {"Authorization": "Bearer secret"}
        ring.refusal = Refusal(429, "slower", kind="rate_limit_error", code="rate_limit_exceeded", retry_after=1.2)
        reply = await home.ask(headers=mine)
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "2")
        ring.refusal = Refusal(429, "used up", kind="insufficient_quota", code="insufficient_quota")
        reply = await home.ask(headers=mine)
        assert (reply.status_code, reply.headers["x-should-retry"]) == (429, "false")
        assert ring.released == []
        assert home.notes.codes == ["rate_limit_exceeded", "insufficient_quota"]
        assert (await home.notes.one(2)).sent == {}


class Sink:
    def __init__(self) -> None:
        self.given: list[Any] = []

    async def give(self, body: Any, key: Key | None) -> dict[str, Any]:
        if "request_id" not in body:
            raise Refusal(400, "request_id is missing", param="request_id")
        self.given.append((body, key))
        return {"object": "feedback"}


async def test_feedback_is_there_only_when_it_goes_somewhere() -> None:
    async with house() as home:
        assert (await home.client.post("/v1/feedback", json={})).status_code == 404
        assert "x-agentopt-feedback" not in (await home.ask()).headers
    sink = Sink()
    async with house(feedback=sink) as home:
        reply = await home.ask()
        assert reply.headers["x-agentopt-feedback"] == "/v1/feedback"
        told = {"request_id": reply.headers["x-request-id"], "score": 1}
        assert (await home.client.post("/v1/feedback", json=told)).json() == {"object": "feedback"}
        assert (await home.client.post("/v1/feedback", json={})).json()["error"]["param"] == "request_id"
        assert (await home.client.get("/v1/feedback")).status_code == 405
        assert sink.given == [(told, None)]
        assert [other.route for other in home.notes.others] == ["/v1/feedback"] * 3


async def test_sessions_and_the_wish_not_to_be_captured() -> None:
    async with house() as home:
        await home.ask(headers={"X-Agentopt-Session": "run-7", "X-Agentopt-Capture": "off"})
        exchange = await home.notes.one()
        assert (exchange.session, exchange.capture) == ("run-7", False)
        for odd in ("a b", "", "a" * 129):
            reply = await home.ask(headers={"X-Agentopt-Session": odd})
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_session")
        reply = await home.ask(model="a\r\nX-Evil: 1")
        assert (reply.status_code, reply.headers.get("x-evil")) == (404, None)


async def test_pages_of_other_origins_only_where_they_are_allowed() -> None:
    page = {"Origin": "https://app.example"}
    asks = {**page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    async with house(limits=Limits(cors=("https://app.example",), grace_seconds=0.2)) as home:
        reply = await home.client.options(CHAT, headers=asks)
        assert (reply.status_code, reply.content) == (204, b"")
        assert reply.headers["access-control-allow-origin"] == "https://app.example"
        assert reply.headers["access-control-allow-headers"] == "authorization"
        assert (await home.ask(headers=page)).headers["access-control-allow-origin"] == "https://app.example"
        other = await home.client.options(CHAT, headers={**asks, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
    async with house() as home:
        assert (await home.client.options(CHAT, headers=asks)).status_code == 405
        assert "access-control-allow-origin" not in (await home.ask(headers=page)).headers


async def test_it_is_an_asgi_application_for_other_servers_too() -> None:
    async with house() as home:
        app: Any = home.gateway
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            assert words((await client.post(CHAT, json={"messages": HELLO, "stream": True})).text) == "hello wide world"
        sent: list[Any] = []
        told = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

        async def receive() -> Any:
            return next(told)

        async def send(message: Any) -> None:
            sent.append(message["type"])

        assert isinstance(home.gateway, Gateway)
        await home.gateway({"type": "lifespan"}, receive, send)
        await home.gateway({"type": "websocket", "path": CHAT}, receive, send)
        assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete", "websocket.close"]


async def test_events_that_came_in_one_piece_are_counted_one_by_one() -> None:
    """Else whoever reads slowly, and hangs up before the engine's count, has a long reply for one token."""
    event = b'data: {"choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}\n\n'
    exchange = Exchange("req_1", CHAT, "127.0.0.1", first=1.0, stream=True, bytes_in=400)

    async def send(message: Any) -> None:
        pass

    answer = Answer(exchange, send, Limits(), [])
    await answer.piece(event)
    assert charged(exchange, answer.written) == 101
    await answer.piece(event * 1000)
    assert charged(exchange, answer.written) == 1101
