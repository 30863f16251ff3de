"""Clients that read nothing, end one half of a connection, are slow at the end, or offer another protocol."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import closing
from typing import Any

import pytest

from agentopt.serving.gateway import Limits, serving
from tests.serving.gateway.kit import HELLO, house, until

pytestmark = pytest.mark.anyio
QUICK = Limits(head_seconds=0.3, body_seconds=0.3, keep_alive_seconds=0.3, stalled_seconds=0.3, grace_seconds=20.0)
PATIENT = Limits(grace_seconds=20.0)
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODY = json.dumps({"messages": HELLO}).encode()
POST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
)


@pytest.fixture
def anyio_backend() -> Any:
    """The loop that serves."""
    return "asyncio", {"use_uvloop": True}


def saying(size: int, *, more: bytes = b"") -> Any:
    """An application whose reply has so many bytes, and ends after `more`, which comes later."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * size, "more_body": bool(more)})
        if more:
            await asyncio.sleep(0.3)
            await send({"type": "http.response.body", "body": more})

    return app


def deaf(port: int) -> socket.socket:
    """A client with next to no room for what it does not read."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    return client


async def test_a_client_that_reads_nothing_is_cut_off_also_when_it_has_asked_again() -> None:
    async with serving(saying(8 << 20), limits=QUICK) as server:
        with closing(deaf(server.port)) as client:
            client.sendall(GET + GET)
            await until(lambda: server.answered >= 1)
            await until(lambda: not server._connections)


async def test_a_connection_that_the_client_has_ended_on_its_side_does_not_stay() -> None:
    async with serving(saying(4 << 20, more=b"y"), limits=PATIENT) as server:
        with closing(deaf(server.port)) as client:
            client.sendall(GET)
            await until(lambda: any(one._unsent for one in server._connections))
            for one in server._connections:  # below the mark at which the transport says that nobody reads
                one.resume_writing()
            server.limits = QUICK
            client.shutdown(socket.SHUT_WR)
            await until(lambda: not server._connections)


async def test_a_reply_that_is_written_goes_out_before_the_server_ends() -> None:
    size = 8 << 20
    async with serving(saying(size), limits=PATIENT) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(GET)
        await until(lambda: server.answered == 1)
        stopping = asyncio.create_task(server.stop())
        reply = await reader.read()
        assert reply.count(b"x") == size
        assert reply.endswith(b"\r\n0\r\n\r\n")
        writer.close()
        await stopping


async def test_a_client_that_offers_another_protocol_keeps_its_body_and_its_wish_to_close() -> None:
    async with house() as home:
        offer = (
            POST % len(BODY)
            + b"Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n\r\n"
        )
        reply = await home.raw(offer + BODY)
        assert reply.startswith(b"HTTP/1.1 200 ")
        assert home.fake.requests[-1].json()["messages"] == HELLO


async def test_a_body_that_is_broken_before_it_is_asked_for_is_refused_and_no_more() -> None:
    async with house() as home:
        head = POST.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked") + b"Expect: 100-continue\r\n\r\n"
        reply = await home.raw(head + b"what\r\n")
        assert reply.startswith(b"HTTP/1.1 400 ")
        assert b"100 Continue" not in reply
        await until(lambda: not home.server._tasks)
        assert home.trouble == []


async def test_old_clients_are_told_nothing_in_between() -> None:
    async with house() as home:
        old = (POST % len(BODY)).replace(b"HTTP/1.1", b"HTTP/1.0") + b"Expect: 100-continue\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", home.port)
        writer.write(old)
        await asyncio.sleep(0.1)
        writer.write(BODY)
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        writer.close()
