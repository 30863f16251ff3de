"""Several model calls at once, in a bounded number, with their results in the order they were asked in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import anyio

T = TypeVar("T")


async def side_by_side(jobs: Sequence[Callable[[], Awaitable[T]]], limit: int) -> list[T]:
    """All results in the order of `jobs`, at most `limit` running; the first error in that order is raised.

    After an error nothing new begins, but what runs is let finish: its replies are paid for and belong in the cache.
    """
    results: dict[int, T] = {}
    errors: dict[int, Exception] = {}
    turns = anyio.Semaphore(limit)

    async def run(place: int, job: Callable[[], Awaitable[T]]) -> None:
        async with turns:
            if errors:
                return
            try:
                results[place] = await job()
            except Exception as error:  # noqa: BLE001 - raised below, without an exception group around it
                errors[place] = error

    async with anyio.create_task_group() as group:
        for place, job in enumerate(jobs):
            group.start_soon(run, place, job)
    if errors:
        raise errors[min(errors)]
    return [results[place] for place in range(len(jobs))]
