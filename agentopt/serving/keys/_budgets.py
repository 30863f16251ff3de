"""What one key has used up: token buckets for its rates, a count of its requests under way, and its total.

A bucket holds at most one minute's worth and fills evenly: a key that was silent may burst, then goes on at its rate.
The tokens of a request are known when it is over. So a request is let in while the bucket is above zero, and its
tokens may take the bucket below zero: a rate is exceeded by at most what is under way, and waited off afterwards.
"""

from __future__ import annotations

import math

from agentopt.serving._types import Key, Refusal


class Bucket:
    """Fills at `per_minute` up to `per_minute`; starts full."""

    __slots__ = ("_at", "_level")

    def __init__(self, per_minute: int, now: float) -> None:
        self._level = float(per_minute)
        self._at = now

    def level(self, per_minute: int, now: float) -> float:
        """What is in it now; less than nothing when it was overdrawn."""
        passed = max(0.0, now - self._at)
        self._level = min(float(per_minute), self._level + passed * per_minute / 60)
        self._at = max(now, self._at)
        return self._level

    def take(self, amount: float) -> None:
        """Take so much, also what is not there."""
        self._level -= amount


class Use:
    """What one key is doing and has done in this process. Belongs to the event loop; the writer only reads sums."""

    __slots__ = ("_requests", "_tokens", "at", "in_flight", "requests", "tokens")

    def __init__(self) -> None:
        self.in_flight = 0
        self.requests = 0
        """Requests that are over, since this process began."""
        self.tokens = 0
        """Their tokens."""
        self.at = 0.0
        """Wall clock of the last one."""
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None

    def admit(self, key: Key, used: int, now: float) -> None:
        """Count one more request, of a key that has used so many tokens in all.

        Raises:
            Refusal: 429; nothing was counted.
        """
        if key.token_budget is not None and used >= key.token_budget:
            raise Refusal(
                429,
                f"The token budget of this key ({key.token_budget:,}) is used up; ask for another key.",
                kind="insufficient_quota",
                code="insufficient_quota",
            )
        if key.concurrency is not None and self.in_flight >= key.concurrency:
            at_once = f"{key.concurrency} request{'s'[: key.concurrency != 1]} at a time"
            raise _too_many(f"This key may have {at_once}; wait for one to end.", 1.0)
        rate, tokens = key.requests_per_minute, key.tokens_per_minute
        if tokens is not None:
            self._tokens = self._tokens or Bucket(tokens, now)
            if (level := self._tokens.level(tokens, now)) <= 0:
                raise _too_many(f"This key may use {tokens:,} tokens a minute.", (1 - level) * 60 / tokens)
        if rate is not None:
            self._requests = self._requests or Bucket(rate, now)
            if (level := self._requests.level(rate, now)) < 1:
                raise _too_many(f"This key may ask {rate:,} times a minute.", (1 - level) * 60 / rate)
            self._requests.take(1)
        self.in_flight += 1

    def release(self, key: Key, tokens: int, now: float, wall: float) -> None:
        """One request is over; `now` is the monotonic clock, `wall` the time of day."""
        self.in_flight = max(0, self.in_flight - 1)
        self.requests += 1
        self.tokens += tokens
        self.at = wall
        if key.tokens_per_minute is not None:
            self._tokens = self._tokens or Bucket(key.tokens_per_minute, now)
            self._tokens.level(key.tokens_per_minute, now)
            self._tokens.take(tokens)


def _too_many(message: str, wait: float) -> Refusal:
    seconds = max(1, math.ceil(wait))
    return Refusal(
        429,
        f"{message} Try again in {seconds} s.",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        retry_after=float(seconds),
    )
