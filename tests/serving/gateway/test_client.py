"""The client towards engines, alone: framing, the pool, hosts and sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from agentopt.serving._types import CHAT, Address
from agentopt.serving.fake_engine import FakeEngine
from agentopt.serving.gateway import Upstream, UpstreamError
from tests.serving.gateway.kit import until

pytestmark = pytest.mark.anyio
Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def engine(handle: Handle) -> AsyncGenerator[tuple[Upstream, Address]]:
    """An engine whose bytes a test writes itself."""
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    upstream = Upstream(connect_seconds=5)
    try:
        yield upstream, Address(port=server.sockets[0].getsockname()[1])
    finally:
        upstream.close()
        server.close()
        await asyncio.sleep(0.01)


def saying(*pieces: bytes, close: bool = True) -> Handle:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            if not writer.is_closing():  # the client may have hung up already
                writer.write(piece)
            await asyncio.sleep(0)
        if not close:
            await reader.read()
        writer.close()

    return handle


async def get(upstream: Upstream, address: Address, **options: Any) -> tuple[int, bytes]:
    reply = await upstream.request(address, "GET", "/", **options)
    return reply.status, await reply.read(1 << 20)


@pytest.mark.parametrize(
    ("said", "body"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n", b"ok"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Trailer: a\r\n\r\n", b"ok"),
        (b"HTTP/1.0 200 OK\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 500 No\r\ncontent-length: 4\r\n\r\nevil", b"ok"),
    ],
)
async def test_framings(said: bytes, body: bytes) -> None:
    for pieces in ([said], [said[n : n + 1] for n in range(len(said))]):
        async with engine(saying(*pieces)) as (upstream, address):
            assert await get(upstream, address) == (200, body)


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (b"", "engine_died"),
        (b"HTTP/1.1 200 OK\r\nconte", "engine_died"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nok", "engine_died"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n", "engine_died"),
        (b"SSH-2.0-x\r\n\r\n", "engine_error"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n", "engine_error"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok", "engine_error"),
        (b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", "engine_error"),
        (b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 20_000, "engine_error"),
    ],
)
async def test_what_is_no_whole_reply(said: bytes, code: str) -> None:
    async with engine(saying(said)) as (upstream, address):
        with pytest.raises(UpstreamError) as caught:
            await get(upstream, address)
        assert caught.value.code == code


async def test_silence_and_bounds() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n"
    async with engine(saying(head + b"x" * 500, close=False)) as (upstream, address):
        with pytest.raises(UpstreamError, match="no answer in time"):
            await get(upstream, address, idle=0.1)
        reply = await upstream.request(address, "GET", "/")
        with pytest.raises(UpstreamError, match="longer than 100 bytes"):
            await reply.read(100)
    async with engine(saying(close=False)) as (upstream, address):
        with pytest.raises(UpstreamError) as caught:
            await get(upstream, address, first=0.1)
        assert caught.value.code == "engine_silent"


async def test_a_reply_is_not_read_faster_than_it_is_taken() -> None:
    written = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 50000000\r\n\r\n")
        for _ in range(500):
            writer.write(b"x" * 100_000)
            await writer.drain()
            written += 100_000
        writer.close()

    async with engine(handle) as (upstream, address):
        reply = await upstream.request(address, "GET", "/")
        await asyncio.sleep(0.1)
        assert written < 20_000_000
        size = 0
        async for piece in reply.chunks:
            size += len(piece)
        assert size == 50_000_000


async def test_unix_sockets_prefixes_tokens_and_the_pool(tmp_path: Path) -> None:
    async with FakeEngine(socket=str(tmp_path / "e.sock"), token="inner") as fake:
        upstream = Upstream()
        for _ in range(5):
            reply = await upstream.request(fake.address, "GET", "/v1/models")
            assert reply.status == 200
            assert reply.headers["content-type"].startswith("application/json")
            await reply.read(10_000)
        assert fake.connections == 1
        assert fake.requests[-1].header("authorization") == "Bearer inner"
        body = b'{"messages":[{"role":"user","content":"a b"}],"stream":true,"fake":{"chunks":100000,"rate":100}}'
        reply = await upstream.request(fake.address, "POST", CHAT, [("content-type", "application/json")], body)
        await reply.next()
        reply.close()
        await until(lambda: fake.running == 0)
        upstream.close()
        await until(lambda: fake.connections == 0)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        writer.close()

    heads: list[bytes] = []
    async with engine(handle) as (upstream, address):
        where = Address("127.0.0.1", address.port, prefix="/base")
        assert await get(upstream, where) == (204, b"")
        assert heads[0].startswith(b"GET /base/ HTTP/1.1\r\nhost: 127.0.0.1:%d\r\n" % address.port)
        with pytest.raises(UpstreamError, match="cannot be reached"):
            await get(upstream, Address(socket=str(tmp_path / "nobody.sock")))


async def test_the_beginning_of_a_second_reply_is_not_the_next_ones() -> None:
    twice = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-len"
    heard: list[int] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(0)
        with suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(twice)
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"gth: 4\r\n\r\nevil")
        writer.close()

    async with engine(handle) as (upstream, address):
        for _ in range(2):
            assert await get(upstream, address) == (200, b"ok")
        assert len(heard) == 2


async def test_a_connection_whose_request_was_not_read_is_not_used_again() -> None:
    heard: list[int] = []
    done = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(0)
        with suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 413 No\r\ncontent-length: 2\r\n\r\nno")
            await done.wait()
        writer.transport.abort()

    async with engine(handle) as (upstream, address):
        for count in (1, 2):
            reply = await upstream.request(address, "POST", "/", body=b"x" * (16 << 20))
            assert (reply.status, await reply.read(10)) == (413, b"no")
            assert len(heard) == count
        done.set()


async def test_an_engine_that_takes_long_to_connect_to_is_not_waited_for_longer(monkeypatch: Any) -> None:
    connect = asyncio.BaseEventLoop.create_connection

    async def slowly(*arguments: Any, **options: Any) -> Any:
        await asyncio.sleep(0.7)  # longer than the timer goes on without connections
        return await connect(*arguments, **options)

    async with engine(saying(close=False)) as (upstream, address):
        monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", slowly.__get__(asyncio.get_running_loop()))
        async with asyncio.timeout(20):
            with pytest.raises(UpstreamError) as caught:
                await upstream.request(address, "GET", "/", first=0.2)
        assert caught.value.code == "engine_silent"


async def test_a_request_that_may_have_been_read_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine died of it, or something between closed a connection that was silent for long."""
    asked: list[int] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            await reader.readuntil(b"\r\n\r\n")
            asked.append(1)
        writer.transport.abort()

    async with engine(handle) as (upstream, address):
        replies = [await upstream.request(address, "GET", "/") for _ in range(4)]
        for reply in replies:
            assert await reply.read(10) == b"ok"
        # Closed at once, as idle ones are: sent again, once, and not on the other kept ones.
        monkeypatch.setattr("agentopt.serving.gateway._client._STALE_SECONDS", 60.0)
        assert await get(upstream, address) == (200, b"ok")
        assert len(asked) == 1
        monkeypatch.setattr("agentopt.serving.gateway._client._STALE_SECONDS", 0.0)
        with pytest.raises(UpstreamError):
            await get(upstream, address)
        assert len(asked) == 2
