"""Opens the file: connection settings and numbered SQL migrations.

`migrations/NNNN_name.sql` are applied in order, each in one transaction together with its `user_version`, so a process
killed half-way leaves the file at a whole version and two processes that start at once migrate it once.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterator
from functools import cache
from importlib.resources import files

from agentopt.errors import UserError
from agentopt.store._errors import BUSY_SECONDS

APPLICATION_ID = 0x41474F50  # "AGOP": tells a store from any other SQLite file


@cache
def migrations() -> dict[int, str]:
    """Version number to SQL, in ascending order."""
    found: dict[int, str] = {}
    for entry in files("agentopt.store").joinpath("migrations").iterdir():
        match = re.fullmatch(r"(\d{4})_\w+\.sql", entry.name)
        if match:
            found[int(match[1])] = entry.read_text(encoding="utf-8")
    return dict(sorted(found.items()))


def connect(path: str, *, write: bool) -> sqlite3.Connection:
    """A connection in autocommit mode; a reading one refuses writes.

    Raises:
        sqlite3.Error: the file cannot be opened.
    """
    connection = sqlite3.connect(
        path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=256
    )
    try:
        if write:
            # Only a file that is still empty takes this: pages that become free can be given back without a rewrite.
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            _write_ahead(connection)
            # FULL: a commit is on disk before it counts. Commits are shared, so it costs one sync for many writes.
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA journal_size_limit = 16777216")
        elif path != ":memory:":
            connection.execute("PRAGMA query_only = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Switch to WAL; SQLite does not wait for other processes here by itself."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").fetchone()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def migrate(connection: sqlite3.Connection, path: str) -> None:
    """Bring the file to the newest schema this version knows.

    Raises:
        UserError: the file's schema is newer, or the file belongs to another program.
        sqlite3.Error: the file cannot be read or written.
    """
    newest = max(migrations())
    if _version(connection, path, newest) == newest:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = _version(connection, path, newest)  # another process may have been faster
        for number, script in migrations().items():
            if number > version:
                for statement in _statements(script):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {number}")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _version(connection: sqlite3.Connection, path: str, newest: int) -> int:
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    owner = int(connection.execute("PRAGMA application_id").fetchone()[0])
    tables = int(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
    if owner != APPLICATION_ID and (owner or version or tables):
        raise UserError(
            f"{path} is a SQLite file of another program, not an agentopt store; set AGENTOPT_DB to another file."
        )
    if version > newest:
        raise UserError(
            f"The store {path} has schema version {version}; this agentopt knows versions up to {newest}: "
            "upgrade agentopt, or set AGENTOPT_DB to another file."
        )
    return version


def _statements(script: str) -> Iterator[str]:
    """The script's statements one by one (`executescript` would commit before it starts)."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
