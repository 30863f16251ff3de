"""What goes wrong behind the gateway or while it works: clients are told in their protocol, the next one is served."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from agentopt.serving._types import COMPLETIONS, MESSAGES, RESPONSES, Phase
from agentopt.serving.gateway import Limits
from tests.serving.endpoint import CHAT, HELLO, Endpoint, run, until

LONG = {"chunks": 100_000, "rate": 50.0}
"""A stream that does not end while a test runs."""
SLOW = Limits(first_seconds=0.6, idle_seconds=0.6)
SAID = HELLO | {"prompt": "hello wide world", "input": "hello wide world", "max_tokens": 20}


def events_of(text: str) -> list[tuple[str, Any]]:
    """(name, data) of each event of a stream."""
    found: list[tuple[str, Any]] = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        if "data" in fields:
            data = fields["data"]
            found.append((fields.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return found


DIED, SILENT, NEVER = {"die_after": 2, "split": True}, {"hang_after": 2}, {"die_after": 0}


@pytest.mark.parametrize(
    ("route", "fault", "code"),
    [
        *[(route, DIED, "engine_died") for route in (CHAT, COMPLETIONS, RESPONSES, MESSAGES)],
        *[(route, SILENT, "engine_silent") for route in (CHAT, MESSAGES)],
        *[(route, NEVER, None) for route in (CHAT, RESPONSES)],
    ],
)
def test_an_engine_that_breaks_in_a_stream(route: str, fault: dict[str, Any], code: str | None, tmp_path: Path) -> None:
    async def test(at: Endpoint) -> None:
        reply = await at.client.post(route, json=SAID | {"stream": True, "fake": fault})
        if code is None:  # nothing was sent yet: a plain error
            assert reply.status_code == 502
            assert reply.json()["error"]["message"]
        else:
            assert reply.status_code == 200
            name, last = events_of(reply.text)[-1]
            assert "error" in (name, last.get("type")) or "error" in last
            assert name == ("error" if route in (RESPONSES, MESSAGES) else "")
            assert "[DONE]" not in reply.text
            assert at.log()[-1]["error"] == code
        assert at.engine.suspected
        assert at.gateway.in_flight == 0
        assert (await at.client.post(route, json=SAID | {"stream": True})).status_code == 200

    run(tmp_path, test, limits=SLOW)


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ({"die_after": 0}, 502),
        ({"die_after": 1}, 502),
        ({"hang_after": 0}, 504),
        ({"garbage": True}, 502),
        ({"status": 500}, 502),
        ({"status": 503}, 503),
        ({"status": 301}, 502),
        ({"status": 401}, 502),
        ({"status": 429}, 429),
    ],
)
def test_an_engine_that_breaks_before_its_reply(fault: dict[str, Any], status: int, tmp_path: Path) -> None:
    async def test(at: Endpoint) -> None:
        for stream in (False, True):
            if stream and fault == {"die_after": 1}:
                continue
            reply = await at.chat(fake=fault, stream=stream)
            assert reply.status_code == status
            assert len(reply.json()["error"]["message"]) > 10
            assert reply.headers["x-request-id"].startswith("req_")
            assert (await at.chat()).status_code == 200
        assert at.gateway.in_flight == 0

    run(tmp_path, test, limits=SLOW)


def test_the_openai_client_raises_what_it_should(tmp_path: Path) -> None:
    async def test(at: Endpoint) -> None:
        base = f"{at.client.base_url}v1" if str(at.client.base_url).endswith("/") else f"{at.client.base_url}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key=at.secret, max_retries=0) as client:
            create: Any = client.chat.completions.create
            with pytest.raises(openai.InternalServerError):
                await create(**HELLO, extra_body={"fake": {"die_after": 0}})
            with pytest.raises(openai.APIError):
                async for _ in await create(**HELLO, stream=True, extra_body={"fake": {"die_after": 1}}):
                    pass
            with pytest.raises(openai.NotFoundError, match="fake"):
                await create(**HELLO | {"model": "nobody"})
            with pytest.raises(openai.AuthenticationError):
                await client.with_options(api_key="ak-wrong").models.list()

    run(tmp_path, test)


def test_an_engine_that_is_gone_and_comes_back(tmp_path: Path) -> None:
    async def test(at: Endpoint) -> None:
        async with asyncio.TaskGroup() as group:
            streams = [group.create_task(at.chat(stream=True, fake=LONG)) for _ in range(20)]
            await until(lambda: at.fake.running == 20)
            await at.fake.kill()
        for stream in streams:
            assert stream.result().status_code in (200, 502)
            if stream.result().status_code == 200:
                assert "error" in events_of(stream.result().text)[-1][1]
        assert (await at.chat()).status_code == 502
        assert at.engine.suspected
        at.engine.phase = Phase.RESTARTING
        reply = await at.chat()
        assert reply.status_code == 503
        assert int(reply.headers["retry-after"]) >= 1
        assert (await at.client.get("/ready")).status_code == 503
        assert (await at.client.get("/health")).status_code == 200
        await at.fake.start()
        at.engine.phase, at.engine.generation = Phase.READY, 2
        assert (await at.chat()).status_code == 200

    run(tmp_path, test)


def test_a_key_that_is_revoked_in_the_middle_of_its_stream(tmp_path: Path) -> None:
    async def test(at: Endpoint) -> None:
        async with asyncio.TaskGroup() as group:
            stream = group.create_task(at.chat(stream=True, fake=LONG))
            await until(lambda: at.fake.running)
            await asyncio.to_thread(at.keys.revoke, "good")
        assert stream.result().status_code == 200
        assert "error" in events_of(stream.result().text)[-1][1]
        assert at.log()[-1]["error"] == "key_revoked"
        assert (await at.chat()).status_code == 401
        await until(lambda: not at.fake.running)  # the engine is told to stop working on it

    run(tmp_path, test)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_stops_the_engine_and_pays(tmp_path: Path, stream: bool) -> None:
    async def test(at: Endpoint) -> None:
        async def ask() -> None:
            async with at.client.stream("POST", CHAT, json=HELLO | {"stream": stream, "fake": LONG}) as reply:
                async for _ in reply.aiter_raw():
                    if not stream:
                        continue
                    return

        task = asyncio.create_task(ask())
        await until(lambda: at.asked)
        if not stream:
            task.cancel()
        await asyncio.wait([task])
        await until(lambda: not at.fake.running and not at.gateway.in_flight)
        assert at.log()[-1]["status"] == 499
        assert at.keyring.used(at.keys.list()[0].key.id) >= (1 if stream else 0)
        assert (await at.chat()).status_code == 200

    run(tmp_path, test)


def test_a_drain_lets_streams_end_and_takes_nothing_new(tmp_path: Path) -> None:
    async def test(at: Endpoint) -> None:
        async with asyncio.TaskGroup() as group:
            short = group.create_task(at.chat(stream=True, fake={"hold_after": 2}))
            long = group.create_task(at.chat(stream=True, fake=LONG))
            await until(lambda: at.fake.running == 2)
            group.create_task(at.gateway.drain(600.0))
            await until(lambda: at.gateway.draining)
            assert (await at.chat()).status_code == 503
            assert (await at.client.get("/ready")).status_code == 503
            at.fake.go_on()
            assert "[DONE]" in (await short).text
            assert await at.gateway.drain(0.05) is False
        assert "error" in events_of(long.result().text)[-1][1]

    run(tmp_path, test)


def test_more_at_once_than_the_engine_should_get(tmp_path: Path) -> None:
    async def test(at: Endpoint) -> None:
        async with asyncio.TaskGroup() as group:
            held = [group.create_task(at.chat(stream=True, fake=LONG)) for _ in range(3)]
            await until(lambda: at.fake.running == 3)
            reply = await at.chat()
            assert reply.status_code == 503
            assert "retry-after" in reply.headers
            for task in held:
                task.cancel()
        await until(lambda: not at.gateway.in_flight)
        assert (await at.chat()).status_code == 200

    run(tmp_path, test, limits=Limits(in_flight=3))


def test_more_connections_than_are_taken_that_say_nothing(tmp_path: Path) -> None:
    async def test(at: Endpoint) -> None:
        writers: list[asyncio.StreamWriter] = []
        try:
            for _ in range(60):
                writers.append((await asyncio.open_connection("127.0.0.1", at.port))[1])
            async with asyncio.timeout(60):
                while True:
                    try:
                        if (await at.chat()).status_code == 200:
                            break
                    except httpx.TransportError:
                        pass
                    await asyncio.sleep(0.1)
        finally:
            for writer in writers:
                writer.close()

    run(tmp_path, test, limits=Limits(connections=50, head_seconds=1.0))
