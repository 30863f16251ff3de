"""Replies that need not be paid again: the store's cache rows, and one flight for equal requests at the same time.

Invariants: a paid reply is durable in the store before anybody uses it; a row that cannot be read is a miss with a
warning, and the new reply overwrites it; followers of a flight whose leader was cancelled take over instead of failing.
"""

from __future__ import annotations

import asyncio
import copy
import threading
import warnings
from concurrent.futures import Future
from dataclasses import replace

import anyio
import anyio.to_thread

from agentopt.graph import Usage
from agentopt.models._errors import LMError
from agentopt.models._protocol import AsyncReplyCache, Reply, ReplyCache, Request


class CacheWarning(RuntimeWarning):
    """A stored reply could not be read and is fetched again."""


def as_cached(reply: Reply) -> Reply:
    """The same reply, spending nothing: what it once took moves to `saved_usage` and `saved_cost`.

    Its usage keeps tokens and price as cached ones, so that whoever adds usages up still knows what they would cost.
    """
    if reply.cached:
        return reply
    return replace(
        reply,
        usage=Usage(
            cached_calls=1,
            cached_input_tokens=reply.usage.input_tokens,
            cached_output_tokens=reply.usage.output_tokens,
            cached_cost=reply.cost,
        ),
        cost=0.0,
        cached=True,
        saved_usage=reply.usage,
        saved_cost=reply.cost,
    )


def look_up(cache: ReplyCache, key: str) -> Reply | None:
    """The stored reply, already marked as cached."""
    try:
        row = cache.get_reply(key)
        return None if row is None else as_cached(Reply.from_dict(row))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(
            f"cached reply {key[:12]} is unreadable ({type(error).__name__}: {error}); the model is asked again",
            CacheWarning,
            stacklevel=2,
        )
        return None


async def keep(cache: ReplyCache, request: Request, reply: Reply) -> None:
    """Store a reply; returns when it is durable. Cancellation does not lose a reply that was paid for."""
    with anyio.CancelScope(shield=True):
        if isinstance(cache, AsyncReplyCache):
            await cache.aput_reply(request.key(), reply.to_dict(), model=request.model, request=request.to_dict())
            return
        await anyio.to_thread.run_sync(_put, cache, request, reply, limiter=_limiter())


def _put(cache: ReplyCache, request: Request, reply: Reply) -> None:
    cache.put_reply(request.key(), reply.to_dict(), model=request.model, request=request.to_dict())


_limiters = threading.local()


def _limiter() -> anyio.CapacityLimiter:
    """Of its own, so that user functions filling anyio's default threads never hold back a paid reply."""
    loop = asyncio.get_running_loop()
    found: tuple[asyncio.AbstractEventLoop, anyio.CapacityLimiter] | None = getattr(_limiters, "found", None)
    if found is None or found[0] is not loop:
        found = _limiters.found = (loop, anyio.CapacityLimiter(16))
    return found[1]


class Flights:
    """Requests under way in this process, by (cache, key)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[tuple[int, str], Future[Reply | None]] = {}

    def join(self, cache: ReplyCache | None, key: str) -> tuple[bool, Future[Reply | None]]:
        """(True, flight) for the one who must make the call and `land` it; (False, flight) for those who wait."""
        place = (id(cache), key)
        with self._lock:
            flight = self._open.get(place)
            if flight is not None:
                return False, flight
            flight = self._open[place] = Future()
            return True, flight

    def land(self, cache: ReplyCache | None, key: str, outcome: Reply | LMError | None) -> None:
        """Give everybody waiting the outcome; None (cancelled, no budget, a caller's bug) lets them try themselves."""
        with self._lock:
            flight = self._open.pop((id(cache), key))
        if isinstance(outcome, LMError):
            flight.set_exception(outcome)
        else:
            flight.set_result(outcome)

    @staticmethod
    async def wait(flight: Future[Reply | None]) -> Reply | None:
        """The leader's reply, spending nothing; raises a copy of the leader's LMError."""
        try:
            reply = await asyncio.shield(asyncio.wrap_future(flight))
        except LMError as error:
            raise copy.copy(error) from error
        return None if reply is None else as_cached(reply)


shared_flights = Flights()
