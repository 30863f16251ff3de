"""Keys are created, listed and revoked here: what `agentopt serve keys` does, in any process, while a server runs."""

from __future__ import annotations

import difflib
import json
import math
import re
import secrets
import sqlite3
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agentopt.errors import UserError
from agentopt.serving._types import Key
from agentopt.serving.keys._file import StoredKey, connect, create, file_error, hash_of, new_secret, rows

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
_ID = re.compile(r"k-[0-9a-f]{10}")
_LARGEST = 2**53


@dataclass(frozen=True, slots=True)
class NewKey:
    """What a key is to be: its name and limits. None: no limit."""

    name: str
    models: tuple[str, ...] = ("*",)
    """Globs of the model names it may ask."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    token_budget: int | None = None
    concurrency: int | None = None
    expires_days: float | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or _ID.fullmatch(self.name):
            raise UserError(
                f"key name {self.name!r}: expected 1 to 64 of letters, digits and . _ @ + -, beginning with a letter "
                "or digit, and not of the form of an id."
            )
        limits = {
            "requests per minute": self.requests_per_minute,
            "tokens per minute": self.tokens_per_minute,
            "tokens": self.token_budget,
            "concurrency": self.concurrency,
        }
        for what, value in limits.items():
            if value is not None and not 1 <= value <= _LARGEST:
                raise UserError(f"key {self.name}: {what} is {value}, expected at least 1; leave it out for no limit.")
        days = self.expires_days
        if days is not None and not (math.isfinite(days) and 0 < days <= 36500):
            raise UserError(f"key {self.name}: expires in {days} days, expected more than 0 and at most 36500.")
        if not self.models or not all(glob.strip() == glob and 0 < len(glob) <= 256 for glob in self.models):
            raise UserError(f"key {self.name}: models are {','.join(self.models)!r}, expected names like m,tuned-*.")


class KeyStore:
    """The key file at `path`, opened for one operation at a time."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def create(self, new: NewKey) -> tuple[StoredKey, str]:
        """Store a new key; gives it and its secret, which is kept nowhere and cannot be shown again.

        Raises:
            UserError: a valid key of that name is there, or the file is not a key file.
            KeyFileError: the file cannot be written.
        """
        with self._open(make=True) as connection:
            known = [one for one in rows(connection, self.path) if one.key.name == new.name and one.revoked is None]
            if known:
                raise UserError(
                    f"{self.path}: there is a key {new.name} ({known[0].key.id}, {known[0].state()}); revoke it first, "
                    "or take another name."
                )
            now, secret = time.time(), new_secret()
            key = Key(
                f"k-{secrets.token_hex(5)}",
                new.name,
                new.models,
                new.requests_per_minute,
                new.tokens_per_minute,
                new.token_budget,
                new.concurrency,
            )
            expires = None if new.expires_days is None else now + new.expires_days * 86400
            stored = StoredKey(key, hash_of(secret), now, expires)
            connection.execute(
                "INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
                (
                    key.id,
                    key.name,
                    stored.hash,
                    json.dumps(list(key.models)),
                    key.requests_per_minute,
                    key.tokens_per_minute,
                    key.token_budget,
                    key.concurrency,
                    now,
                    expires,
                ),
            )
        return stored, secret

    def list(self) -> list[StoredKey]:
        """All keys, oldest first, the revoked ones too.

        Raises:
            UserError, KeyFileError: there is no key file, or it cannot be read.
        """
        with self._open() as connection:
            return rows(connection, self.path)

    def revoke(self, which: str) -> StoredKey:
        """End the key with this id or name; gives it as it was before: `revoked` is set if it had ended already.

        Raises:
            UserError: there is none.
            KeyFileError: the file cannot be written; the key is still valid.
        """
        with self._open(write=True) as connection:
            stored = rows(connection, self.path)
            found = [one for one in stored if which in (one.key.id, one.key.name)]
            if not found:
                valid = [one for one in stored if one.revoked is None]
                names = [name for one in valid for name in (one.key.name, one.key.id)]
                close = difflib.get_close_matches(which, names, n=1)
                hint = f"did you mean {close[0]}?" if close else "`agentopt serve keys list` shows what there is."
                raise UserError(f"{self.path}: no key {which!r}; {hint}")
            one = next((one for one in found if one.revoked is None), found[-1])
            if one.revoked is None:
                connection.execute("UPDATE keys SET revoked = ? WHERE id = ?", (time.time(), one.key.id))
        return one

    @contextmanager
    def _open(self, *, make: bool = False, write: bool = False) -> Generator[sqlite3.Connection]:
        """One transaction; one that writes holds the lock from its start, so that what it read still holds."""
        try:
            connection = create(self.path) if make else connect(self.path)
            try:
                connection.execute("BEGIN IMMEDIATE" if make or write else "BEGIN")
                yield connection
                connection.execute("COMMIT")
            finally:
                connection.close()
        except (sqlite3.Error, OSError) as error:
            raise file_error(error, self.path) from error
