"""Fixtures for the models room: a scripted loopback server, a store in memory, a clock without waiting, clean roles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anyio.lowlevel
import pytest

from agentopt import models
from agentopt.models import LM, LMOptions, LMSettings, OpenAICompatible, RetryPolicy, ThrottleTable
from tests.models.fake_server import FakeServer


class VirtualClock:
    """Sleeping moves the clock and takes no time."""

    def __init__(self) -> None:
        self.time = 0.0
        self.slept: list[float] = []

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.slept.append(seconds)
        await anyio.lowlevel.checkpoint()


class MemoryCache:
    """What the store does for replies, as a dict."""

    def __init__(self) -> None:
        self.rows: dict[str, Any] = {}
        self.gets = 0
        self.puts = 0

    def get_reply(self, key: str) -> dict[str, Any] | None:
        self.gets += 1
        return self.rows.get(key)

    def put_reply(self, key: str, reply: dict[str, Any], *, model: str, request: dict[str, Any] | None) -> None:
        self.puts += 1
        self.rows[key] = reply


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def cache() -> MemoryCache:
    return MemoryCache()


@pytest.fixture(autouse=True)
def clean_roles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OPENAI_API_KEY", "AGENTOPT_UPSTREAM_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    models.reset()
    yield
    models.reset()


def lm_for(
    server: FakeServer,
    clock: VirtualClock | None = None,
    *,
    cache: Any = None,
    retry: RetryPolicy | None = None,
    options: LMOptions | None = None,
) -> LM:
    """An LM on the loopback server with a throttle of its own."""
    settings = LMSettings(
        cache=cache,
        retry=retry or RetryPolicy(),
        options=options or LMOptions(),
        throttle=ThrottleTable(clock=clock),
        clock=clock,
    )
    return LM(OpenAICompatible(server.url, "fake"), settings=settings)
