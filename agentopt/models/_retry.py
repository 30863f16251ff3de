"""When to try again: transport failures, timeouts, 429 and 5xx, within a bounded total wait.

429 is not a failure of the request, so only the total wait bounds it; the other kinds are also bounded by the number
of tries. A Retry-After is obeyed as given; when it reaches beyond what is left of the bound the call fails at once
instead of waiting in vain. The pause before try n is min(cap, first * 2**(n-1)) times 0.5-1.0, drawn from the request's
key, so two runs wait alike and equal clients do not march in step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import anyio

from agentopt.models._errors import LMError, LMRateLimit


class Clock(Protocol):
    """Monotonic seconds and a sleep; tests give a virtual one."""

    def now(self) -> float:
        """Seconds from an arbitrary start."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        ...


class SystemClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        """Seconds from an arbitrary start."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await anyio.sleep(seconds)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Seconds, except `max_tries`."""

    max_tries: int = 5
    """Tries for one call when the failures are transport, timeout or 5xx; 429 does not count."""
    max_wait: float = 300.0
    """Upper bound of all pauses of one call together."""
    first: float = 0.5
    cap: float = 30.0

    def pause(self, error: LMError, *, failures: int, tries: int, waited: float, key: str) -> float | None:
        """Seconds to wait before the next try, or None when there is none.

        `failures` counts the failed tries that were not 429, `tries` all of them, `waited` the pauses so far.
        """
        if not error.retryable or (failures >= self.max_tries and not isinstance(error, LMRateLimit)):
            return None
        pause = error.retry_after
        if pause is None:
            draw = int(key[(tries % 8) * 4 : (tries % 8) * 4 + 4] or "0", 16) / 0xFFFF
            pause = min(self.cap, self.first * 2.0 ** min(tries - 1, 20)) * (0.5 + 0.5 * draw)
        return pause if waited + pause <= self.max_wait else None
