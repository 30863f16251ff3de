"""The errors a client can get: as a JSON body before the reply began, as a last event once a stream is under way.

OpenAI's form everywhere but on the messages routes, where clients expect Anthropic's.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from agentopt.serving._types import COUNT, MESSAGES, RESPONSES, Phase, Refusal

_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_SEQUENCE = re.compile(rb'"sequence_number"\s*:\s*(\d{1,15})')


def dumps(value: Any) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


class NotAllowed(Refusal):
    """405, with what is allowed."""

    def __init__(self, allowed: str) -> None:
        super().__init__(405, f"this route takes {allowed} only", code="method_not_allowed")
        self.allowed = allowed


def error_body(route: str, refusal: Refusal) -> bytes:
    """The JSON body in the form that clients of `route` expect."""
    if route in (MESSAGES, COUNT):
        return dumps({"type": "error", "error": _anthropic(refusal)})
    return dumps(refusal.body())


def error_event(route: str, refusal: Refusal, last: bytes) -> bytes:
    """The server-sent event that ends a broken stream.

    Args:
        route: One of `FORWARDED`.
        refusal: What went wrong.
        last: What was sent last; the Responses API numbers its events.
    """
    if route == MESSAGES:
        return b"event: error\ndata: " + dumps({"type": "error", "error": _anthropic(refusal)}) + b"\n\n"
    if route == RESPONSES:
        numbers = _SEQUENCE.findall(last)
        event = {
            "type": "error",
            "code": refusal.code,
            "message": str(refusal),
            "param": None,
            "sequence_number": int(numbers[-1]) + 1 if numbers else 0,
        }
        return b"event: error\ndata: " + dumps(event) + b"\n\n"
    return b"data: " + dumps(refusal.body()) + b"\n\n"


def error_headers(refusal: Refusal) -> list[tuple[bytes, bytes]]:
    """Headers that go with an error: when to try again, what is allowed, which way to show a key."""
    headers: list[tuple[bytes, bytes]] = []
    if refusal.retry_after is not None:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(refusal.retry_after))))
    if isinstance(refusal, NotAllowed):
        headers.append((b"allow", refusal.allowed.encode()))
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refusal.code == "insufficient_quota":
        headers.append((b"x-should-retry", b"false"))  # OpenAI's clients obey it: more tries cannot help
    return headers


def _anthropic(refusal: Refusal) -> dict[str, Any]:
    return {"type": _ANTHROPIC.get(refusal.status, "api_error"), "message": str(refusal)}


def unready(phase: Phase) -> Refusal:
    """The engine cannot take requests now."""
    if phase is Phase.FAILED:
        return Refusal(
            503,
            "the engine failed and is not started again; see the server's log",
            kind="server_error",
            code="engine_failed",
        )
    if phase is Phase.STOPPED:
        return Refusal(503, "the engine is stopped", kind="server_error", code="engine_stopped")
    wait = "starting" if phase is Phase.STARTING else "away and is being restarted or waited for"
    return Refusal(
        503, f"the engine is {wait}; try again shortly", kind="server_error", code=f"engine_{phase}", retry_after=5
    )


def draining() -> Refusal:
    """The server is shutting down and takes nothing new."""
    return Refusal(
        503,
        "the server is shutting down; send the request to another one",
        kind="server_error",
        code="draining",
        retry_after=10,
    )


_STOPPED = {
    "timeout": (504, "the request took longer than the server allows and was ended"),
    "key_revoked": (401, "the API key was revoked or has expired"),
    "draining": (503, "the server is shutting down and could not wait for the end of this reply"),
    "engine_died": (502, "the engine broke off before the reply was complete; try again shortly"),
    "engine_silent": (504, "the engine gave no answer in time; try again"),
    "engine_error": (502, "the engine gave no usable answer"),
}


def broken(code: str) -> Refusal:
    """A request that was accepted and ended early, for one of `Exchange.error`'s reasons."""
    status, message = _STOPPED[code]
    kind = "authentication_error" if status == 401 else "server_error"
    return Refusal(status, message, kind=kind, code=code)
