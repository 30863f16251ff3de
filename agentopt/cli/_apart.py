"""Printing in a thread of its own: a terminal that is stopped, or a pipe that nobody reads, holds nothing else up."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

_WAITING = 1000
_LAST_SECONDS = 5.0


class Apart:
    """Calls `listener` with each event, in order, in a thread; use as a context manager.

    Of a listener that does not come back, the last 1,000 events are kept; leaving waits for it for 5 seconds.
    """

    def __init__(self, listener: Callable[[Any], None]) -> None:
        self._listener = listener
        self._events: queue.Queue[Any] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="printing", daemon=True)

    def __enter__(self) -> Apart:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._events.put(None)
        self._thread.join(_LAST_SECONDS)

    def __call__(self, event: Any) -> None:
        """Have it printed."""
        if self._events.qsize() >= _WAITING:
            with contextlib.suppress(queue.Empty):
                self._events.get_nowait()
        self._events.put(event)

    def _run(self) -> None:
        while (event := self._events.get()) is not None:
            # Consoles end the program where nobody reads any more; a server goes on.
            with contextlib.suppress(OSError, SystemExit):
                self._listener(event)
