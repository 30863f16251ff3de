"""A second request inside a first: what two servers could read differently is never read at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.serving.endpoint import BODY, CHAT, HELLO, Endpoint, head, only_forwarded, run, statuses

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
