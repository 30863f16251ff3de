"""Originals behind handles: what a capsule left out can be read back, whole or the part that fits a question.

A handle is `cap:` and hex digits of the text's own hash, so the same text has the same handle in every process, and an
agent that was shown a handle can ask for the text with an ordinary tool.
"""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentopt import graph
from agentopt.capsules._errors import BudgetInfeasible
from agentopt.capsules.counting._tokens import TokenBudget, Tokenizer
from agentopt.errors import UserError
from agentopt.store import Store

_DIGITS = 16
_HANDLE = re.compile(rf"cap:([0-9a-f]{{{_DIGITS},64}})", re.IGNORECASE)


class UnknownHandle(UserError):
    """No original has this handle; the text is fit to be shown to the model that asked."""


def handle_of(text: str, digits: int = _DIGITS) -> str:
    """The handle of a text: a pure function of its characters."""
    return f"cap:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:digits]}"


class Originals:
    """Texts by handle, in a store or in memory. Safe to use from any thread.

    Args:
        store: an open store, or the path of one; None keeps the texts in memory, for as long as this object lives.
        tokenizer: counts for `max_tokens` of `get`.
    """

    def __init__(self, store: Store | str | Path | None = None, *, tokenizer: str | Path | Tokenizer = "o200k_base"):
        self.tokenizer = tokenizer
        self._store = Store.open(store) if isinstance(store, str | Path) else store
        self._texts: dict[str, str] = {}
        self._lock = threading.Lock()

    def put(self, text: str) -> str:
        """Keep a text and return its handle; a text that is here already keeps the one it has."""
        for digits in range(_DIGITS, 65, 8):  # more digits only where another text has the shorter handle
            handle = handle_of(text, digits)
            with self._lock:
                found = self._text(handle)
                if found is None:
                    self._keep(handle, text)
                    return handle
            if found == text:
                return handle
        raise UserError(f"two texts have the hash {handle_of(text, 64)}.")

    def get(self, handle: str, query: str | None = None, max_tokens: int | None = None) -> str:
        """The original, or of a longer one the units within `max_tokens` that fit `query` best.

        Raises:
            UnknownHandle: no original has this handle.
            BudgetInfeasible: not even the smallest part of it fits.
        """
        match = _HANDLE.search(handle)
        text = None if match is None else self._text(match[0].lower())
        if text is None:
            raise UnknownHandle(
                f"there is no original under {handle!r:.100}; a handle is cap: and {_DIGITS} hex digits, as shown "
                "where something was left out."
            )
        if max_tokens is None:
            return text
        meter = TokenBudget(max_tokens, self.tokenizer).meter()
        if meter.fits([text]):
            return text
        from agentopt.capsules.extraction._extract import extract
        from agentopt.capsules.units._units import parse

        document = parse(text)
        # Somebody reads it here: nothing of it must stay because a program depends on it.
        units = tuple(replace(unit, keep=False) for unit in document.units)
        return extract([replace(document, units=units, keep=())], meter, query=query or None).texts[0]

    def in_memory(self) -> list[str]:
        """The texts that live only as long as this object; none where a store has them."""
        return list(self._texts.values())

    def __contains__(self, handle: str) -> bool:
        return self._text(handle) is not None

    def _text(self, handle: str) -> str | None:
        if self._store is None:
            return self._texts.get(handle)
        try:
            row: Any = self._store.get_capsule(handle)
            text = None if row is None else row["original"]
        except (ValueError, KeyError, TypeError):
            return None  # a damaged row: whoever puts the text again repairs it
        return text if isinstance(text, str) and handle == handle_of(text, len(handle) - 4) else None

    def _keep(self, handle: str, text: str) -> None:
        if self._store is None:
            self._texts[handle] = text
        else:
            self._store.put_capsule(handle, {"original": text}, replace=True)


def retrieval_tool(
    originals: Originals, *, max_tokens: int = 1000, name: str = "read_original"
) -> graph.Tool[..., str]:
    """A tool by which an agent reads back what was left out of its messages.

    Args:
        originals: where the texts are.
        max_tokens: the longest answer.
        name: the tool's name.
    """

    @graph.tool(name=name)
    def read_original(handle: str, query: str = "") -> str:
        """Read text that was left out of the conversation.

        `handle` is what was shown in its place (cap:...). With `query`, only the part that answers it.
        """
        try:
            return originals.get(handle, query or None, max_tokens)
        except UnknownHandle as error:
            return f"error: {error}"
        except BudgetInfeasible as error:
            return (
                f"error: the smallest part of it has {error.minimum:,} tokens, and {max_tokens:,} may be read at once."
            )

    return read_original
