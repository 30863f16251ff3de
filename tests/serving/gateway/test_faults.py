"""What the client sees when the engine, the client itself, its key or the clock ends a request early."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

import httpx
import openai
import pytest

from agentopt.serving._types import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Key, Phase
from agentopt.serving.gateway import Limits
from tests.serving.gateway.kit import HELD, HELLO, Ring, events, house, read_all, request, until, words

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> Any:
    """The loop that serves; asyncio's own runs the other files."""
    return "asyncio", {"use_uvloop": True}


SHORT = Limits(first_seconds=0.2, grace_seconds=0.2)
LONG = {"chunks": 100_000, "rate": 100}
"""A stream that does not end while a test runs."""
SAYS = {"messages": HELLO, "stream": True}


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_dies_before_it_answers_is_502(stream: bool) -> None:
    async with house() as home:
        reply = await home.ask(stream=stream, fake={"die_after": 0})
        assert reply.status_code == 502
        assert reply.json()["error"]["code"] == "engine_died"
        assert (await home.notes.one()).error == "engine_died"
        assert len(home.engine.suspected) == 1
        assert (await home.ask()).status_code == 200


async def test_an_engine_that_is_not_there_is_502() -> None:
    async with house() as home:
        assert (await home.ask()).status_code == 200
        await home.fake.kill()
        assert (await home.ask()).json()["error"]["code"] == "engine_died"
        await home.fake.start()
        assert (await home.ask()).status_code == 200


async def test_a_connection_that_the_engine_closed_meanwhile_is_not_an_error() -> None:
    async with house() as home:
        for _ in range(3):
            assert (await home.ask()).status_code == 200
            await home.fake.kill()
            await home.fake.start()
        assert home.engine.suspected == []


async def test_a_broken_chat_stream_ends_with_an_error_event() -> None:
    async with house() as home:
        reply = await home.ask(stream=True, fake={"die_after": 2})
        assert reply.status_code == 200
        assert words(reply.text) == "hello wide"
        last = events(reply.text)[-1]
        assert last["error"]["code"] == "engine_died"
        assert reply.text.endswith("\n\n")
        exchange = await home.notes.one()
        assert (exchange.status, exchange.error) == (200, "engine_died")
        assert words((await home.ask(stream=True)).text) == "hello wide world"


async def test_an_event_is_never_cut_by_the_error() -> None:
    async with house() as home:
        for words_before in range(1, 3):
            reply = await home.ask(stream=True, fake={"die_after": words_before, "split": True})
            for line in reply.text.splitlines():
                assert not line or json.loads(line.removeprefix("data: "))


async def test_openai_s_client_raises_the_error_of_a_broken_stream() -> None:
    async with house() as home:
        url = f"http://127.0.0.1:{home.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as client:
            messages: list[Any] = HELLO
            broken = {"fake": {"die_after": 1}}
            stream = await client.chat.completions.create(
                model="fake", messages=messages, stream=True, extra_body=broken
            )
            with pytest.raises(openai.APIError, match="the engine broke off"):
                async for _ in stream:
                    pass
            found = []
            async for event in await client.responses.create(
                model="fake", input="one two three", stream=True, extra_body=broken
            ):
                found.append(event)
            assert found[-1].type == "error"
            assert found[-1].code == "engine_died"
            assert found[-1].sequence_number == 0  # the fake's events have no numbers


async def test_broken_message_streams_end_as_their_clients_expect() -> None:
    async with house() as home:
        reply = await home.ask(MESSAGES, messages=HELLO, max_tokens=9, stream=True, fake={"die_after": 1})
        name, data = reply.text.rstrip().rpartition("\n\n")[2].splitlines()
        assert name == "event: error"
        assert json.loads(data.removeprefix("data: "))["error"]["type"] == "api_error"
        refused = await home.ask(MESSAGES, messages=[], max_tokens=9)
        assert refused.json()["type"] == "error"
        assert refused.json()["error"]["type"] == "invalid_request_error"


async def test_a_silent_engine_is_504_or_an_error_event() -> None:
    async with house(limits=SHORT) as home:
        for stream in (False, True):
            reply = await home.ask(stream=stream, fake={"hang_after": 0})
            assert (reply.status_code, reply.json()["error"]["code"]) == (504, "engine_silent")
        assert len(home.engine.suspected) == 2
        await until(lambda: home.fake.running == 0)
    async with house(limits=Limits(idle_seconds=0.2, grace_seconds=0.2)) as home:
        reply = await home.ask(stream=True, fake={"hang_after": 1})
        assert (reply.status_code, events(reply.text)[-1]["error"]["code"]) == (200, "engine_silent")
        assert len(home.engine.suspected) == 1
        await until(lambda: home.fake.running == 0)


async def test_a_request_has_an_end_even_if_the_engine_keeps_talking() -> None:
    async with house(limits=Limits(total_seconds=0.3, grace_seconds=0.2)) as home:
        reply = await home.ask(fake=HELD)
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
        assert home.engine.suspected == []
    async with house() as home, home.client.stream("POST", CHAT, json=SAYS | {"fake": LONG}) as reply:
        got = b""
        async for piece in reply.aiter_bytes():
            got += piece
            for flight in home.gateway._flights:  # as if its time was up, now that it has begun
                flight.deadline = 0.0
        assert events(got.decode())[-1]["error"]["code"] == "timeout"
        assert home.engine.suspected == []


@pytest.mark.parametrize(
    "fault", [{"garbage": True}, {"not_json": True}, {"status": 500}, {"status": 302}, {"status": 401}]
)
async def test_what_no_client_should_see_becomes_502(fault: dict[str, Any]) -> None:
    async with house() as home:
        reply = await home.ask(fake=fault)
        assert (reply.status_code, reply.json()["error"]["code"]) == (502, "engine_error")


@pytest.mark.parametrize("status", [400, 404, 422, 429])
async def test_the_engine_s_own_refusals_pass(status: int) -> None:
    async with house() as home:
        reply = await home.ask(stream=True, fake={"status": status})
        assert reply.status_code == status
        assert reply.json()["error"]["message"]
        assert (await home.notes.one()).error == "engine_refused"
        assert home.engine.suspected == []


async def test_a_busy_engine_is_503_with_a_time() -> None:
    async with house() as home:
        reply = await home.ask(fake={"status": 503})
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")


async def test_a_long_reply_that_breaks_off_is_seen_to_be_broken() -> None:
    async with house(limits=Limits(whole_bytes=1000, grace_seconds=0.2)) as home:
        with pytest.raises(httpx.RemoteProtocolError):
            await home.ask(fake={"chunks": 50_000, "die_after": 1})
        whole = await home.ask(fake={"chunks": 5000})
        exchange = await home.notes.one(2)
        assert exchange.use is not None
        assert exchange.use.completion == 5000
        assert len(whole.content) > 20_000


async def test_a_client_that_hangs_up_ends_the_engine_s_work() -> None:
    ring = Ring(secret=Key("k1", "me"))
    async with house(keyring=ring) as home:
        mine = {"Authorization": "Bearer secret"}
        body = {"messages": HELLO, "stream": True, "fake": LONG}
        async with home.client.stream("POST", CHAT, json=body, headers=mine) as reply:
            await anext(reply.aiter_bytes())
            assert home.fake.running == 1
        await until(lambda: home.fake.running == 0)
        exchange = await home.notes.one()
        assert (exchange.status, exchange.error) == (499, "client_gone")
        # no count came: what was sent is estimated, so that nobody streams for nothing
        assert ring.released[0][1] > len(json.dumps(HELLO)) // 4
        reader, writer = await asyncio.open_connection("127.0.0.1", home.port)
        writer.write(request({"messages": HELLO, "fake": {"wait": 30}}, more="Authorization: Bearer secret\r\n"))
        await until(lambda: home.gateway.in_flight == 1 and home.fake.count == 2)
        writer.close()
        assert (await home.notes.one(2)).error == "client_gone"
        assert await reader.read() == b""


async def test_a_client_that_does_not_read_holds_the_engine_back() -> None:
    limits = Limits(stalled_seconds=0.5, grace_seconds=0.2)
    async with house(limits=limits) as home:
        text = "x" * 10_000
        body = {"messages": HELLO, "stream": True, "fake": {"text": text, "chunks": 5_000}}
        reader, writer = await asyncio.open_connection("127.0.0.1", home.port, limit=1 << 10)
        reading: Any = writer.transport
        reading.pause_reading()
        writer.write(request(body))
        exchange = await home.notes.one()
        assert exchange.error == "client_gone"
        # 50 MB were there to be sent: what left the gateway fits into sockets
        assert exchange.bytes_out < 20_000_000
        await until(lambda: home.fake.running == 0)
        writer.transport.abort()
        with suppress(ConnectionResetError):
            await reader.read()


async def test_a_slow_reader_gets_everything() -> None:
    async with house() as home:
        body = {"messages": HELLO, "stream": True, "fake": {"text": "y" * 5_000, "chunks": 800}}
        async with home.client.stream("POST", CHAT, json=body) as reply:
            got = b""
            async for piece in reply.aiter_bytes():
                got += piece
                if len(got) < 100_000:
                    await asyncio.sleep(0.01)
        assert got.count(b"y") == 4_000_000
        assert got.endswith(b"data: [DONE]\n\n")


async def test_a_revoked_key_ends_its_streams_and_no_others() -> None:
    ring = Ring(secret=Key("k1", "me"), other=Key("k2", "you"))
    async with house(keyring=ring) as home:

        async def stream(secret: str) -> str:
            nonlocal begun
            script = LONG if secret == "secret" else HELD
            body = {"messages": HELLO, "stream": True, "fake": script}
            async with home.client.stream(
                "POST", CHAT, json=body, headers={"Authorization": f"Bearer {secret}"}
            ) as reply:
                begun += 1
                return (await reply.aread()).decode()

        begun = 0
        async with asyncio.TaskGroup() as group:
            mine, yours = group.create_task(stream("secret")), group.create_task(stream("other"))
            await until(lambda: begun == 2)
            ring.revoke("secret")
            await mine
            home.fake.go_on()
        assert events(mine.result())[-1]["error"]["code"] == "key_revoked"
        assert events(yours.result())[-1] == "[DONE]"
        assert (await home.ask(headers={"Authorization": "Bearer secret"})).status_code == 401
        assert sorted(key for key, _ in ring.released) == ["k1", "k2"]


async def test_a_key_revoked_while_the_body_is_read_is_401() -> None:
    ring = Ring(secret=Key("k1", "me"))
    async with house(keyring=ring) as home:
        whole = request(more="Authorization: Bearer secret\r\n")
        reader, writer = await asyncio.open_connection("127.0.0.1", home.port)
        writer.write(whole[:-5])
        await until(lambda: home.gateway.in_flight == 1)
        ring.revoke("secret")
        assert (await read_all(reader, end=b"}")).startswith(b"HTTP/1.1 401 ")
        writer.close()
        assert home.fake.count == 0


async def test_draining_waits_for_what_is_under_way_and_takes_nothing_new() -> None:
    async with house() as home, asyncio.TaskGroup() as group:
        running = group.create_task(home.ask(stream=True, fake=HELD))
        await until(lambda: home.fake.running == 1)
        draining = group.create_task(home.gateway.drain(20))
        await until(lambda: home.gateway.draining)
        assert (await home.client.get("/ready")).status_code == 503
        refused = await home.ask()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["connection"] == "close"
        home.fake.go_on()
        assert await draining
        assert events((await running).text)[-1] == "[DONE]"


async def test_two_may_wait_for_the_end_of_what_is_under_way() -> None:
    async with house() as home, asyncio.TaskGroup() as group:
        running = group.create_task(home.ask(fake=HELD))
        await until(lambda: home.fake.running == 1)
        waiting = [group.create_task(home.gateway.drain(60)) for _ in range(2)]
        await until(lambda: home.gateway.draining)
        home.fake.go_on()
        async with asyncio.timeout(20):
            assert [await one for one in waiting] == [True, True]
        assert (await running).status_code == 200


async def test_draining_ends_what_takes_too_long() -> None:
    async with house() as home, asyncio.TaskGroup() as group:
        running = group.create_task(home.ask(stream=True, fake=LONG))
        await until(lambda: home.fake.running == 1)
        assert not await home.gateway.drain(0.05)
        assert events((await running).text)[-1]["error"]["code"] == "draining"
        assert await home.gateway.drain(20)


async def test_an_engine_that_restarts_takes_the_next_request() -> None:
    async with house() as home, asyncio.TaskGroup() as group:
        running = group.create_task(home.ask(stream=True, fake=LONG))
        await until(lambda: home.fake.running == 1)
        await home.fake.kill()
        home.engine.phase = Phase.RESTARTING
        assert events((await running).text)[-1]["error"]["code"] == "engine_died"
        assert (await home.ask()).status_code == 503
        await home.fake.start()
        home.engine.phase = Phase.READY
        assert (await home.ask(COMPLETIONS, prompt="x y")).json()["choices"][0]["text"] == "x y"


async def test_a_stream_without_its_last_event_is_passed_as_it_is() -> None:
    async with house() as home:
        reply = await home.ask(stream=True, fake={"no_done": True})
        assert words(reply.text) == "hello wide world"
        assert "[DONE]" not in reply.text


async def test_too_many_requests_at_a_time() -> None:
    async with house(limits=Limits(in_flight=2, grace_seconds=0.2)) as home, asyncio.TaskGroup() as group:
        running = [group.create_task(home.ask(stream=True, fake=HELD)) for _ in range(2)]
        await until(lambda: home.fake.running == 2)
        refused = await home.ask()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        home.fake.go_on()
        assert [(await task).status_code for task in running] == [200, 200]


async def test_every_route_of_the_responses_form_is_told_of_a_death_before_the_first_byte() -> None:
    async with house() as home:
        reply = await home.ask(RESPONSES, input="x", stream=True, fake={"die_after": 0})
        assert (reply.status_code, reply.json()["error"]["type"]) == (502, "server_error")
