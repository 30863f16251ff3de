"""Worker threads for sync functions: few, carrying context, and abandoned when they hang.

Python cannot stop a thread. A rollout that hangs in one is left behind: its place in the pool is free again at once,
the thread is counted, and being a daemon it does not keep the process from ending. What it does after that is ignored.
"""

from __future__ import annotations

import asyncio
import inspect
import queue
import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import Any, cast

_IDLE_SECONDS = 30.0
Outcome = tuple[Any, BaseException | None]


def is_async(function: object) -> bool:
    """Whether calling `function` gives a coroutine or an async generator."""
    inner: Any = function
    while hasattr(inner, "func"):  # functools.partial
        inner = inner.func
    method = inspect.getattr_static(cast("object", type(inner)), "__call__", None)
    ways = (inner, method, getattr(inner, "__wrapped__", None))
    return any(inspect.iscoroutinefunction(item) or inspect.isasyncgenfunction(item) for item in ways)


class _Job:
    __slots__ = ("call", "future", "loop")

    def __init__(self, call: Callable[[], Any], loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any]) -> None:
        self.call = call
        self.loop = loop
        self.future = future


class Threads:
    """As many threads as calls run at the same time; the evaluator's concurrency is the limit."""

    def __init__(self) -> None:
        self.abandoned = 0
        """Calls that were given up while they ran and whose threads are still busy."""
        self._idle: list[queue.SimpleQueue[_Job | None]] = []
        self._lock = threading.Lock()

    async def run(self, call: Callable[[], Any]) -> Any:
        """Run `call` in a thread with a copy of this context.

        When the waiting task is cancelled (a timeout, Ctrl-C), the thread is abandoned.
        """
        loop = asyncio.get_running_loop()
        context = copy_context()
        job = _Job(lambda: context.run(call), loop, loop.create_future())
        self._start(job)
        try:
            return await job.future
        except asyncio.CancelledError:
            if job.future.cancelled():
                with self._lock:
                    self.abandoned += 1
            raise

    def close(self) -> None:
        """Let idle threads end."""
        with self._lock:
            idle, self._idle = self._idle, []
        for inbox in idle:
            inbox.put(None)

    def _start(self, job: _Job) -> None:
        with self._lock:
            inbox = self._idle.pop() if self._idle else None
        if inbox is None:
            inbox = queue.SimpleQueue[_Job | None]()
            threading.Thread(target=self._work, args=(inbox,), name="agentopt-rollout", daemon=True).start()
        inbox.put(job)

    def _work(self, inbox: queue.SimpleQueue[_Job | None]) -> None:
        while True:
            try:
                job = inbox.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                with self._lock:
                    if inbox not in self._idle:
                        continue  # a job is on its way
                    self._idle.remove(inbox)
                return
            if job is None:
                return
            try:
                outcome: Outcome = (job.call(), None)
            except BaseException as error:  # noqa: BLE001 - handed to the task that waits for it
                outcome = (None, error)
            with self._lock:
                self._idle.append(inbox)
            try:
                job.loop.call_soon_threadsafe(self._settle, job.future, outcome)
            except RuntimeError:
                self._returned()  # the loop is closed: the call had been abandoned
            del job, outcome

    def _returned(self) -> None:
        with self._lock:
            self.abandoned -= 1

    def _settle(self, future: asyncio.Future[Any], outcome: Outcome) -> None:
        if future.cancelled():
            self._returned()  # it did end after all
            return
        value, error = outcome
        if error is None:
            future.set_result(value)
        elif isinstance(error, (StopIteration, asyncio.CancelledError)):  # a future refuses or misreads these
            future.set_exception(RuntimeError(f"the function raised {type(error).__name__}"))
        else:
            future.set_exception(error)
