"""The access log: one JSON line a request. No text of prompts or replies, no secrets; rotated by size.

A full disk never stops serving: lines that cannot be written are counted, and the count is written when it works again.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from agentopt.errors import UserError
from agentopt.serving._types import Exchange

_TEXT_BYTES = 100_000


class AccessLog:
    """An observer that writes lines.

    Args:
        path: The file; `path.1` is the one before. None: to `stream` only.
        stream: Gets the same lines, for example stderr in a container.
        max_bytes: A file this long is put aside.
        keep: Files put aside that are kept.
        log_text: Write request bodies and replies too (they hold what users typed).

    Raises:
        UserError: The file cannot be written.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        stream: TextIO | None = None,
        max_bytes: int = 20 << 20,
        keep: int = 3,
        log_text: bool = False,
    ) -> None:
        self.lost = 0
        """Lines that could not be written since the last that could."""
        self._path = path
        self._stream = stream
        self._max_bytes = max_bytes
        self._keep = keep
        self._log_text = log_text
        self._file: int | None = None
        self._size = 0
        if path is not None:
            try:
                self._open(path)
            except OSError as error:
                raise UserError(f"cannot write the access log {path}: {error.strerror}") from error

    def wants_reply(self, exchange: Exchange) -> bool:
        """Only where text is logged."""
        return self._log_text

    def ended(self, exchange: Exchange, reply: bytes | None) -> None:
        """One line for a request on a forwarded route."""
        line = _line(exchange)
        if self._log_text:
            line["request"] = exchange.body
            line["reply"] = None if reply is None else reply[:_TEXT_BYTES].decode("utf-8", "replace")
        self._write(line)

    def aside(self, exchange: Exchange) -> None:
        """One line for any other request, but none for health checks that went well."""
        if exchange.route not in ("/health", "/ready") or exchange.status >= 500:
            self._write(_line(exchange))

    def event(self, kind: str, **fields: Any) -> None:
        """A line about the server itself; `fields` must be JSON."""
        self._write({"time": _stamp(time.time()), "event": kind, **fields})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, line: dict[str, Any]) -> None:
        data = (json.dumps(line, ensure_ascii=True, separators=(",", ":")) + "\n").encode()
        if self._stream is not None:
            with suppress(OSError, ValueError):
                self._stream.write(data.decode())
                self._stream.flush()
        if self._path is None:
            return
        try:
            if self._file is None or self._size + len(data) > self._max_bytes:
                self._rotate(self._path)
            if self.lost:
                data = b'{"event":"lines_lost","count":%d}\n%b' % (self.lost, data)
            self._size += _write_all(self._file, data)
            self.lost = 0
        except OSError:
            self.lost += 1

    def _open(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._file).st_size

    def _rotate(self, path: Path) -> None:
        if self._file is not None and self._size:
            self.close()
            for number in range(self._keep, 0, -1):
                older = path.with_name(f"{path.name}.{number - 1}") if number > 1 else path
                with suppress(OSError):  # one that cannot be put aside grows on
                    older.replace(path.with_name(f"{path.name}.{number}"))
            if self._keep == 0:
                path.unlink(missing_ok=True)
        if self._file is None:
            self._open(path)


def _write_all(file: int | None, data: bytes) -> int:
    if file is None:
        raise OSError("the log is not open")
    written = os.write(file, data)
    try:
        while written < len(data):
            written += os.write(file, data[written:])
    except OSError:
        os.ftruncate(file, os.fstat(file).st_size - written)  # half a line would make the next one unreadable too
        raise
    return written


def _line(exchange: Exchange) -> dict[str, Any]:
    """The standard fields; see docs/gateway.md."""
    ended = exchange.ended if exchange.ended is not None else time.monotonic()
    use = exchange.use
    return {
        "time": _stamp(exchange.started),
        "request_id": exchange.id,
        "client_request_id": exchange.client_request_id,
        "client": exchange.client,
        "key": exchange.key.id if exchange.key is not None else None,
        "route": exchange.route,
        "model": exchange.model or None,
        "variant": exchange.variant,
        "adapter": exchange.adapter,
        "status": exchange.status,
        "error": exchange.error,
        "stream": exchange.stream,
        "ms": round((ended - exchange.began) * 1000, 1),
        "first_ms": None if exchange.first is None else round((exchange.first - exchange.began) * 1000, 1),
        "prompt_tokens": use.prompt if use else None,
        "completion_tokens": use.completion if use else None,
        "bytes_in": exchange.bytes_in,
        "bytes_out": exchange.bytes_out,
    }


def _stamp(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"
