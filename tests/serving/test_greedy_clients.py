"""Clients that take more than their share: a thousand keys, a slow line, a reply nobody reads, a body without end."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agentopt.serving.gateway import Limits
from tests.serving.endpoint import BODY, CHAT, HELLO, Endpoint, head, run, statuses


def test_a_thousand_wrong_keys_cost_nothing_and_lock_nobody_out(tmp_path: Path) -> None:
    async def test(at: Endpoint) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", at.port)

        async def wrong(number: int) -> int:
            sent = head(CHAT, f"ak-{number:043d}", body=BODY).replace(b"Connection: close\r\n", b"")
            writer.write(sent)
            found = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(found.partition(b"content-length: ")[2].partition(b"\r")[0]))
            status = int(found[9:12])
            assert (b"\r\nretry-after: " if status == 429 else b"\r\nwww-authenticate: bearer") in found
            return status

        codes = [await wrong(number) for number in range(500)]
        tracemalloc.start()
        codes += [await wrong(number) for number in range(500, 600)]
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        codes += [await wrong(number) for number in range(600, 1000)]
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        assert set(codes) == {401, 429}
        assert codes[:20] == [401] * 20
        assert codes.count(401) < 100
        assert grown < 200 * 400
        writer.close()
        assert (await at.chat()).status_code == 200
        assert len(at.asked) == 1

    run(tmp_path, test)


def test_a_slow_loris_is_cut_off_while_others_are_served(tmp_path: Path) -> None:
    async def test(at: Endpoint) -> None:
        starts = [b"", b"POST ", head(CHAT, at.secret, body=BODY)[:60], head(CHAT, at.secret, body=BODY)[:-5]]

        async def loris(start: bytes) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
            try:
                writer.write(start)
                rest = asyncio.create_task(reader.read(-1))
                while start and start[-1:] != b"}" and not rest.done() and not writer.is_closing():
                    writer.write(b"x")  # a byte now and then does not help
                    await asyncio.sleep(0.05)
                async with asyncio.timeout(60):
                    return await rest
            except ConnectionError:
                return b""
            finally:
                writer.close()

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(loris(start)) for start in starts for _ in range(10)]
            for _ in range(10):
                assert (await at.chat()).status_code == 200
        for task in tasks:
            assert not task.result() or statuses(task.result())[0] in (400, 408)
        assert len(at.asked) == 10

    run(tmp_path, test, limits=Limits(head_seconds=0.5, body_seconds=0.5))


def test_a_client_that_does_not_read_holds_no_memory_and_is_cut_off(tmp_path: Path) -> None:
    async def test(at: Endpoint) -> None:
        body = json.dumps(HELLO | {"stream": True, "fake": {"chunks": 200_000}}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
        writer.write(head(CHAT, at.secret, body=body))
        await reader.readexactly(16)
        async with asyncio.timeout(60):
            while at.gateway.in_flight or at.fake.running:
                await asyncio.sleep(0.05)
        writer.close()
        assert at.log()[-1]["bytes_out"] < 20 << 20
        assert (await at.chat()).status_code == 200

    run(tmp_path, test, limits=Limits(stalled_seconds=0.5))


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_10_mb_is_refused_before_it_is_read(tmp_path: Path, chunked: bool) -> None:
    async def test(at: Endpoint) -> None:
        long = json.dumps(HELLO | {"padding": "x" * (10 << 20)}).encode()

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(long), 1 << 16):
                yield long[start : start + (1 << 16)]

        told = {"Content-Type": "application/json"}
        reply = await at.client.post(CHAT, content=pieces() if chunked else long, headers=told)
        assert reply.status_code == 413
        assert reply.json()["error"]["type"] == "invalid_request_error"
        assert at.asked == []
        assert (await at.chat()).status_code == 200

    run(tmp_path, test)


INVALID = [
    b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"{}", b'{"model": NaN}', b'{"messages": [1e999]}',
    b"[" * 100_000,
    b'{"a":' * 5000 + b"1" + b"}" * 5000, b'{"messages": [], "messages": [{"role": "user", "content": "x"}]}',
    b'{"model": "fake", "model": "other", "messages": [{"role": "user", "content": "x"}]}', b'{"messages": "x"}',
    b'{"messages": [{"role": "user", "content": "x"}], "stream": "yes"}',
    b'{"messages": [{"role": "user", "content": "x"}]} x',
    b'{"messages": [{"role": "user", "content": "x"}], "n": ' + b"9" * 10_000 + b"}", gzip.compress(BODY),
    b'{"messages": [{"role": "user", "content": "x"}], "stream_options": {"include_usage": true}}',
    b"model=fake&messages=x",
]  # fmt: skip


def test_what_is_no_json_or_no_chat_is_refused_with_a_sentence(tmp_path: Path) -> None:
    async def test(at: Endpoint) -> None:
        for body in INVALID:
            reply = await at.client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
            assert reply.status_code == 400, (body[:80], reply.text[:300])
            assert len(reply.json()["error"]["message"]) > 10
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
            reply = await at.client.post(CHAT, content=BODY, headers={"Content-Type": kind})
            assert reply.status_code == 415
        zipped = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        assert (await at.client.post(CHAT, content=gzip.compress(BODY), headers=zipped)).status_code == 415
        assert at.asked == []

    run(tmp_path, test)
