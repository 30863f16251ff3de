"""The key file: one SQLite file with the tables `keys` and `usage`, written by several processes at once.

A rollback journal, not WAL: the file is small and seldom written, and this way it is one file that can be copied,
mounted into a container, or read from a folder that cannot be written. Only sha256 of a secret is stored. A slow hash
(bcrypt, argon2) protects secrets that people chose; these have 256 random bits, which nobody guesses from a hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sqlite3
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from agentopt.errors import RunError, UserError
from agentopt.serving._types import Key

APPLICATION_ID = 0x41474B59  # "AGKY": tells a key file from any other SQLite file
VERSION = 1
BUSY_SECONDS = 5.0
"""How long a command waits for another process."""
PREFIX = "ak-"
SCHEMA = (
    """CREATE TABLE keys (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        hash BLOB NOT NULL UNIQUE,
        models TEXT NOT NULL,
        requests_per_minute INTEGER,
        tokens_per_minute INTEGER,
        token_budget INTEGER,
        concurrency INTEGER,
        created REAL NOT NULL,
        expires REAL,
        revoked REAL
    ) STRICT""",
    "CREATE UNIQUE INDEX one_key_of_a_name ON keys (name) WHERE revoked IS NULL",
    """CREATE TABLE usage (
        key TEXT PRIMARY KEY REFERENCES keys (id),
        requests INTEGER NOT NULL,
        tokens INTEGER NOT NULL,
        last_used REAL NOT NULL
    ) STRICT""",
)
SELECT = (
    "SELECT id, name, hash, models, requests_per_minute, tokens_per_minute, token_budget, concurrency, created,"
    " expires, revoked, coalesce(requests, 0), coalesce(tokens, 0), last_used FROM keys LEFT JOIN usage ON key = id"
)


class KeyFileError(RunError):
    """The key file could not be read or written; the message names the file, what happened and what to do."""


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key as the file has it, and what it has used. Times are seconds since the epoch."""

    key: Key
    hash: bytes
    created: float
    expires: float | None = None
    revoked: float | None = None
    requests: int = 0
    tokens: int = 0
    last_used: float | None = None

    def state(self, now: float | None = None) -> str:
        """One of valid, revoked, expired, used up."""
        if self.revoked is not None:
            return "revoked"
        if self.expires is not None and (time.time() if now is None else now) >= self.expires:
            return "expired"
        budget = self.key.token_budget
        return "used up" if budget is not None and self.tokens >= budget else "valid"


def new_secret() -> str:
    """`ak-` and 43 characters that carry 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(secret: str) -> bytes:
    """What is stored and looked up in place of a secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def must_exist(path: Path) -> None:
    """Say how to make a key file where there is none.

    Raises:
        UserError: there is none.
    """
    if not path.exists():
        raise UserError(f"{path}: no key file is there; `agentopt serve keys create NAME --keys {path}` makes one.")


def connect(path: Path, *, wait: float = BUSY_SECONDS) -> sqlite3.Connection:
    """A connection to an existing key file in autocommit mode; it may be used from any one thread at a time.

    Raises:
        UserError: no file is there, or it is not a key file.
        sqlite3.Error: it cannot be read.
    """
    must_exist(path)
    uri = f"file:{quote(os.path.abspath(path))}?mode=rw"
    connection = sqlite3.connect(uri, uri=True, timeout=wait, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA synchronous = FULL")
        _check(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def create(path: Path) -> sqlite3.Connection:
    """A connection to the key file, which is made (only its owner may read it) where there is none.

    Raises:
        UserError: the file belongs to another program.
        sqlite3.Error, OSError: it cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # an existing file is never opened here: closing it would end SQLite's own locks
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    uri = f"file:{quote(os.path.abspath(path))}?mode=rw"
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")  # two commands that make the same file: the second finds it made
        if _numbers(connection) == (0, 0, 0):
            for statement in SCHEMA:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
        _check(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _numbers(connection: sqlite3.Connection) -> tuple[int, int, int]:
    owner = int(connection.execute("PRAGMA application_id").fetchone()[0])
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    return owner, version, int(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])


def _check(connection: sqlite3.Connection, path: Path) -> None:
    owner, version, tables = _numbers(connection)
    if owner != APPLICATION_ID:
        what = "a SQLite file of another program" if owner or version or tables else "empty"
        raise UserError(f"{path} is {what}, not a key file; give another path, or `agentopt serve keys create` one.")
    if version > VERSION:
        raise UserError(
            f"{path}: the key file has version {version}; this agentopt knows versions up to {VERSION}: upgrade it."
        )


def rows(connection: sqlite3.Connection, path: Path) -> list[StoredKey]:
    """All keys of the file, oldest first.

    Raises:
        KeyFileError: a row makes no sense.
        sqlite3.Error: the file cannot be read.
    """
    return [_stored(row, path) for row in connection.execute(f"{SELECT} ORDER BY created, id")]


def _stored(row: tuple[Any, ...], path: Path) -> StoredKey:
    try:
        models = _globs(row[3])
    except ValueError:
        raise KeyFileError(f"{path}: the models of key {row[0]} are no list of names; put back a copy.") from None
    return StoredKey(Key(row[0], row[1], models, *row[4:8]), row[2], *row[8:])


@lru_cache(1024)
def _globs(text: str) -> tuple[str, ...]:
    models: Any = json.loads(text)
    if not isinstance(models, list) or not all(isinstance(one, str) for one in cast("list[Any]", models)):
        raise ValueError("models")
    return tuple(cast("list[str]", models))


def file_error(error: Exception, path: Path) -> KeyFileError:
    """The sentence that says what `error` means for the key file."""
    if isinstance(error, KeyFileError):
        return error
    code, text = str(getattr(error, "sqlite_errorname", "")), str(error)
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")) or "locked" in text:
        return KeyFileError(f"{path}: another process has locked the key file; nothing was changed, try again.")
    if code.startswith("SQLITE_READONLY") or "readonly" in text:
        return KeyFileError(f"{path}: the key file or its folder is read-only.")
    if isinstance(error, PermissionError):
        return KeyFileError(f"{path}: this user may not open or make the key file; check who owns its folder.")
    if code.startswith("SQLITE_FULL"):
        return KeyFileError(f"{path}: the disk that holds the key file is full.")
    if code.startswith("SQLITE_IOERR"):
        return KeyFileError(f"{path}: the disk failed the key file ({text}); check its free space and quota.")
    if code.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
        return KeyFileError(
            f"{path}: the key file is damaged ({text}); put back a copy of it, or make new keys in a new file."
        )
    if code.startswith("SQLITE_CANTOPEN"):
        return KeyFileError(f"{path}: the key file cannot be opened; check the path and who may read it.")
    return KeyFileError(f"{path}: the key file failed: {getattr(error, 'strerror', None) or text}.")
