"""One computing engine per machine: a lock file that processes hold only while they have work.

Two engines that compute at once on few cores do not share the time, they destroy it (spinning threads that wait for one
another). So the lock is taken per burst of work, handed over about once a second when another process waits, and
released when the holder has been idle for a moment. A process that merely keeps a loaded engine holds nothing, so a
program that starts another program with an engine of its own cannot lock itself out.
"""

from __future__ import annotations

import getpass
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl
except ImportError:  # pragma: no cover - not on Linux or macOS
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger("agentopt.models.embedded")
_SLICE = 1.0
"""Seconds after which the holder looks whether another process waits."""
_POLL = 0.02


def default_lock_path() -> Path:
    """AGENTOPT_ENGINE_LOCK, or one file per user in the machine's temporary directory."""
    configured = os.environ.get("AGENTOPT_ENGINE_LOCK")
    if configured:
        return Path(configured)
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without a passwd entry
        user = str(os.getuid())
    return Path(tempfile.gettempdir()) / f"agentopt-engine-{user}.lock"


class MachineLock:
    """An advisory lock between processes (flock: gone with the process, however it dies). Used by one thread only."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_lock_path()
        self._fd: int | None = None
        self._since = 0.0
        self._said = False

    @property
    def held(self) -> bool:
        """Whether this process may compute now."""
        return self._fd is not None

    def acquire(self, give_up: Callable[[], bool]) -> bool:
        """Take the lock, waiting for another process if need be; False when `give_up()` turned true meanwhile."""
        if self._fd is not None:
            self._hand_over()
        if self._fd is not None:
            return True
        if fcntl is None:  # pragma: no cover - not on Linux or macOS
            self._fd = -1
            return True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        waiting: int | None = None
        try:
            while not _try_lock(descriptor):
                if waiting is None:
                    waiting = os.open(self._queue_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                    fcntl.flock(waiting, fcntl.LOCK_SH)
                    self._say_once()
                if give_up():
                    return False
                time.sleep(_POLL)
            self._fd, self._since = descriptor, time.monotonic()
            return True
        finally:
            if waiting is not None:
                os.close(waiting)
            if self._fd != descriptor:
                os.close(descriptor)

    def release(self) -> None:
        """Let other processes compute. Does nothing when the lock is not held."""
        if self._fd is not None and self._fd >= 0:
            os.close(self._fd)
        self._fd = None

    @property
    def _queue_path(self) -> Path:
        return self.path.with_name(self.path.name + ".queue")

    def _hand_over(self) -> None:
        """After a time slice, if another process waits: release, and give it long enough to take the lock."""
        if fcntl is None or time.monotonic() - self._since < _SLICE:
            return
        self._since = time.monotonic()
        try:
            queue = os.open(self._queue_path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            if not _try_lock(queue):
                self.release()
                time.sleep(3 * _POLL)
        finally:
            os.close(queue)

    def _say_once(self) -> None:
        if not self._said:
            self._said = True
            _log.warning(
                "another process is using the embedded engine on this machine; taking turns with it (lock file %s)",
                self.path,
            )


def _try_lock(descriptor: int) -> bool:
    if fcntl is None:  # pragma: no cover - not on Linux or macOS
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
