"""What the tests of keyrings share: quick times, clocks moved by hand, keys, waiting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agentopt.serving._types import Key, Refusal
from agentopt.serving.keys import Clock, KeyStore, NewKey, StoredKeyring


class Time:
    """Both clocks, moved by hand."""

    def __init__(self) -> None:
        self.wall, self.ticks = time.time(), 1000.0
        self.clock = Clock(lambda: self.wall, lambda: self.ticks)

    def pass_(self, seconds: float) -> None:
        self.wall += seconds
        self.ticks += seconds


async def until(true: Callable[[], bool]) -> None:
    """Wait, generously, for what another thread does."""
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, "did not happen"
        await asyncio.sleep(0.01)


def ring(path: Path, times: Time | None = None) -> StoredKeyring:
    return StoredKeyring(path, clock=None if times is None else times.clock, poll=0.01, flush=0.02)


def make(path: Path, **limits: object) -> str:
    return KeyStore(path).create(NewKey(**{"name": "team", **limits}))[1]  # type: ignore[arg-type]


def refusal(keyring: StoredKeyring, key: Key) -> Refusal:
    with pytest.raises(Refusal) as caught:
        keyring.admit(key)
    return caught.value
