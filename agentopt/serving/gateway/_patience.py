"""Waiting times that run only while this process is there to read what comes.

A process that stood still (a machine that sleeps, or is busy elsewhere) finds two things when it goes on: its times are
over, and what it waited for lies in its sockets. So these times are counted in pieces, and a stop, however long, counts
as one piece at most: there is always a look at the sockets before somebody is given up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

_PIECES = 4


class Clock:
    """Seconds, as coarse as the looks: `look` is called every `period` seconds while somebody waits."""

    __slots__ = ("_looked", "now", "period")

    def __init__(self, period: float) -> None:
        self.period = period
        self.now = 0.0
        self._looked = time.monotonic()

    def begin(self) -> None:
        """The next look comes in `period` seconds; the time since the last one does not count."""
        self._looked = time.monotonic()

    def look(self) -> float:
        """Count the time since the last look, at most `period`; gives `now`."""
        before, self._looked = self._looked, time.monotonic()
        self.now += min(self.period, self._looked - before)
        return self.now


@asynccontextmanager
async def within(seconds: float) -> AsyncGenerator[None]:
    """As `asyncio.timeout`.

    Raises:
        TimeoutError: the block took longer.
    """
    loop = asyncio.get_running_loop()
    left = _PIECES

    def count() -> None:
        nonlocal left, timer
        left -= 1
        if left:
            timer = loop.call_later(seconds / _PIECES, count)
        else:
            bound.reschedule(loop.time())

    async with asyncio.timeout(None) as bound:
        timer = loop.call_later(seconds / _PIECES, count)
        try:
            yield
        finally:
            timer.cancel()
