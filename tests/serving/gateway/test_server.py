"""HTTP as a hostile or clumsy client speaks it: raw sockets against the server."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import suppress
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.serving._types import CHAT, Key
from agentopt.serving.gateway import Limits, serve_app, serving
from tests.serving.gateway.kit import HELD, HELLO, Ring, house, read_all, request, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> Any:
    """The loop that serves; asyncio's own runs the other files."""
    return "asyncio", {"use_uvloop": True}


QUICK = Limits(
    head_seconds=0.2, body_seconds=0.3, keep_alive_seconds=0.2, stalled_seconds=0.3, head_bytes=4000, grace_seconds=0.2
)
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
BODY = json.dumps({"messages": HELLO}).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def statuses(replies: bytes) -> list[int]:
    return [int(part[:3]) for part in replies.split(b"HTTP/1.1 ")[1:]]


async def test_connections_are_kept_and_requests_may_be_sent_ahead() -> None:
    async with house() as home:
        assert statuses(await home.raw(GET + request() + GET + LAST)) == [200, 200, 200, 200]
        replies = await home.raw(
            b"".join(request({"messages": [{"role": "user", "content": f"n{n}"}]}) for n in range(5)) + LAST
        )
        order = [replies.index(b'"n%d"' % n) for n in range(5)]
        assert order == sorted(order)
        assert statuses(replies) == [200] * 6


async def test_peers_that_vanished_are_found_out() -> None:
    accepted: list[socket.socket] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    async with serving(app, limits=Limits(grace_seconds=0.1)) as server:
        client = socket.create_connection(("127.0.0.1", server.port))
        await until(lambda: bool(server._connections))
        for connection in server._connections:
            accepted.append(connection._transport.get_extra_info("socket"))
        assert accepted[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        client.close()


async def test_too_many_requests_ahead_are_not_taken() -> None:
    async with house() as home:
        reading = asyncio.create_task(home.raw(request({"messages": HELLO, "fake": HELD}) + GET * 500))
        await until(lambda: home.fake.running == 1 and any(one._deaf for one in home.server._connections))
        home.fake.go_on()
        replies = statuses(await reading)
        assert 1 < len(replies) < 15
        assert set(replies) == {200}


@pytest.mark.parametrize("start", [b"", b"\r\n", b"GET / HT", HEAD, HEAD + b"X-A: b"])
async def test_a_head_that_does_not_come_is_not_waited_for(start: bytes) -> None:
    async with house(limits=QUICK) as home:
        reply = await home.raw(start)
        assert reply == b"" if not start else reply.startswith(b"HTTP/1.1 408 ")


async def test_a_head_that_comes_byte_by_byte_is_not_waited_for() -> None:
    async with house(limits=QUICK) as home:
        reader, writer = await asyncio.open_connection("127.0.0.1", home.port)
        reading = asyncio.create_task(read_all(reader))
        with suppress(ConnectionError):
            for byte in HEAD * 100:
                if reading.done():
                    break
                writer.write(bytes([byte]))
                await asyncio.sleep(0.01)
        assert (await reading).startswith(b"HTTP/1.1 408 ")
        writer.close()


async def test_a_body_that_does_not_come_is_408_and_holds_no_engine() -> None:
    async with house(limits=QUICK) as home:
        reply = await home.raw(HEAD + b"Content-Length: 100\r\n\r\n{")
        assert reply.startswith(b"HTTP/1.1 408 ")
        assert b"body_timeout" in reply
        reply = await home.raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{")
        assert reply.startswith(b"HTTP/1.1 408 ")
        assert home.fake.count == 0


async def test_an_idle_connection_is_closed() -> None:
    async with house(limits=QUICK) as home:
        assert statuses(await home.raw(GET)) == [200]


async def test_without_a_key_no_body_is_read() -> None:
    async with house(keyring=Ring(secret=Key("k", "k"))) as home:
        reader, writer = await asyncio.open_connection("127.0.0.1", home.port)
        writer.write(HEAD + b"Content-Length: 5000000\r\n\r\n{")
        got = await read_all(reader, end=b"}}")
        assert got.startswith(b"HTTP/1.1 401 ")
        assert b"www-authenticate: Bearer" in got
        assert b"connection: close" in got
        writer.close()


async def test_a_long_body_is_413_even_for_a_client_that_sends_all_of_it_first() -> None:
    async with house() as home:
        big = b'{"messages":[{"role":"user","content":"' + b"x" * 10_000_000 + b'"}]}'
        reply = await home.client.post(CHAT, content=big, headers={"content-type": "application/json"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_long")
        chunk = b"%x\r\n" % (1 << 20) + b" " * (1 << 20) + b"\r\n"
        reply_bytes = await home.raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 9)
        assert reply_bytes.startswith(b"HTTP/1.1 413 ")
        assert home.fake.count == 0
        assert (await home.ask()).status_code == 200


async def test_bodies_together_are_bounded() -> None:
    limits = Limits(bodies_bytes=3_000_000, grace_seconds=0.2)
    text = [{"role": "user", "content": "x" * 2_000_000}]
    async with house(limits=limits) as home, asyncio.TaskGroup() as group:
        first = group.create_task(home.ask(messages=text, fake=HELD | {"text": "a"}, stream=True))
        await until(lambda: home.fake.running == 1)
        assert (await home.ask(messages=text)).status_code == 503
        home.fake.go_on()
        assert (await first).status_code == 200
        assert (await home.ask(messages=text, fake={"text": "a"})).status_code == 200


async def test_bodies_that_grow_when_they_are_read_are_bounded_too() -> None:
    limits = Limits(bodies_bytes=3_000_000, grace_seconds=0.2)
    fields = {f"{number:x}": 1 for number in range(12_000)}  # 110 kB, 2 MB once they are read
    async with house(limits=limits) as home, asyncio.TaskGroup() as group:
        first = group.create_task(home.ask(metadata=fields, fake=HELD | {"text": "a"}, stream=True))
        await until(lambda: home.fake.running == 1)
        refused = await home.ask(metadata=fields)
        home.fake.go_on()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert (await first).status_code == 200
        assert home.gateway._bodies.held == 0


async def test_texts_whose_characters_take_four_bytes_are_bounded_too() -> None:
    limits = Limits(bodies_bytes=3_000_000, grace_seconds=0.2)
    text = [{"role": "user", "content": "x" * 800_000 + "\N{ROCKET}"}]
    async with house(limits=limits) as home:
        assert (await home.ask(messages=text)).status_code == 503
        assert (await home.ask(messages=[{"role": "user", "content": "x" * 800_000}])).status_code == 200


async def test_a_chunked_body_and_one_in_many_pieces_are_read() -> None:
    async with house() as home:
        chunks = b"".join(b"%x\r\n%b\r\n" % (1, BODY[n : n + 1]) for n in range(len(BODY))) + b"0\r\n\r\n"
        assert statuses(await home.raw(HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)) == [
            200
        ]
        assert home.fake.requests[-1].json()["messages"] == HELLO
        reader, writer = await asyncio.open_connection("127.0.0.1", home.port)
        for byte in request(more="Connection: close\r\n"):
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        assert statuses(await read_all(reader)) == [200]
        writer.close()


SMUGGLED = {
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}abcd",
    "two equal lengths": HEAD + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    "lengths in one line": HEAD + b"Content-Length: 2, 2\r\n\r\n{}",
    "signed length": HEAD + b"Content-Length: +2\r\n\r\n{}",
    "length in hex": HEAD + b"Content-Length: 0x2\r\n\r\n{}",
    "length and chunked": HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
    "unknown coding": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "coding in a list": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "coding with a tab": HEAD + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    "space before the colon": HEAD + b"Content-Length : 2\r\n\r\n{}",
    "folded line": HEAD + b"X-A: b\r\n Content-Length: 2\r\n\r\n",
    "line feed only": b"POST /v1/chat/completions HTTP/1.1\nHost: localhost\nContent-Length: 2\n\n{}",
    "carriage return in a value": HEAD + b"X-A: b\rContent-Length: 2\r\n\r\n{}",
    "null in a value": HEAD + b"X-A: b\x00c\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: b\r\n\r\n",
    "absolute target": b"GET http://other/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an authority as target": b"GET other:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "space in the target": b"GET /health x HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "chunk size with a sign": HEAD + b"Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n",
    "chunk longer than said": HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}x\r\n0\r\n\r\n",
    "trailers": HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nAuthorization: Bearer x\r\n\r\n",
    "HTTP/0.9": b"GET /health\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/3.7": b"GET /health HTTP/3.7\r\nHost: localhost\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00",
    "a method of its own": b"GET\x00 /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("name", sorted(SMUGGLED))
async def test_what_two_servers_could_read_differently_is_refused(name: str) -> None:
    async with house() as home:
        replies = await home.raw(SMUGGLED[name] + GET)
        assert statuses(replies)[:1] in ([400], [405], [505]), replies[:200]
        assert len(statuses(replies)) == 1
        assert b"connection: close" in replies
        assert home.fake.count == 0


async def test_what_stands_behind_a_broken_request_is_never_served() -> None:
    async with house() as home:
        inner = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for attack in (
            HEAD + b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" % (5 + len(inner)) + inner,
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nX" + inner,
        ):
            replies = await home.raw(attack)
            assert 200 not in statuses(replies)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 10_000,
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"b" * 10_000,
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"b" * 10_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"Abcdef: bcdefg\r\n" * 99_000,
    ],
)
async def test_long_heads_are_431(head: bytes) -> None:
    async with house(limits=Limits(head_bytes=4000, grace_seconds=0.2)) as home:
        assert statuses(await home.raw(head)) == [431]


async def test_a_long_body_is_not_taken_for_a_long_head() -> None:
    async with house(limits=Limits(head_bytes=2000, grace_seconds=0.2)) as home:
        long = request({"messages": [{"role": "user", "content": "x" * 100_000}], "fake": {"text": "a"}})
        assert statuses(await home.raw(long * 3 + LAST)) == [200] * 4


async def test_http_1_0_gets_a_reply_that_ends_with_the_connection() -> None:
    async with house() as home:
        reply = await home.raw(request({"messages": HELLO, "stream": True}).replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert b"chunked" not in reply
        assert reply.endswith(b"data: [DONE]\n\n")


async def test_offers_of_other_protocols_are_declined() -> None:
    async with house() as home:
        offer = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
        replies = await home.raw(request(more=offer) + request(more=offer) + LAST)
        assert statuses(replies) == [200, 200, 200]
        socket = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        assert statuses(await home.raw(socket + LAST)) == [200, 200]
        assert statuses(await home.raw(b"CONNECT other:80 HTTP/1.1\r\nHost: localhost\r\n\r\n" + GET)) == [405]


async def test_a_client_may_ask_before_it_sends_its_body() -> None:
    async with house() as home:
        head = HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(BODY)
        reader, writer = await asyncio.open_connection("127.0.0.1", home.port)
        writer.write(head)
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(BODY)
        assert statuses(await read_all(reader)) == [200]
        writer.close()


async def test_more_connections_than_allowed_push_out_idle_ones() -> None:
    async with house(limits=Limits(connections=2, grace_seconds=0.2)) as home:
        idle = [await asyncio.open_connection("127.0.0.1", home.port) for _ in range(6)]
        assert (await home.ask()).status_code == 200
        for _, writer in idle:
            writer.close()


async def test_when_all_are_busy_a_new_connection_is_told_so() -> None:
    async with house(limits=Limits(connections=1, grace_seconds=0.2)) as home:
        body = {"messages": HELLO, "stream": True, "fake": HELD}
        async with home.client.stream("POST", CHAT, json=body) as reply:
            assert statuses(await home.raw(b"")) == [503]
            home.fake.go_on()
            assert b"[DONE]" in await reply.aread()


async def test_a_mistake_of_an_application_is_one_500_and_one_line() -> None:
    lines: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/late":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"some", "more_body": True})
        if scope["path"] == "/head":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        if scope["path"] == "/split":
            headers = [(b"x", b"a\r\nset-cookie: b")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        raise RuntimeError("oops")

    async with serving(app, limits=Limits(grace_seconds=0.2), log=lines.append) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /now HTTP/1.1\r\nHost: a\r\n\r\n")
        reply = await read_all(reader)
        assert statuses(reply) == [500]
        assert b"oops" not in reply
        writer.close()
        for path, begun in (b"/late", True), (b"/head", False), (b"/split", False):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % path)
            reply = await read_all(reader)
            assert statuses(reply) == [200 if begun else 500]
            assert not reply.endswith(b"0\r\n\r\n")
            assert b"set-cookie" not in reply
            writer.close()
    assert len(lines) == 4
    assert "RuntimeError in GET /now: oops (" in lines[0]


async def test_it_listens_until_it_is_told_to_stop() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    stop = asyncio.Event()
    ports: list[int] = []
    async with asyncio.TaskGroup() as group:
        group.create_task(serve_app(app, "127.0.0.1", 0, ready=ports.append, stop=stop))
        await until(lambda: bool(ports))
        with pytest.raises(UserError, match="cannot listen on"):
            await serve_app(app, "127.0.0.1", ports[0], stop=stop)
        reader, writer = await asyncio.open_connection("127.0.0.1", ports[0])
        writer.write(GET)
        assert (await read_all(reader, end=b"ok")).endswith(b"ok")
        stop.set()
        assert await read_all(reader) == b""
        writer.close()
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", ports[0])
