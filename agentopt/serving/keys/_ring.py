"""The keyring of a running server: answers on the event loop from memory, while a thread minds the file.

Secrets are looked up by their sha256, so that the time of a look-up says nothing about a secret, and a wrong one
leaves no trace in memory. Limits belong to this process: rates begin afresh at a start; the total of a key goes on
from the file. A process that is killed loses at most the last second's usage and that of requests under way.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from agentopt.serving._types import Key, Refusal
from agentopt.serving.keys._budgets import Use
from agentopt.serving.keys._file import StoredKey, hash_of
from agentopt.serving.keys._watch import EMPTY, KeyFile, Look, Snapshot, Used

_log = logging.getLogger("agentopt.serving.keys")
_LONGEST = 256
_SILENT = 10.0
"""Seconds without a look, after which the file counts as one that hangs."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Where the time comes from: of day for expiry, monotonic (jumps of the clock do not matter) for rates."""

    now: Callable[[], float] = time.time
    tick: Callable[[], float] = time.monotonic


def may_ask(key: Key, model: str) -> bool:
    """Whether the key's globs allow a model's name; `*` stands for any characters, also `/`."""
    return any(fnmatchcase(model, glob) for glob in key.models)


class StoredKeyring:
    """The `Keyring` of a key file.

    Args:
        path: the file, made by `agentopt serve keys create`.
        clock: for tests.
        poll: seconds between looks at the file; a revocation takes effect after at most this long.
        flush: seconds between writes of what was used; with `poll`, a second's worth at most is not yet written.
        on_warning: told, on the event loop, what is wrong with the file and when that is over; by default the log is.

    Raises:
        UserError: (from the constructor) there is no such file, or it is no key file.
        KeyFileError: (from the constructor) it cannot be read.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        clock: Clock | None = None,
        poll: float = 0.25,
        flush: float = 0.75,
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        self.path = Path(path)
        self._clock = clock or Clock()
        self._poll, self._flush = poll, flush
        self._on_warning = on_warning or _log.warning
        self._loop: asyncio.AbstractEventLoop | None = None
        self._file = KeyFile(self.path, self._clock.now, self._say)
        self._snapshot: Snapshot = EMPTY
        self._uses: dict[str, Use] = {}
        self._dirty: set[str] = set()
        self._lock = threading.Lock()
        self._watchers: list[Callable[[str], None]] = []
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._looked = 0.0
        self._accept(Look(self._file.snapshot))
        if self.path.stat().st_mode & 0o022:
            self._say(f"{self.path}: other users may write the key file, and so make keys; chmod 600 it")

    # ---- what the gateway asks; on the event loop

    def find(self, secret: str) -> Key | None:
        """The key with this secret; None when there is none, or it was revoked or has expired."""
        if len(secret) > _LONGEST:
            return None
        stored = self._snapshot.by_hash.get(hash_of(secret))
        return stored.key if stored is not None and self._valid(stored) else None

    def admit(self, key: Key) -> None:
        """Count one request against the key's limits.

        Raises:
            Refusal: 401 the key ended since it was found; 429 a limit is reached.
        """
        stored = self._snapshot.by_id.get(key.id)
        if stored is None or not self._valid(stored):
            raise Refusal(
                401, "This API key is not valid any more.", kind="authentication_error", code="invalid_api_key"
            )
        use = self._uses.setdefault(key.id, Use())
        use.admit(stored.key, self.used(key.id), self._clock.tick())

    def release(self, key: Key, tokens: int) -> None:
        """The request is over and took so many tokens."""
        use = self._uses.setdefault(key.id, Use())
        use.release(key, max(0, tokens), self._clock.tick(), self._clock.now())
        with self._lock:
            self._dirty.add(key.id)

    def watch(self, revoked: Callable[[str], None]) -> None:
        """Have `revoked` called with the id of each key that is revoked, expires or is gone from the file."""
        self._watchers.append(revoked)

    # ---- what others like to know

    def used(self, key_id: str) -> int:
        """Tokens the key has used in all, what is not yet written included."""
        use = self._uses.get(key_id)
        return self._snapshot.base.get(key_id, 0) + (use.tokens if use else 0)

    @property
    def known(self) -> int:
        """How many keys are valid now."""
        return sum(1 for stored in self._snapshot.by_id.values() if self._valid(stored))

    @property
    def trouble(self) -> str | None:
        """Why the file cannot be read or written at the moment; None when all is well."""
        silent = time.monotonic() - self._looked if self._thread is not None else 0.0
        if silent > _SILENT:  # a network disk that hangs: there is no error, and nothing is seen any more
            return f"{self.path}: the key file has not answered for {silent:.0f} s"
        return "; ".join(list(self._file.troubles.values())) or None

    def _valid(self, stored: StoredKey) -> bool:
        return stored.revoked is None and (stored.expires is None or self._clock.now() < stored.expires)

    # ---- the thread that minds the file

    async def start(self) -> None:
        """Begin to look for changes and to write usage; call it on the loop that serves."""
        if self._thread is not None:
            return
        self._loop = asyncio.get_running_loop()
        self._stop.clear()
        self._looked = time.monotonic()
        self._thread = threading.Thread(target=self._mind, name="agentopt-keys", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Write what is not yet written, and close the file."""
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            import anyio.to_thread

            await anyio.to_thread.run_sync(thread.join, _SILENT)
        self._loop = None
        if thread is not None and thread.is_alive():
            self._say(f"{self.path}: the key file does not answer; what keys used last is lost")
            return
        if not self._write() and self._dirty:
            self._say(f"{self.path}: what keys used last ({len(self._dirty)} of them) could not be written and is lost")
        self._file.close()

    async def __aenter__(self) -> StoredKeyring:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _mind(self) -> None:
        written = time.monotonic()
        while not self._stop.wait(self._poll):
            self._looked = time.monotonic()
            try:
                look = self._file.look()
                if look.snapshot is not None or look.ended:
                    self._hand_over(look)
                if time.monotonic() - written >= self._flush:
                    self._write()
                    written = time.monotonic()
            except Exception:  # noqa: BLE001 - the thread must live: without it no revocation would be seen again
                _log.exception("%s: looking at the key file failed; trying again", self.path)

    def _hand_over(self, look: Look) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._accept, look)

    def _say(self, warning: str) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._on_warning, warning)
        else:
            self._on_warning(warning)

    def _accept(self, look: Look) -> None:
        if look.snapshot is not None:
            self._snapshot = look.snapshot
        for key in look.ended:
            for revoked in self._watchers:
                try:
                    revoked(key)
                except Exception:  # noqa: BLE001 - one watcher's fault must not keep a revocation from the others
                    _log.exception("key %s: telling that it has ended failed", key)

    def _write(self) -> bool:
        with self._lock:
            dirty, self._dirty = self._dirty, set()
        used = {key: Used(use.requests, use.tokens, use.at) for key in dirty if (use := self._uses.get(key))}
        done = self._file.write(used)
        if not done:
            with self._lock:
                self._dirty |= dirty
        return done
