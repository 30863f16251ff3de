"""The content-addressed store of capsules: equal questions are answered once, and always with the same bytes.

The key is a hash of everything that decides a capsule, so a row is never out of date, only unused. Rows are immutable:
whoever stores first wins, in whichever process, and everybody reads that row. Callers that ask for the same key at the
same time share one computation; when the one who computes is cancelled or fails, the next one tries.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from agentopt.capsules._types import Capsule
from agentopt.capsules.counting._tokens import TokenBudget, Tokenizer
from agentopt.errors import UserError
from agentopt.store import Store

METHOD_VERSION = 1
"""Part of every key; raised when the same inputs give another capsule."""


class LibraryWarning(RuntimeWarning):
    """A stored capsule could not be read and is made again."""


@dataclass(frozen=True, slots=True)
class LibraryRow:
    """One stored capsule, as a list shows it. `created` is in seconds since the epoch; None: the row is damaged."""

    key: str
    created: float
    tokens: int | None
    original_tokens: int | None
    tokenizer: str | None
    made: str | None
    beginning: str


def capsule_key(
    source: str | Sequence[Mapping[str, Any]],
    budget: TokenBudget,
    *,
    keep: Sequence[str] = (),
    query: str | None = None,
    mode: str = "auto",
    model: str = "",
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> str:
    """Hex sha256 of everything that decides a capsule.

    Args:
        source: the text or the messages.
        budget: limit and tokenizer; files behind a tokenizer count by their size and time.
        keep: the user's patterns.
        query: what the reader will be asked.
        mode: how it is made.
        model: name of the rewriting model, or of the trained capsulator.
        options: whatever else decides (JSON values).
        seed: of every draw.
    """
    parts = {
        "version": METHOD_VERSION,
        "source": source if isinstance(source, str) else list(source),
        "limit": budget.limit,
        "tokenizer": _tokenizer_id(budget.tokenizer),
        "keep": list(keep),
        "query": query,
        "mode": mode,
        "model": model,
        "options": dict(options or {}),
        "seed": seed,
    }
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _tokenizer_id(tokenizer: str | Path | Tokenizer) -> str:
    name = str(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer.name
    path = Path(name)
    files = [path / "tokenizer.json", path / "tokenizer_config.json"] if path.is_dir() else [path]
    for file in files:
        try:
            state = file.stat()
        except (OSError, ValueError):
            continue
        if file.is_file():
            name += f"|{file.name}:{state.st_size}:{state.st_mtime_ns}"
    return name


class Library:
    """Capsules by key. Safe to use from several threads, event loops and processes at once.

    Args:
        store: an open store, or the path of one.
    """

    def __init__(self, store: Store | str | Path) -> None:
        self.store = Store.open(store) if isinstance(store, str | Path) else store
        self._lock = threading.Lock()
        self._flights: dict[str, Future[Capsule | None]] = {}

    def get(self, key: str) -> Capsule | None:
        """The capsule with this key; None when there is none, or (with a warning) when its row is damaged."""
        return self._look(key)[0]

    def put(self, key: str, capsule: Capsule) -> Capsule:
        """Store a capsule and return the one that the key stands for: an earlier one stays."""
        found, damaged = self._look(key, quiet=True)
        if found is not None:
            return found
        self.store.put_capsule(key, {"capsule": capsule.to_dict()}, replace=damaged)
        return self._look(key, quiet=True)[0] or capsule

    async def once(self, key: str, make: Callable[[], Awaitable[Capsule]]) -> Capsule:
        """The stored capsule, or `make()`, which runs once however many ask for the key at the same time."""
        while True:
            found = self.get(key)
            if found is not None:
                return found
            leader, flight = self._join(key)
            if not leader:
                capsule = await asyncio.shield(asyncio.wrap_future(flight))
                if capsule is not None:
                    return capsule
                continue
            done: Capsule | None = None
            try:
                done = self._look(key, quiet=True)[0] or self.put(key, await make())
                return done
            finally:  # None after a failure or a cancellation: those who wait try themselves
                self._land(key, done)

    def rows(self) -> list[LibraryRow]:
        """All stored capsules, oldest first; for `agentopt capsule ls`."""
        return [self._row(key, created) for key, created in self.store.capsule_keys() if not key.startswith("cap:")]

    def find(self, prefix: str) -> tuple[str, Capsule]:
        """The capsule whose key begins with `prefix`.

        Raises:
            UserError: none or several do, or its row is damaged.
        """
        keys = [key for key, _ in self.store.capsule_keys(prefix) if not key.startswith("cap:")]
        if len(keys) != 1:
            found = "no capsule" if not keys else f"{len(keys)} capsules"
            raise UserError(
                f"capsule {prefix!r}: {found} in {self.store.path} with such a key, expected one; give more of the key."
            )
        capsule = self._look(keys[0], quiet=True)[0]
        if capsule is None:
            raise UserError(f"capsule {keys[0][:12]}: its row in {self.store.path} is damaged; make it again.")
        return keys[0], capsule

    def _row(self, key: str, created: float) -> LibraryRow:
        capsule = self._look(key, quiet=True)[0]
        if capsule is None:
            return LibraryRow(key, created, None, None, None, None, "")
        start = " ".join(capsule.text[:200].split())[:60]
        return LibraryRow(key, created, capsule.tokens, capsule.original_tokens, capsule.tokenizer, capsule.made, start)

    def _look(self, key: str, *, quiet: bool = False) -> tuple[Capsule | None, bool]:
        """The capsule, and whether there is a row that cannot be read."""
        try:
            row = self.store.get_capsule(key)
            return (None if row is None else _capsule(row)), False
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if not quiet:
                warnings.warn(
                    f"stored capsule {key[:12]} is unreadable ({type(error).__name__}: {error}); it is made again",
                    LibraryWarning,
                    stacklevel=3,
                )
            return None, True

    def _join(self, key: str) -> tuple[bool, Future[Capsule | None]]:
        with self._lock:
            flight = self._flights.get(key)
            if flight is not None:
                return False, flight
            flight = self._flights[key] = Future()
            return True, flight

    def _land(self, key: str, capsule: Capsule | None) -> None:
        with self._lock:
            flight = self._flights.pop(key)
        flight.set_result(capsule)


def _capsule(row: Any) -> Capsule:
    capsule = Capsule.from_dict(cast("dict[str, Any]", row["capsule"]))
    texts: list[Any] = [capsule.text, capsule.original, capsule.tokenizer]
    numbers: list[Any] = [capsule.tokens, capsule.original_tokens, capsule.limit]
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(number, int) for number in numbers):
        raise TypeError("text or tokens of another type")
    return capsule
