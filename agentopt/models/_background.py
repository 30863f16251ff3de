"""One event loop in a daemon thread, for synchronous callers and for libraries that must not see several loops.

Invariants: the loop is started on first use and lives as long as the process (connections stay warm between
synchronous calls); a forked child starts its own; the caller's context variables travel with the call, so recordings,
candidates and meters of the caller are the ones the call sees. A call made from the loop's own thread (a synchronous
function that runs on it and calls back) gets a short-lived loop in another thread instead of a deadlock.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_started: dict[int, tuple[asyncio.AbstractEventLoop, threading.Thread]] = {}
"""Process id → the loop; an entry of the parent is dead in a forked child."""


def _loop() -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    found = _started.get(os.getpid())
    if found is not None:
        return found
    with _lock:
        if os.getpid() not in _started:
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="agentopt-lm", daemon=True)
            thread.start()
            if not _started:
                atexit.register(_stop)
            _started.clear()
            _started[os.getpid()] = (loop, thread)
        return _started[os.getpid()]


def _stop() -> None:
    """At interpreter exit: close warm connections and the loop, waiting briefly for either."""
    found = _started.pop(os.getpid(), None)
    if found is None:
        return
    loop, thread = found
    with suppress(TimeoutError, RuntimeError):
        asyncio.run_coroutine_threadsafe(loop.shutdown_asyncgens(), loop).result(1)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(1)
        if not thread.is_alive():
            loop.close()


def submit(call: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
    """Start `call()` on the background loop in a copy of the caller's context."""
    loop, _ = _loop()
    return asyncio.run_coroutine_threadsafe(call(), loop)


def run_sync(call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `call()` to its end from synchronous code, whether or not a loop runs in this thread."""
    _, thread = _loop()
    if threading.current_thread() is thread:
        return _in_new_thread(call)
    future = submit(call)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def run_on_background(call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `call()` on the background loop and await it from this one."""
    loop, _ = _loop()
    if asyncio.get_running_loop() is loop:
        return await call()
    return await asyncio.wrap_future(submit(call))


def _in_new_thread(call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    future: Future[T] = Future()
    context = contextvars.copy_context()

    def body() -> None:
        try:
            future.set_result(asyncio.run(call()))
        except BaseException as error:  # noqa: BLE001  # handed to the caller below
            future.set_exception(error)

    threading.Thread(target=lambda: context.run(body), name="agentopt-lm-nested", daemon=True).start()
    return future.result()
