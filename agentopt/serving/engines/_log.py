"""The engine's log: a file that is rotated by size, and its last lines in memory for error messages.

The engine writes into a pipe that we read, so its own logging can be neither lost by a rotation nor without bound. What
cannot be written (a full disk) is dropped: serving goes on.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_KEPT = 200
_LONGEST = 8192
"""Bytes of one line; what is longer is cut into several."""


class EngineLog:
    """`engine.log`, `engine.log.1` (older), ..., each at most `limit` bytes long."""

    def __init__(self, path: Path, *, limit: int, files: int, on_line: Callable[[str], None] | None = None) -> None:
        """`files`: how many there are in all; `on_line` is told of every line."""
        self.path, self.limit, self.files = path, limit, max(1, files)
        self.on_line = on_line
        self.dropped = 0
        """Lines that could not be written."""
        self._secrets: tuple[bytes, ...] = ()
        self._lines: deque[str] = deque(maxlen=_KEPT)
        self._rest = b""
        self._file: io.FileIO | None = None
        self._size = 0

    def hide(self, *secrets: str | None) -> None:
        """These never get into the file, nor into a message."""
        self._secrets = tuple(one.encode() for one in secrets if one)

    def feed(self, data: bytes) -> None:
        """What came from the engine; whole lines are written."""
        *lines, self._rest = (self._rest + data).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        while len(self._rest) > _LONGEST:
            lines.append(self._rest[:_LONGEST])
            self._rest = self._rest[_LONGEST:]
        for line in lines:
            self._write(line)

    def note(self, text: str) -> None:
        """A line of our own."""
        self.end()
        self.feed(f"[agentopt] {text}\n".encode())

    def end(self) -> None:
        """The engine is gone: its last line is whole, even without a newline."""
        if self._rest:
            self.feed(b"\n")

    def clear(self) -> None:
        """Forget the lines in memory: what follows is another engine's."""
        self._lines.clear()

    def tail(self, lines: int = 20) -> list[str]:
        """The last lines."""
        return list(self._lines)[-lines:]

    def close(self) -> None:
        """Close the file."""
        self.end()
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def _write(self, line: bytes) -> None:
        for secret in self._secrets:
            line = line.replace(secret, b"***")
        text = line.decode("utf-8", "replace")
        self._lines.append(text)
        if self.on_line is not None:
            self.on_line(text)
        try:
            if self._file is None or self._size + len(line) > self.limit:
                self._rotate()
            assert self._file is not None
            written = self._file.write(line + b"\n")
            self._size += written
            self.dropped += written <= len(line)
        except OSError:
            self.dropped += 1

    def _rotate(self) -> None:
        """The next file when the present one is full; on the first call the present one is gone on with."""
        if self._file is not None:
            self._file.close()
            self._file = None
        size = self.path.stat().st_size if self.path.exists() else 0
        if size >= self.limit or self._size:
            for number in range(self.files - 1, 0, -1):
                older = self.path.with_name(f"{self.path.name}.{number}")
                newer = self.path if number == 1 else self.path.with_name(f"{self.path.name}.{number - 1}")
                if newer.exists():
                    os.replace(newer, older)
            self.path.unlink(missing_ok=True)
            size = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        # Without a buffer: a full disk shows at the line that it stops, and nothing of that is left for later writes.
        self._file = io.FileIO(os.open(self.path, flags, 0o600), "a")
        self._size = size
