"""A process that stood still does not hold it against clients or the engine."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from agentopt.serving.gateway import Limits
from tests.serving.gateway.kit import HELD, house, read_all, request, until

pytestmark = pytest.mark.anyio
BRIEF = Limits(head_seconds=0.2, body_seconds=0.2, first_seconds=0.2, idle_seconds=0.2, grace_seconds=0.2)


@pytest.fixture(params=[True, False])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Both loops: they order timers and sockets in their own ways."""
    return "asyncio", {"use_uvloop": request.param}


async def stands_still(seconds: float) -> None:
    """The whole process; then its timers run."""
    time.sleep(seconds)
    for _ in range(3):
        await asyncio.sleep(0)


@pytest.mark.parametrize("sent", ["a part of the head", "the head"])
async def test_a_request_that_is_being_sent_may_go_on(sent: str) -> None:
    whole = request(more="Connection: close\r\n")
    cut = {"a part of the head": 20, "the head": whole.index(b"\r\n\r\n") + 4}[sent]
    async with house(limits=BRIEF) as home:
        reader, writer = await asyncio.open_connection("127.0.0.1", home.port)
        writer.write(whole[:cut])
        await until(lambda: bool(home.server._connections) and (cut < 30 or home.gateway.in_flight == 1))
        await stands_still(0.3)
        writer.write(whole[cut:])
        assert (await read_all(reader)).startswith(b"HTTP/1.1 200 ")
        writer.close()


@pytest.mark.parametrize("words", [0, 1])
async def test_an_engine_that_answers_is_not_silent(words: int) -> None:
    async with house(limits=BRIEF) as home, asyncio.TaskGroup() as group:
        reply = group.create_task(home.ask(stream=words > 0, fake=HELD | {"hold_after": words}))
        await until(lambda: home.fake.running == 1)
        await stands_still(0.6)
        home.fake.go_on()
        assert (await reply).status_code == 200
        assert "world" in reply.result().text
        assert home.engine.suspected == []
