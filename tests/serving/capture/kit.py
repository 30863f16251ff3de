"""What the capture tests share: exchanges made by hand, and a gateway whose traffic is captured."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from agentopt.graph import Trace
from agentopt.serving._types import CHAT, Exchange, Key
from agentopt.serving.capture import FeedbackStore, Recorder
from agentopt.store import Store
from tests.serving.gateway.kit import House, Names, house

_numbers = itertools.count(1)


def exchange(text: str = "hello", session: str | None = None, key: Key | None = None, **more: Any) -> Exchange:
    """One finished chat exchange."""
    body = {"messages": [{"role": "user", "content": text}]}
    made = Exchange(f"req_{next(_numbers):032x}", CHAT, "127.0.0.1", key=key, session=session)
    made.body, made.sent, made.status, made.bytes_in = body, body, 200, len(text)
    made.asked = made.model = "m"
    made.ended = made.began + 0.01
    for name, value in more.items():
        setattr(made, name, value)
    return made


def answer(text: str = "hi there you") -> bytes:
    """A whole chat reply."""
    return json.dumps({"choices": [{"index": 0, "message": {"content": text}, "finish_reason": "stop"}]}).encode()


def put(recorder: Recorder, *given: Exchange, reply: bytes | None = None) -> None:
    """What the gateway does with an exchange."""
    for item in given:
        wanted = recorder.wants_reply(item)
        recorder.ended(item, (reply or answer()) if wanted else None)


@asynccontextmanager
async def captured(
    recorder: Recorder, *, keyring: Any = None, names: Names | None = None, fake: dict[str, Any] | None = None
) -> AsyncGenerator[tuple[House, FeedbackStore]]:
    """A gateway over the fake engine, with this recorder among its observers."""
    sink = FeedbackStore(recorder)
    recorder.start()
    async with house(keyring=keyring, names=names, feedback=sink, fake=fake) as here:
        here.gateway.observers = (*here.gateway.observers, recorder)
        yield here, sink
        assert await recorder.settled()
    assert await recorder.aclose() == 0


def traces(path: str, run_id: str) -> list[Trace]:
    """All traces of a run."""
    with Store.open(path) as store:
        return [Trace.from_dict(store.trace(item) or {}) for item in store.traces(run_id)]
