"""Where POST /v1/feedback goes: what a user says of a reply, stored durably against the request's id.

Feedback counts for the variant that answered also where the exchange itself was not kept (the sample left it out, the
store was full). Of one whose client opted out nothing is known, so there is none.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio

from agentopt.serving._types import Key, Refusal
from agentopt.serving.capture._forget import without
from agentopt.serving.capture._recorder import Recorder, Seen
from agentopt.store import Store, StoreError

_ID = re.compile(r"req_[0-9a-f]{32}")
_FIELDS = ("request_id", "score", "text", "expected")
_WORDS = {"up": 1.0, "down": -1.0}
_MAX_CHARS = 65_536
_MAX_PER_REQUEST = 16
_SECONDS = 10.0
"""How long storing may take before the client is told to come again."""


@dataclass(frozen=True, slots=True)
class GivenFeedback:
    """One piece of feedback, after it was stored."""

    request_id: str
    asked: str
    """The model name that the client had given; the engine's where it gave none."""
    model: str
    variant: str | None
    score: float | None
    """From -1 to 1."""
    before: float | None
    """The score that was given to the same request before, which this one replaces."""
    has_expected: bool
    time: float
    """Seconds since the epoch."""


class FeedbackStore:
    """The gateway's `FeedbackSink` on the recorder's store. `listeners` are told of each piece once it is durable."""

    def __init__(self, recorder: Recorder, *, listeners: Sequence[Callable[[GivenFeedback], None]] = ()) -> None:
        self._recorder = recorder
        self.listeners = list(listeners)
        self._lock = anyio.Lock()

    async def give(self, body: Mapping[str, Any], key: Key | None) -> dict[str, Any]:
        """Store it and tell the listeners; gives what the client is answered.

        Raises:
            Refusal: 400 malformed, 404 no such request (or of another key), 409 too much of it, 503 not stored.
        """
        request_id, payload = self._checked(body)
        store = self._recorder.store
        if store is None:
            raise _unstored()
        try:
            # One at a time: how many there are, and which score is replaced, is read before it is written.
            async with asyncio.timeout(_SECONDS), self._lock:
                seen, earlier = await asyncio.to_thread(self._known, store, request_id, key)
                payload = {**payload, "asked": seen.asked, "model": seen.model, "variant": seen.variant}
                payload = await asyncio.to_thread(self._recorder.redaction.value, payload)
                payload |= {"id": f"fb_{secrets.token_hex(16)}", "key": seen.key}
                await store.aput_feedback(self._recorder.run_id, request_id, payload)
                if seen.stored and await asyncio.to_thread(_deleted, store, request_id):
                    raise _unknown(request_id)  # it was deleted meanwhile: so is what was said of it
        except (StoreError, TimeoutError):
            raise _unstored() from None
        score = payload.get("score")
        before = next((row["score"] for row in reversed(earlier) if row.get("score") is not None), None)
        given = GivenFeedback(
            request_id, seen.asked, seen.model, seen.variant, score, before, "expected" in payload, time.time()
        )
        for listener in self.listeners:
            listener(given)
        return {
            "object": "feedback",
            "id": payload["id"],
            "request_id": request_id,
            "score": score,
            "text": "text" in payload,
            "expected": "expected" in payload,
        }

    def scores(self) -> Iterator[tuple[str, str, float]]:
        """Model, variant and score of all requests with a score in the store: the newest one of each request."""
        store = self._recorder.store
        newest: dict[str, tuple[str, str, float]] = {}
        for row in [] if store is None else store.feedback():
            if row.get("score") is not None and row.get("variant"):
                newest[row["exchange_id"]] = (str(row["asked"]), str(row["variant"]), float(row["score"]))
        yield from newest.values()

    def _known(self, store: Store, request_id: str, key: Key | None) -> tuple[Seen, list[dict[str, Any]]]:
        seen = self._recorder.seen(request_id)
        row = store.exchange(request_id) if seen is None or seen.stored else None
        if seen is not None and seen.stored and row is None:
            seen = None  # it was deleted
        if seen is None and row is not None:
            seen = Seen(row.get("key"), str(row.get("asked")), str(row.get("model")), row.get("variant"), True)
        if seen is None or (seen.key is not None and (key is None or key.id != seen.key)):
            raise _unknown(request_id)
        earlier = store.feedback(request_id)
        if len(earlier) >= _MAX_PER_REQUEST:
            raise Refusal(
                409,
                f"request {request_id} already has {_MAX_PER_REQUEST} pieces of feedback; the newest one counts.",
                code="too_much_feedback",
            )
        return seen, earlier

    @staticmethod
    def _checked(body: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        unknown = [name for name in body if name not in _FIELDS]
        if unknown:
            raise _malformed(f"unknown field {unknown[0]!r:.60}; expected {', '.join(_FIELDS)}.", None)
        request_id = body.get("request_id")
        if not isinstance(request_id, str) or not _ID.fullmatch(request_id):
            raise _malformed("request_id: expected the X-Request-Id of a reply, req_ and 32 hex digits.", "request_id")
        payload: dict[str, Any] = {}
        if body.get("score") is not None:
            payload["score"] = _score(body["score"])
        for name in ("text", "expected"):
            value = body.get(name)
            if value is None:
                continue
            if name == "text" and not isinstance(value, str):
                raise _malformed("text: expected a text.", name)
            if len(value if isinstance(value, str) else json.dumps(value)) > _MAX_CHARS:
                raise _malformed(f"{name}: expected at most {_MAX_CHARS} characters.", name)
            payload[name] = value
        if not payload:
            raise _malformed("nothing is said: give at least one of score, text and expected.", None)
        return request_id, payload


def _score(value: Any) -> float:
    if isinstance(value, str) and value in _WORDS:
        return _WORDS[value]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and -1 <= value <= 1:
        return float(value)
    raise _malformed('score: expected a number from -1 to 1, "up" or "down".', "score")


def _deleted(store: Store, request_id: str) -> bool:
    """Whether the exchange is no longer there; then what was just said of it is deleted too."""
    if store.exchange(request_id) is not None:
        return False
    store.forget([request_id], without)
    return True


def _unknown(request_id: str) -> Refusal:
    return Refusal(
        404,
        f"there is no captured request {request_id} of this key; give the X-Request-Id of a reply.",
        code="request_not_found",
        param="request_id",
    )


def _malformed(message: str, param: str | None) -> Refusal:
    return Refusal(400, message, code="invalid_feedback", param=param)


def _unstored() -> Refusal:
    return Refusal(
        503,
        "the feedback could not be stored; try again in a moment.",
        kind="server_error",
        code="not_stored",
        retry_after=5.0,
    )
