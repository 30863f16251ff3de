"""The run folder: only its owner may enter, one engine at a time, a fresh socket for each start."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import socket
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from agentopt.errors import UserError
from agentopt.serving._types import Address

try:
    import fcntl
except ImportError:  # pragma: no cover - not on Linux or macOS
    fcntl = None  # type: ignore[assignment]

_LONGEST_FOLDER = 85
"""Bytes: the kernel takes 107 for the path of a socket."""


class RunFolder:
    """A folder of one server."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def make(self) -> None:
        """Make it, for its owner alone, and look whether it can be written.

        Raises:
            UserError: it cannot.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.path.chmod(0o700)
            probe = self.path / f".{secrets.token_hex(4)}"
            probe.touch(0o600)
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"run folder {self.path}: cannot be written ({error.strerror or error}); give another with --run-dir."
            ) from error

    async def lock(self, patience: float, waits: Callable[[], None] = lambda: None) -> int:
        """Take the folder's engine lock; gives a file descriptor, and whoever holds a copy of it holds the lock.

        The watchdog holds it as long as anything of an engine runs, so a server that was killed is waited for; `waits`
        is called when there is something to wait for.

        Raises:
            UserError: another engine still runs here after `patience` seconds.
        """
        path = self.path / "engine.lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error}).") from error
        until = time.monotonic() + patience
        try:
            while not _locked(descriptor):
                if time.monotonic() > until:
                    raise UserError(
                        f"run folder {self.path}: found an engine of another server running in it; stop that one, or "
                        "give another folder with --run-dir."
                    )
                waits()
                await asyncio.sleep(0.05)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def address(self, token: str) -> Address:
        """Where the next engine listens: a new socket, else a free loopback port. Call with the lock."""
        for folder in (self.path.absolute(), self._short()):
            if folder is None or len(os.fsencode(folder)) > _LONGEST_FOLDER:
                continue
            for left in folder.glob("engine-*.sock"):  # of engines that are gone: we have the lock
                with suppress(OSError):
                    left.unlink()
            return Address(host="localhost", socket=str(folder / f"engine-{secrets.token_hex(3)}.sock"), token=token)
        return Address(port=free_port(), token=token)

    def _short(self) -> Path | None:
        """A folder for sockets where the run folder's path is too long for one; None when somebody else has it."""
        named = hashlib.sha256(os.fsencode(self.path.absolute())).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"agentopt-{os.getuid()}-{named}"
        with suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o077:
                return folder
        return None


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _locked(descriptor: int) -> bool:
    if fcntl is None:  # pragma: no cover - not on Linux or macOS
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
