"""How many calls to one (provider, model) are in flight: additive increase, multiplicative decrease.

The rule is that of inspect_ai's adaptive concurrency: start 20, at least 10, at most 100; a rate-limit answer cuts to
0.8 of what was in flight, at most once per 15 s or per Retry-After; a clean round (as many successes as the limit,
while the limit was in use) grows it by 5 %. A server on the loopback interface has no rate limit to discover, so there
the limit starts at its maximum.

Invariants: safe from several threads and loops; a cancelled waiter never keeps a slot; waiters are served in order.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from agentopt.models._retry import Clock, SystemClock


@dataclass(frozen=True, slots=True)
class ThrottleLimits:
    """The numbers of the rule; calls in flight and seconds."""

    start: int = 20
    minimum: int = 10
    maximum: int = 100
    cut: float = 0.8
    cooldown: float = 15.0
    growth: float = 0.05
    longest_pause: float = 60.0
    """A Retry-After holds back new calls for at most this long; the call that got it waits as its retry policy says."""


class Throttle:
    """One limiter; ask `ThrottleTable` for the one of a client."""

    def __init__(self, limits: ThrottleLimits | None = None, *, clock: Clock | None = None) -> None:
        self.limits = limits or ThrottleLimits()
        self.limit = float(self.limits.start)
        self.active = 0
        self._clock = clock or SystemClock()
        self._clean = 0
        self._saturated = False
        self._quiet_until = float("-inf")
        self._closed_until = float("-inf")
        self._waiters: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()
        self._lock = threading.Lock()

    @asynccontextmanager
    async def slot(self) -> AsyncGenerator[None, None]:
        """Hold one slot for the length of the block."""
        while (pause := self._closed_until - self._clock.now()) > 0:
            await self._clock.sleep(pause)
        await self._acquire()
        try:
            yield
        finally:
            self._release()

    async def _acquire(self) -> None:
        with self._lock:
            if self.active < int(self.limit):
                self.active += 1
                return
            self._saturated = True
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()
            self._waiters.append((loop, future))
        try:
            await future
        except asyncio.CancelledError:
            with self._lock:
                waiting = (loop, future) in self._waiters
                if waiting:
                    self._waiters.remove((loop, future))
            if not waiting:  # the slot was already handed over
                self._release()
            raise

    def _release(self) -> None:
        with self._lock:
            self.active -= 1
            self._hand_over()

    def _hand_over(self) -> None:
        while self._waiters and self.active < int(self.limit):
            loop, future = self._waiters.popleft()
            if loop.is_closed():
                continue
            self.active += 1
            loop.call_soon_threadsafe(_grant, future)

    def succeeded(self) -> None:
        """A call was answered; counts towards a clean round."""
        with self._lock:
            self._clean += 1
            if self._clean < int(self.limit):
                return
            self._clean = 0
            if self._saturated and self._clock.now() >= self._quiet_until:
                self.limit = min(float(self.limits.maximum), max(self.limit * (1 + self.limits.growth), self.limit + 1))
                self._hand_over()
            self._saturated = False

    def limited(self, retry_after: float | None) -> None:
        """The provider answered 429: cut once per cooldown and, when it named a time, admit nobody before that."""
        now = self._clock.now()
        with self._lock:
            self._clean = 0
            if retry_after is not None:
                self._closed_until = max(self._closed_until, now + min(retry_after, self.limits.longest_pause))
            if now < self._quiet_until:
                return
            self._quiet_until = now + (self.limits.cooldown if retry_after is None else retry_after)
            self.limit = max(float(self.limits.minimum), min(self.limit, float(self.active)) * self.limits.cut)


def _grant(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class ThrottleTable:
    """One limiter per client name; shared by every `LM` of the process unless a test gives its own."""

    def __init__(self, limits: ThrottleLimits | None = None, *, clock: Clock | None = None) -> None:
        self._limits = limits or ThrottleLimits()
        self._clock = clock
        self._table: dict[str, Throttle] = {}
        self._lock = threading.Lock()

    def of(self, name: str) -> Throttle:
        """The limiter of the client called `name`."""
        with self._lock:
            found = self._table.get(name)
            if found is None:
                found = self._table[name] = Throttle(self._limits, clock=self._clock)
                if _is_loopback(name):
                    found.limit = float(self._limits.maximum)
            return found


def _is_loopback(name: str) -> bool:
    _, _, url = name.partition(":")
    return urlsplit(url).hostname in {"localhost", "127.0.0.1", "::1"}


shared_throttles = ThrottleTable()
