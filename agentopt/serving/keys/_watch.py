"""The key file while a server runs: looks for changes a few times a second, and writes what was used once a second.

What can happen to the file, and what is done: it cannot be read (deleted, locked, damaged, no rights): the keys known
last stay as they are, the reason is said once in the log and shown until it has passed, and every look tries again, so
a revocation made meanwhile counts as soon as the file can be read. It was replaced: the new file counts; but a key
seen revoked stays revoked in this process, whatever an older copy of the file says. It cannot be written: usage stays
in memory, limits go on counting, and it is written later.
"""

from __future__ import annotations

import logging
import math
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from agentopt.errors import AgentoptError
from agentopt.serving.keys._file import StoredKey, connect, file_error, must_exist, rows

_log = logging.getLogger("agentopt.serving.keys")
_WAIT = 1.0
"""Seconds a look or a write waits for another process."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The file at one moment. `base` is what was used without what this process has counted itself."""

    by_hash: Mapping[bytes, StoredKey]
    by_id: Mapping[str, StoredKey]
    base: Mapping[str, int]


EMPTY = Snapshot({}, {}, {})


@dataclass(frozen=True, slots=True)
class Used:
    """What a key has used since this process began: sums that only grow."""

    requests: int
    tokens: int
    at: float


@dataclass(slots=True)
class Look:
    """What one look found. `snapshot` is None when the file is as before."""

    snapshot: Snapshot | None = None
    ended: list[str] = field(default_factory=list[str])
    """Keys that were valid at the look before and are not any more."""


class KeyFile:
    """The file, opened once and for long; used by one thread at a time.

    Raises:
        UserError, KeyFileError: (from the constructor) it cannot be read.
    """

    def __init__(
        self, path: str | Path, now: Callable[[], float] = time.time, say: Callable[[str], None] = _log.warning
    ) -> None:
        self.path = Path(path)
        self._say = say
        self.troubles: dict[str, str] = {}
        """What cannot be done now ("read", "write"), and why."""
        self._now = now
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._stamp: tuple[int, int] | None = None
        self._version = -1
        self._written: dict[str, Used] = {}
        self._rows: list[StoredKey] = []
        self._valid: frozenset[str] = frozenset()
        self._revoked: set[str] = set()
        self._looked = now()
        self._next_expiry = math.inf
        must_exist(self.path)
        try:
            self.snapshot = self._read()
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise file_error(error, self.path) from error
        except AgentoptError:
            self.close()
            raise
        self._judge()

    def look(self) -> Look:
        """See whether the file changed or a key expired. Never raises for what the file is like."""
        found = Look()
        try:
            if self._changed():
                found.snapshot = self.snapshot = self._read()
            self._fine("read")
        except (sqlite3.Error, OSError, AgentoptError) as error:
            self._forget()
            self._trouble("read", error, "the keys known so far stay valid, and new or revoked ones are not seen")
        now = self._now()
        if found.snapshot is not None or now >= self._next_expiry or now < self._looked:
            before = self._valid
            self._judge()
            found.ended = sorted(before - self._valid)
        self._looked = now
        return found

    def write(self, used: Mapping[str, Used]) -> bool:
        """Add what was used since the last write; False when it cannot be written now (nothing is lost: sums stay)."""
        none = Used(0, 0, 0.0)
        changes = [
            (one.requests - before.requests, one.tokens - before.tokens, one.at, key)
            for key, one in used.items()
            if (one != (before := self._written.get(key, none)))
        ]
        if not changes:
            return True
        try:
            if self._connection is None or self._replaced():
                return False  # whatever that is, the next look says it
            self._add(self._connection, changes)
        except (sqlite3.Error, OSError) as error:
            self._trouble("write", error, "what keys use is counted in memory only")
            return False
        self._written.update(used)
        self._fine("write")
        return True

    def _add(self, connection: sqlite3.Connection, changes: list[tuple[int, int, float, str]]) -> None:
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(
                "INSERT INTO usage (requests, tokens, last_used, key)"
                " SELECT ?1, ?2, ?3, ?4 WHERE EXISTS (SELECT 1 FROM keys WHERE id = ?4)"
                " ON CONFLICT (key) DO UPDATE SET requests = requests + ?1, tokens = tokens + ?2,"
                " last_used = max(last_used, ?3)",
                changes,
            )
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        with suppress(OSError):  # it is written, whatever becomes of the file now
            self._stamp = self._stat()[1]

    def close(self) -> None:
        """Close the file; `look` would open it again."""
        self._forget()

    # ---- reading

    def _stat(self) -> tuple[tuple[int, int], tuple[int, int]]:
        found = self.path.stat()
        return (found.st_dev, found.st_ino), (found.st_mtime_ns, found.st_size)

    def _replaced(self) -> bool:
        return self._stat()[0] != self._identity

    def _changed(self) -> bool:
        """Cheap: one stat and one number of SQLite, which changes with every commit of another connection."""
        identity, stamp = self._stat()
        if self._connection is None or identity != self._identity:
            self._forget()
            return True
        version = int(self._connection.execute("PRAGMA data_version").fetchone()[0])
        if version == self._version and stamp != self._stamp:
            self._forget()  # written over by something that is not SQLite: what it remembers of the file is void
            return True
        return version != self._version

    def _read(self) -> Snapshot:
        identity, stamp = self._stat()
        connection = self._connection or connect(self.path, wait=_WAIT)
        self._connection = connection
        version = int(connection.execute("PRAGMA data_version").fetchone()[0])
        found = rows(connection, self.path)
        if identity != self._stat()[0]:
            raise OSError("it was replaced while it was read")
        replaced = self._identity is not None and identity != self._identity
        self._rows = found
        self._identity, self._stamp, self._version = identity, stamp, version
        if replaced:
            self._say(f"{self.path}: the key file was replaced; it has {len(found)} keys")
        self._keep_revoked()
        none = Used(0, 0, 0.0)
        return Snapshot(
            {one.hash: one for one in found if one.key.id not in self._revoked},
            {one.key.id: one for one in found if one.key.id not in self._revoked},
            {one.key.id: one.tokens - self._written.get(one.key.id, none).tokens for one in found},
        )

    def _keep_revoked(self) -> None:
        revived = [one.key.id for one in self._rows if one.revoked is None and one.key.id in self._revoked]
        if revived:
            self._say(
                f"{self.path}: the file has revoked keys as valid ({', '.join(revived[:5])}); they stay revoked until "
                "the server is started anew"
            )
        self._revoked.update(one.key.id for one in self._rows if one.revoked is not None)

    def _judge(self) -> None:
        now = self._now()
        ahead = [one.expires for one in self._rows if one.expires is not None and one.expires > now]
        self._next_expiry = min(ahead, default=math.inf)
        self._valid = frozenset(
            one.key.id
            for one in self._rows
            if one.key.id not in self._revoked and (one.expires is None or now < one.expires)
        )

    def _forget(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # ---- troubles, each said once

    def _trouble(self, what: str, error: Exception, so: str) -> None:
        if isinstance(error, FileNotFoundError):
            text = f"{self.path}: the key file is gone"
        else:
            told = error if isinstance(error, AgentoptError) else file_error(error, self.path)
            text = str(told).rstrip(".")
        if self.troubles.get(what) != text:
            self.troubles[what] = text
            self._say(f"{text}: {so}")

    def _fine(self, what: str) -> None:
        if self.troubles.pop(what, None) is not None:
            self._say(f"{self.path}: the key file can be {'read' if what == 'read' else 'written'} again")
