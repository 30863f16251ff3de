"""A time limit that does not hold it against the work when the whole process stood still.

A process that goes on after a stop (a machine that sleeps, or is busy elsewhere) finds its timers over although nothing
could have been done or read meanwhile: a rollout would be scored as one that hangs, a reply that has come thrown away.
So the time is counted in pieces, of which a stop takes one at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import contextmanager

import anyio

_PIECES = 8


@contextmanager
def patient(seconds: float | None) -> Generator[anyio.CancelScope]:
    """As `anyio.move_on_after`: whether the time was over is `cancelled_caught` of what it gives.

    Args:
        seconds: None for no limit.
    """
    with anyio.CancelScope() as scope:
        if seconds is None:
            yield scope
            return
        loop, piece, left = asyncio.get_running_loop(), seconds / _PIECES, _PIECES

        def count() -> None:
            nonlocal left, timer
            left -= 1
            if left > 0:
                timer = loop.call_later(piece, count)
            else:
                scope.cancel()

        timer = loop.call_later(piece, count)
        try:
            yield scope
        finally:
            timer.cancel()
