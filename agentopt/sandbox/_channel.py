"""The parent's end of one live worker: requests out, replies in, and no trust in what comes back."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import subprocess
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

from agentopt.graph import ALLOWED_MODULES
from agentopt.sandbox._limits import Limits
from agentopt.sandbox._tiers import Started, Tier

START_SECONDS = 60.0
# What an error may hold, and how much of its texts is kept: they go into feedback, reports and the store.
_ERROR_TEXTS = {"type": 200, "message": 10_000, "source_line": 1_000, "trace": 20_000}


class Worker:
    """One live worker with its pipes.

    Raises:
        OSError: it could not be started; the message says why.
    """

    def __init__(self, tier: Tier, limits: Limits) -> None:
        started = tier.start(limits)
        self.process = started.process
        if self.process.stdin is None or self.process.stdout is None:
            raise OSError(f"the {tier.name} tier started a worker without pipes")
        self.requests, self.replies = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.requests, False)
        os.set_blocking(self.replies, False)
        self.rest = b""
        self.owner = os.getpid()
        self.defined: set[str] = set()
        # The worker is ended also when nobody calls close().
        self.close = weakref.finalize(self, _end, started.end, self.owner)
        try:
            self.exchange(_settings(limits, started), START_SECONDS, limits.result_bytes)
        except (EOFError, ValueError, TimeoutError) as error:
            reason = "no answer" if isinstance(error, TimeoutError) else self._last_words()
            self.close()
            raise OSError(reason or "it ended at once") from None

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        if self.process.stderr is None:
            return ""
        os.set_blocking(self.process.stderr.fileno(), False)
        text = (self.process.stderr.read(1 << 16) or b"").decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""

    @property
    def stale(self) -> bool:
        """Whether it ended, or wrote something nobody asked for: the next reply would be the wrong one."""
        return self.process.poll() is not None or bool(self.rest) or _ready(self.replies)

    def exchange(self, request: Mapping[str, Any], seconds: float, max_bytes: int) -> dict[str, Any]:
        """Send one request, return the reply: {"ok": value} or {"error": {...}}, checked.

        Raises:
            TimeoutError: no reply within `seconds`.
            EOFError: the worker ended.
            ValueError: what came is no reply to this request.
        """
        patience = _Patience(seconds)
        # Changed code may write to the pipe itself; without the number of this request nothing it writes is a reply.
        number = secrets.token_hex(8)
        try:
            self._send(f"{number} {json.dumps(request)}\n".encode("ascii"), patience)
        except ConnectionError:
            raise EOFError from None
        chunks = [self.rest]
        size = len(self.rest)
        while b"\n" not in chunks[-1]:
            patience.wait(self.replies, select.POLLIN)
            chunk = os.read(self.replies, 1 << 16)
            size += len(chunk)
            if not chunk:
                raise EOFError
            if size > max_bytes + (1 << 20):
                raise ValueError("longer than any reply")
            chunks.append(chunk)
        line, _, self.rest = b"".join(chunks).partition(b"\n")
        head, _, body = line.partition(b" ")
        if head != number.encode("ascii"):
            raise ValueError("not the number of the request")
        return _checked(body)

    def _send(self, data: bytes, patience: _Patience) -> None:
        view = memoryview(data)
        while view:
            patience.wait(self.requests, select.POLLOUT)
            try:
                view = view[os.write(self.requests, view) :]
            except BlockingIOError:
                continue


class _Patience:
    """How long the other side is still waited for.

    It is counted in pieces, of which a stop of this process (a machine that sleeps, or is busy elsewhere) takes one at
    most: the worker has stood still as well, or its reply has come meanwhile.
    """

    def __init__(self, seconds: float) -> None:
        self._left = seconds
        self._piece = seconds / 8

    def wait(self, descriptor: int, event: int) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        while self._left > 0:
            piece = min(self._piece, self._left)
            before = time.monotonic()
            ready = poll.poll(piece * 1000)
            self._left -= min(piece, time.monotonic() - before)
            if ready:
                return
        raise TimeoutError


def _settings(limits: Limits, started: Started) -> dict[str, Any]:
    return {
        "modules": sorted(ALLOWED_MODULES),
        "max_bytes": limits.result_bytes,
        "memory_bytes": limits.memory_bytes,
        "file_bytes": limits.file_bytes,
        "folder": started.folder if started.removes_folder else "",
    }


def _ready(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def _end(end: Callable[[], None], owner: int) -> None:
    if os.getpid() == owner:  # a fork of the owner ends: the worker is not its own
        end()


def _checked(body: bytes) -> dict[str, Any]:
    """Parse a reply; ValueError unless it has exactly the shape that an honest worker sends."""
    try:
        reply: object = json.loads(body)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(reply, dict):
        raise ValueError("not an object")
    found = cast("dict[str, Any]", reply)
    if "error" not in found:
        if "ok" not in found:
            raise ValueError("neither a result nor an error")
        return found
    return {"error": _checked_error(found["error"])}


def _checked_error(error: Any) -> dict[str, Any]:
    if not isinstance(error, dict):
        raise ValueError("not the form of an error")
    given = cast("dict[str, Any]", error)
    checked: dict[str, Any] = {"line": given.get("line")}
    for name, most in _ERROR_TEXTS.items():
        text = given.get(name)
        if not isinstance(text, str):
            raise ValueError(f"an error whose {name} is no text")
        checked[name] = text[:most]
    if not isinstance(checked["line"], int | None):
        raise ValueError("an error whose line is no number")
    return checked
