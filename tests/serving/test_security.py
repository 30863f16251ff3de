"""What a client must not get: the engine's other routes, a second request inside a first, a key, all of the server."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from agentopt.serving.fake_engine import CLOSED, OPEN
from agentopt.serving.gateway import Limits
from tests.serving.endpoint import CHAT, HELLO, INSIDE, Endpoint, head, only_forwarded, run, statuses

BODY = json.dumps(HELLO).encode()
ROUTES = [
    *OPEN,
    *CLOSED,
    "/v1/audio/transcriptions",
    "/adapters/x",
    "/control",
    "/openapi.json",
    "/docs/oauth2-redirect",
]
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "PROPFIND")


def disguises(path: str, port: int) -> list[str]:
    """Ways to write a path that some server somewhere reads as that path."""
    name = path.strip("/")
    hidden = "".join(f"%{ord(letter):02x}" for letter in name[:3]) + name[3:]
    return [
        path,
        f"{path}/",
        f"{path}?x=1",
        f"{path}#{CHAT}",
        f"{path};x=1",
        f"{path}%00",
        f"{path}%20",
        f"{path}%0d%0aX-A:%20b",
        f"{path}/../{name}",
        f"{path}%2f..%2f{CHAT[1:]}",
        f"/{path}",
        f"//{path}",
        f"/.{path}",
        f"/x/..{path}",
        f"/%2e{path}",
        f"/{hidden}",
        f"/%25{hidden[1:]}",
        f"/\\{name}",
        f"{path.upper()}",
        f"{path.title()}",
        f"/v1{path}",
        f"/v1/..{path}",
        f"/v1/../{path}",
        f"/v1/%2e%2e{path}",
        f"/v1/%2E%2E%2F{name}",
        f"/v1%2f..{path}",
        f"/v1/..%2f{name}",
        f"/v1/..;{path}",
        f"/v1/models/..{path}",
        f"/v1/models/../..{path}",
        f"/v1/models/%2e%2e/%2e%2e{path}",
        f"{CHAT}/../../..{path}",
        f"{CHAT}/%2e%2e/%2e%2e/%2e%2e{path}",
        f"{CHAT}{path}",
        f"{CHAT}/",
        f"/health{path}",
        f"/health/..{path}",
        f"/ready/..{path}",
        f"http://engine{path}",
        f"http://127.0.0.1:{port}{path}",
        f"//engine{path}",
        f"@engine{path}",
        name or "*",
    ]


def test_no_disguise_reaches_another_route_of_the_engine(tmp_path: Path) -> None:
    async def test(at: Endpoint) -> None:
        targets = list(dict.fromkeys(target for path in ROUTES for target in disguises(path, at.fake.address.port)))
        for secret in (at.secret, None):
            for place in range(0, len(targets), 40):
                part = targets[place : place + 40]
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(at.raw(head(target, secret, body=BODY))) for target in part]
                for target, task in zip(part, tasks, strict=True):
                    assert statuses(task.result())[0] in (400, 401, 404, 405, 429), (target, task.result()[:200])
                    assert b'"open"' not in task.result()
        assert at.asked == []
        assert (await at.chat()).status_code == 200

    run(tmp_path, test)


def test_no_method_and_no_rewriting_header_reaches_another_route(tmp_path: Path) -> None:
    async def test(at: Endpoint) -> None:
        for path in ("/invocations", "/metrics", "/v1/load_lora_adapter", "/tokenize", CHAT):
            for method in METHODS:
                reply = await at.raw(head(path, at.secret, method=method, body=BODY))
                assert statuses(reply)[0] == (200 if (path, method) == (CHAT, "POST") else 405 if path == CHAT else 404)
        lines = [
            *("X-Original-URL: /invocations", "X-Rewrite-URL: /invocations", "X-HTTP-Method-Override: GET"),
            *(
                "X-HTTP-Method: GET",
                "X-Forwarded-Prefix: /invocations",
                "X-Forwarded-Host: engine",
                "X-Accel-Redirect: /load",
            ),
        ]
        assert statuses(await at.raw(head(CHAT, at.secret, *lines, body=BODY))) == [200]
        assert statuses(await at.raw(head("/", at.secret, *lines, body=BODY))) == [404]
        reply = await at.raw(b"CONNECT engine:80 HTTP/1.1\r\nHost: engine:80\r\n\r\nPOST /invocations HTTP/1.1\r\n\r\n")
        assert statuses(reply)[0] in (400, 404, 405)
        assert only_forwarded(at.asked)
        assert len(at.asked) == 2

    run(tmp_path, test)


def test_the_engine_gets_a_request_of_ours_and_the_client_a_reply_of_ours(tmp_path: Path) -> None:
    async def test(at: Endpoint) -> None:
        lines = [
            *("Cookie: session=1", "X-Forwarded-For: 10.0.0.1", "Forwarded: for=10.0.0.1", "X-Real-IP: 10.0.0.1"),
            *("Via: 1.1 other", "TE: trailers", "Trailer: X-Later", "Keep-Alive: 5", "Proxy-Authorization: Basic eA=="),
            *("X-Api-Key: other", "X-Custom: 1", "Origin: http://evil.example", "Referer: http://evil.example"),
            *("Accept-Encoding: gzip", "Range: bytes=0-1", "Expect: 100-continue", "Traceparent: nonsense"),
            *("X-Request-Id: of-the-client", "X-Agentopt-Session: s1", "User-Agent: " + "x" * 3000),
        ]
        trace = "Traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        replies = [await at.raw(head(CHAT + "?debug=1", at.secret, *lines, body=BODY))]
        replies.append(await at.raw(head(CHAT, at.secret, trace, body=BODY)))
        allowed = {"host", "content-type", "accept", "content-length", "authorization", "x-request-id", "traceparent"}
        for one in at.asked:
            assert one.path == CHAT
            assert {name for name, _ in one.headers} <= allowed | {"connection", "user-agent"}
            assert len(one.headers) == len({name for name, _ in one.headers})
            assert one.header("authorization") == f"Bearer {INSIDE}"
            assert str(one.header("x-request-id")).startswith("req_")
            assert at.secret not in str(one)
        assert at.asked[0].header("traceparent") is None
        assert at.asked[1].header("traceparent") == trace.partition(": ")[2]
        for reply in replies:
            sent = reply.split(b"HTTP/1.1 200")[1].partition(b"\r\n\r\n")[0].lower()
            for name in (b"set-cookie", b"server:", b"of-the-client", b"access-control", INSIDE.encode()):
                assert name not in sent

    run(tmp_path, test)


HIDDEN = b"POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
START = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: application/json\r\nAuthorization: Bearer KEY\r\n"
)
CHUNKS = b"Transfer-Encoding: chunked\r\n"
WHOLE = b"Content-Length: %d\r\n" % len(BODY)
LAST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer KEY\r\n"
SMUGGLED: dict[str, bytes] = {
    "length and chunks": START + WHOLE + CHUNKS + b"\r\n0\r\n\r\n" + HIDDEN,
    "chunks and length": START + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n" + CHUNKED + HIDDEN,
    "two lengths": START + WHOLE + b"Content-Length: 0\r\n\r\n" + BODY + HIDDEN,
    "the same length twice": START + WHOLE + WHOLE + b"\r\n" + BODY + HIDDEN,
    "a list of lengths": START + b"Content-Length: 5, 5\r\n\r\n" + BODY + HIDDEN,
    "a length with a sign": START + b"Content-Length: +%d\r\n\r\n" % len(BODY) + BODY + HIDDEN,
    "a negative length": START + b"Content-Length: -1\r\n\r\n" + BODY + HIDDEN,
    "a hexadecimal length": START + b"Content-Length: 0x%x\r\n\r\n" % len(BODY) + BODY + HIDDEN,
    "a length in two parts": START + b"Content-Length: 1 0\r\n\r\n" + BODY + HIDDEN,
    "an endless length": START + b"Content-Length: 99999999999999999999999999\r\n\r\n" + BODY + HIDDEN,
    "an empty length": START + b"Content-Length:\r\n\r\n" + BODY + HIDDEN,
    "a length with an underscore": START + b"Content-Length: 1_0\r\n\r\n" + BODY + HIDDEN,
    "chunked twice": START + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED + HIDDEN,
    "identity, chunked": START + b"Transfer-Encoding: identity, chunked\r\n\r\n" + CHUNKED + HIDDEN,
    "chunked, identity": START + b"Transfer-Encoding: chunked, identity\r\n\r\n" + CHUNKED + HIDDEN,
    "xchunked": START + b"Transfer-Encoding: xchunked\r\n" + WHOLE + b"\r\n" + BODY + HIDDEN,
    "chunked in quotes": START + b'Transfer-Encoding: "chunked"\r\n\r\n' + CHUNKED + HIDDEN,
    "gzip, chunked": START + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKED + HIDDEN,
    "a space before the colon": START + b"Transfer-Encoding : chunked\r\n" + WHOLE + b"\r\n" + CHUNKED + HIDDEN,
    "a length with a space before the colon": START + b"Content-Length : 0\r\n\r\n" + HIDDEN,
    "a vertical tab": START + b"Transfer-Encoding:\x0bchunked\r\n" + WHOLE + b"\r\n" + CHUNKED + HIDDEN,
    "chunked on a folded line": START + b"Transfer-Encoding:\r\n chunked\r\n" + WHOLE + b"\r\n" + CHUNKED + HIDDEN,
    "a folded line": START + b"X-A: a\r\n  b: c\r\n" + WHOLE + b"\r\n" + BODY + HIDDEN,
    "a first header that is folded": b"POST /v1/chat/completions HTTP/1.1\r\n Host: x\r\n" + WHOLE + b"\r\n" + BODY,
    "line feeds alone": START.replace(b"\r\n", b"\n") + WHOLE.replace(b"\r\n", b"\n") + b"\n" + BODY + HIDDEN,
    "one line feed alone": START + b"X-A: 1\nTransfer-Encoding: chunked\r\n" + WHOLE + b"\r\n" + CHUNKED + HIDDEN,
    "a carriage return alone": START + b"X-A: 1\rTransfer-Encoding: chunked\r\n" + WHOLE + b"\r\n" + BODY + HIDDEN,
    "an empty line of line feeds": START + WHOLE + b"\n" + BODY + HIDDEN,
    "a NUL in a value": START + b"X-A: a\0b\r\n" + WHOLE + b"\r\n" + BODY,
    "a NUL in a name": START + b"X\0A: b\r\n" + WHOLE + b"\r\n" + BODY,
    "a NUL in the target": START.replace(b"completions", b"completions\0") + WHOLE + b"\r\n" + BODY,
    "no name": START + b": b\r\n" + WHOLE + b"\r\n" + BODY,
    "no colon": START + b"Transfer-Encoding chunked\r\n" + WHOLE + b"\r\n" + BODY,
    "letters beyond ASCII in a name": START + b"Transfer-Encod\xefng: chunked\r\n" + WHOLE + b"\r\n" + BODY,
    "two hosts": START + b"Host: engine\r\n" + WHOLE + b"\r\n" + BODY,
    "no host": START.replace(b"Host: localhost\r\n", b"") + WHOLE + b"\r\n" + BODY,
    "two keys": START + b"Connection: close\r\nAuthorization: Bearer other\r\n" + WHOLE + b"\r\n" + BODY,
    "a negative chunk": START + CHUNKS + b"\r\n-1\r\n" + BODY + b"\r\n0\r\n\r\n" + HIDDEN,
    "a chunk too long to count": START + CHUNKS + b"\r\nfffffffffffffffff1\r\n" + BODY + HIDDEN,
    "a chunk with 0x": START + CHUNKS + b"\r\n0x%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY) + HIDDEN,
    "a chunk that ends early": START + CHUNKS + b"\r\n4\r\n" + BODY + b"\r\n0\r\n\r\n" + HIDDEN,
    "a chunk line with a line feed": START + CHUNKS + b"\r\n" + CHUNKED.replace(b"\r\n", b"\n") + HIDDEN,
    "an extension with a line feed": START
    + CHUNKS + b"\r\n%x;a=\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    + HIDDEN,
    "a trailer": START + CHUNKS + b"\r\n" + CHUNKED[:-2] + b"Content-Length: 5\r\n\r\n" + HIDDEN,
    "chunks in HTTP/1.0": START.replace(b"1.1", b"1.0", 1) + CHUNKS + b"\r\n" + CHUNKED + HIDDEN,
    "HTTP/0.9": b"GET /v1/models\r\n\r\n" + HIDDEN,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + HIDDEN,
    "HTTP/1.2": START.replace(b"1.1", b"1.2", 1) + WHOLE + b"\r\n" + BODY,
    "HTTP/11.1": START.replace(b"1.1", b"11.1", 1) + WHOLE + b"\r\n" + BODY,
    "another protocol": START.replace(b"HTTP/", b"ICAP/", 1) + WHOLE + b"\r\n" + BODY,
    "two targets": START.replace(b" HTTP", b" /invocations HTTP", 1) + WHOLE + b"\r\n" + BODY,
    "a space before everything": b" " + START + WHOLE + b"\r\n" + BODY,
    "a small method": START.replace(b"POST", b"post", 1) + WHOLE + b"\r\n" + BODY,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "a head without end": START + b"X-A: " + b"a" * 200_000,
    "a thousand headers": START + b"".join(b"X-%d: a\r\n" % n for n in range(1000)) + WHOLE + b"\r\n" + BODY,
    "a target without end": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("name", SMUGGLED)
def test_what_two_servers_could_read_differently_is_refused(name: str, tmp_path: Path) -> None:
    async def test(at: Endpoint) -> None:
        reply = await at.raw(SMUGGLED[name].replace(b"KEY", at.secret.encode()))
        assert at.asked == []
        assert len(statuses(reply)) <= 1
        assert not reply or statuses(reply)[0] in (400, 404, 408, 411, 413, 415, 431, 501, 505), reply[:200]
        assert b'"open"' not in reply
        assert (await at.chat()).status_code == 200

    run(tmp_path, test)


def test_a_body_on_a_request_that_reads_none_is_no_second_request(tmp_path: Path) -> None:
    async def test(at: Endpoint) -> None:
        key = at.secret.encode()
        reply = await at.raw(GET.replace(b"KEY", key) + b"Content-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN + b"x")
        assert statuses(reply)[0] == 200
        assert all(status in (200, 400) for status in statuses(reply))
        upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
        reply = await at.raw(START.replace(b"KEY", key) + upgrade + WHOLE + b"\r\n" + BODY + HIDDEN + LAST)
        assert b"101" not in reply[:16]
        assert b'"open"' not in reply
        assert only_forwarded(at.asked)
        assert [one.json() for one in at.asked] in ([], [HELLO])

    run(tmp_path, test)


def test_requests_sent_ahead_are_answered_in_order(tmp_path: Path) -> None:
    async def test(at: Endpoint) -> None:
        bodies = [json.dumps(HELLO | {"messages": [{"role": "user", "content": f"n{n}"}]}).encode() for n in range(3)]
        sent = b"".join(head(CHAT, at.secret, body=body).replace(b"Connection: close\r\n", b"") for body in bodies)
        reply = await at.raw(sent + head("/health", None, method="GET"))
        assert statuses(reply) == [200] * 4
        assert [reply.find(f'"n{n}"'.encode()) for n in range(3)] == sorted(
            reply.find(f'"n{n}"'.encode()) for n in range(3)
        )

    run(tmp_path, test)


def test_nothing_a_client_names_becomes_a_header_or_a_line_of_the_log(tmp_path: Path) -> None:
    evil = 'x\r\nSet-Cookie: evil=1\n{"status": 200}\u2028\u0000'

    async def test(at: Endpoint) -> None:
        for body in (
            {"model": evil},
            {"model": {"a": 1}},
            {"model": "m" * 10_000},
            {"model": "\ud800"},
            {"user": evil},
        ):
            reply = await at.client.post(
                CHAT, content=json.dumps(HELLO | body), headers={"Content-Type": "application/json"}
            )
            assert reply.status_code in (200, 400, 404)
            assert "set-cookie" not in reply.headers
        for name in ("X-Request-Id", "X-Agentopt-Session", "Traceparent", "User-Agent", "X-Agentopt-Capture"):
            for value in ("a b", '"},{"', "é" * 10, "a" * 5000, "x\ty", "../../etc/passwd", "%0d%0aSet-Cookie: a=1"):
                reply = await at.raw(head(CHAT, at.secret, f"{name}: {value}", body=BODY))
                assert statuses(reply)[0] in (200, 400)
                assert value.strip().encode("latin-1") not in reply.partition(b"\r\n\r\n")[0]
        lines = at.log()
        assert len(lines) == 5 + 35
        assert all(line["request_id"].startswith("req_") for line in lines)
        assert not any("etc/passwd" in str(line.get("client_request_id")) for line in lines)

    run(tmp_path, test)


def test_the_keys_are_nowhere(tmp_path: Path) -> None:
    """In no log, metric, error, header or file; also when a client puts one where none belongs."""

    async def test(at: Endpoint) -> None:
        wrong = "ak-" + "W" * 43
        seen: list[bytes] = []
        for secret in (at.secret, wrong):
            good = {"Authorization": f"Bearer {secret}"}
            asked: list[tuple[str, str, dict[str, Any]]] = [
                ("POST", CHAT, {"json": HELLO}),
                ("POST", CHAT, {"json": HELLO | {"stream": True}}),
                ("POST", CHAT, {"json": HELLO, "headers": {"X-Request-Id": secret}}),
                ("POST", CHAT, {"json": HELLO, "headers": {"X-Agentopt-Session": secret}}),
                ("POST", f"{CHAT}?api_key={secret}", {"json": HELLO}),
                ("POST", "/v1/messages", {"json": HELLO | {"max_tokens": 5}, "headers": {"x-api-key": secret}}),
                ("POST", CHAT, {"json": HELLO, "headers": {"x-api-key": secret}}),
                ("POST", CHAT, {"content": b"{" + secret.encode()}),
                ("POST", CHAT, {"json": HELLO | {"fake": {"status": 500}}}),
                ("POST", CHAT, {"json": HELLO | {"fake": {"die_after": 0}}}),
                ("POST", CHAT, {"json": HELLO | {"model": secret}}),
                ("GET", f"/v1/models/{secret}", {}),
                ("GET", f"/{secret}", {}),
                ("GET", "/v1/models", {}),
            ]
            for method, path, given in asked:
                headers = good | given.pop("headers", {})
                reply = await at.client.request(method, path, headers=headers, **given)
                seen.append(str(reply.headers).encode())
                if reply.status_code in (401, 429, 500, 502):
                    seen.append(reply.content)
        files = [path for path in at.folder.rglob("*") if path.is_file()]
        assert {path.name for path in files} >= {"gateway.log", "keys.db"}
        seen += [path.read_bytes() for path in files] + [at.meter.text()]
        seen += [b" ".join(str(row).encode() for row in at.keys.list()), repr(at.engine).encode()]
        for secret in (at.secret, wrong, INSIDE):
            assert not [text for text in seen if secret.encode() in text]

    run(tmp_path, test)


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


def test_a_key_opens_only_what_it_is_for(tmp_path: Path) -> None:
    async def test(at: Endpoint) -> None:
        assert (await at.chat()).status_code == 403
        assert (await at.chat(model=None)).status_code == 403
        assert (await at.client.get("/v1/models")).json()["data"] == []
        assert (await at.client.get("/v1/models/fake")).status_code == 404
        for given in (
            "Basic " + at.secret,
            at.secret,
            "Bearer",
            f"Bearer {at.secret} x",
            f"Bearer {at.secret[:-1]}",
        ):
            reply = await at.client.post(CHAT, json=HELLO, headers={"Authorization": given})
            assert reply.status_code == 401, given
        async with httpx.AsyncClient(base_url=at.client.base_url) as nobody:
            assert (await nobody.get("/v1/models")).status_code == 401
            assert (await nobody.get("/health")).status_code == 200
            assert "fake" not in (await nobody.get("/ready")).text
        assert at.asked == []

    run(tmp_path, test, models=("other-*",))
