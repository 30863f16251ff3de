"""What the gateway answers without the engine: small JSON replies, preflights of browsers, what is not there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from agentopt.serving._types import Refusal
from agentopt.serving.gateway._errors import NotAllowed, dumps
from agentopt.serving.gateway._forward import Answer, Send

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


def cross_origin(origin: str | None, allowed: tuple[str, ...], answer: Answer) -> None:
    """The headers that let a page of an allowed origin read the reply."""
    if origin is not None and (origin in allowed or "*" in allowed):
        shown = b"*" if "*" in allowed else origin.encode("latin-1")
        exposed = b"X-Request-Id, X-Agentopt-Variant, X-Agentopt-Feedback, X-Agentopt-Capsule, Retry-After"
        answer.add((b"access-control-allow-origin", shown), (b"access-control-expose-headers", exposed))
        answer.add((b"vary", b"origin"))


async def lifespan(receive: Receive, send: Send) -> None:
    """There is nothing to start or to end."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


async def json_reply(
    answer: Answer, content: dict[str, Any], method: str, status: int = 200, *more: tuple[bytes, bytes]
) -> None:
    """A small reply; HEAD gets its headers only."""
    body = dumps(content)
    await answer.begin(status, "application/json", len(body), *more)
    if method != "HEAD":
        await answer.piece(body)
    await answer.end()


async def preflight(answer: Answer, headers: dict[str, str]) -> None:
    """What a page may send; whether its origin is allowed, `cross_origin` has said."""
    asked = headers.get("access-control-request-headers", "")
    allowed = asked if len(asked) < 1000 and all(c.isalnum() or c in "-, " for c in asked) and asked.isascii() else ""
    answer.add(
        (b"access-control-allow-methods", b"GET, HEAD, POST"),
        (b"access-control-allow-headers", allowed.encode() or b"authorization, content-type"),
        (b"access-control-max-age", b"600"),
    )
    await answer.begin(204, "text/plain", None)
    await answer.end()


def only(method: str, allowed: str) -> None:
    """Refuse other methods."""
    if method not in allowed.split(", "):
        raise NotAllowed(allowed)


def unknown(path: str) -> Refusal:
    """404."""
    return Refusal(404, f"there is nothing at {path[:200]!r}", code="not_found")
