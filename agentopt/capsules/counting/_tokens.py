"""Counting tokens: what a tokenizer is here, the budget a person writes, and the meter that counts what is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from agentopt.errors import UserError


@runtime_checkable
class Tokenizer(Protocol):
    """Counts tokens; a pure function of the text."""

    name: str
    exact: bool
    """False when the count is an upper bound or an estimate of another model's tokenizer."""

    def count(self, text: str) -> int:
        """Tokens of `text` as the reader would see it (no special tokens added). Any string, lone surrogates too."""
        ...

    def count_many(self, texts: Sequence[str]) -> list[int]:
        """`count` of each."""
        ...


@dataclass(frozen=True)
class TokenBudget:
    """A hard limit: at most `limit` tokens of `tokenizer`.

    `tokenizer`: a tiktoken encoding (`"o200k_base"`), an OpenAI model name, the path of a `tokenizer.json`, a model
    folder or a GGUF file, `"embedded"`, the address of a /tokenize endpoint, `"bytes"` (UTF-8 bytes: a sound bound for
    every byte-level BPE), `"words"`, or any `Tokenizer`.
    """

    limit: int
    tokenizer: str | Path | Tokenizer = "o200k_base"

    def __post_init__(self) -> None:
        if isinstance(self.limit, bool) or not isinstance(self.limit, int) or self.limit < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UserError(f"budget: found {self.limit!r} tokens, expected a whole number of at least 1.")

    def meter(
        self, messages: Sequence[Mapping[str, Any]] | None = None, *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> Meter:
        """What counts against this budget: a plain text, or the chat `messages` in the reader's template.

        Args:
            messages: chat messages in OpenAI form; calls, names and ids count too, images do not.
            tools: definitions of tools that are sent along and count too.

        Raises:
            UserError: no such tokenizer.
        """
        from agentopt.capsules.counting._tokenizers import resolve_tokenizer

        return Meter(
            self.limit,
            resolve_tokenizer(self.tokenizer),
            None if messages is None else tuple(dict(message) for message in messages),
            None if tools is None else tuple(dict(tool) for tool in tools),
        )


@dataclass(frozen=True)
class Meter:
    """A limit and the way to count against it."""

    limit: int
    tokenizer: Tokenizer
    messages: tuple[dict[str, Any], ...] | None = None
    """With messages: what is counted is these messages, their contents replaced by the parts."""

    tools: tuple[dict[str, Any], ...] | None = None

    def units(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text on its own: what selection adds up (an estimate of the total)."""
        return self.tokenizer.count_many(texts)

    def total(self, parts: Sequence[str]) -> int:
        """Tokens of the whole as it is sent: the exact count that the limit bounds.

        With messages, `parts` are the texts of the messages in order (`_parts.parts_of`), and what an emptied message
        leaves behind is counted as it will be sent.
        """
        if self.messages is None:
            return self.tokenizer.count("".join(parts))
        from agentopt.capsules.counting._parts import with_texts
        from agentopt.capsules.counting._templates import count_chat

        return count_chat(self.tokenizer, with_texts(self.messages, parts), self.tools)

    def fits(self, parts: Sequence[str]) -> bool:
        """Whether the whole is within the limit."""
        return self.total(parts) <= self.limit
