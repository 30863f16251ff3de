"""Turns SQLite's errors into one sentence that names the file and the fix."""

from __future__ import annotations

import sqlite3

from agentopt.errors import RunError


class StoreError(RunError):
    """The store could not read or write; the message names the file, what happened and what to do."""


BUSY_SECONDS = 30.0
"""How long a read or write waits for another process before it gives up."""


def store_error(error: sqlite3.Error, path: str) -> StoreError:
    """The `StoreError` that says what `error` means for the file at `path`."""
    code = getattr(error, "sqlite_errorname", "") or ""
    text = str(error)
    if code.startswith("SQLITE_FULL") or "disk is full" in text:
        return StoreError(f"The disk that holds the store {path} is full; free some space, then resume the run.")
    if code.startswith("SQLITE_IOERR") or "disk I/O" in text:
        return StoreError(
            f"The store {path} could not be written ({text}); check the disk's free space and quota, then resume."
        )
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")) or "locked" in text:
        return StoreError(
            f"The store {path} was locked by another process for more than {BUSY_SECONDS:.0f} s; "
            "wait for that process, or set AGENTOPT_DB to another file."
        )
    if code.startswith("SQLITE_NOTADB") or "not a database" in text:
        return StoreError(
            f"{path} is not an agentopt store (it is no SQLite file); move it away, or set AGENTOPT_DB to another file."
        )
    if code.startswith("SQLITE_CORRUPT") or "malformed" in text:
        return StoreError(
            f"The store {path} is damaged ({text}); save what is readable with "
            f"`sqlite3 {path} .recover | sqlite3 recovered.db`, or move it away and start anew."
        )
    if code.startswith("SQLITE_READONLY") or "readonly" in text:
        return StoreError(f"The store {path} cannot be written: the file or its folder is read-only.")
    if code.startswith("SQLITE_CANTOPEN") or "unable to open" in text:
        return StoreError(f"The store {path} cannot be opened; check that its folder exists and can be written.")
    return StoreError(f"The store {path} failed: {text}.")
