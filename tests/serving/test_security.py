"""What a client must not get: the engine's other routes, a header or a line of the log, a key."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx

from agentopt.serving.fake_engine import CLOSED, OPEN
from tests.serving.endpoint import BODY, CHAT, HELLO, INSIDE, Endpoint, head, only_forwarded, run, statuses

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
