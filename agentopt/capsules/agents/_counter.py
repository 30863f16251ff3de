"""Counting an agent's messages again and again: each text once, whatever it is part of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from agentopt.capsules.agents._steps import extra_tokens, text_of
from agentopt.capsules.counting._templates import chatml, count_chat, openai_texts
from agentopt.capsules.counting._token_tiktoken import Tiktoken
from agentopt.capsules.counting._tokenizers import resolve_tokenizer
from agentopt.capsules.counting._tokens import TokenBudget, Tokenizer

Key = TypeVar("Key")
Value = TypeVar("Value")
_MOST_ENTRIES, _MOST_CHARACTERS = 20_000, 1 << 25
_FRAME = 4  # tokens that a message takes beside its contents, where only an estimate is needed


class Memo(Generic[Key, Value]):
    """A dict that forgets everything when it has grown large. Safe to use from several threads for pure values."""

    def __init__(self) -> None:
        self._values: dict[Key, Value] = {}
        self._characters = 0

    def get(self, key: Key) -> Value | None:
        """What is remembered."""
        return self._values.get(key)

    def put(self, key: Key, value: Value, characters: int) -> Value:
        """Remember a value that holds on to this many characters; returns it."""
        if len(self._values) >= _MOST_ENTRIES or self._characters > _MOST_CHARACTERS:
            self._values.clear()
            self._characters = 0
        self._values[key] = value
        self._characters += characters
        return value


class Counter:
    """Counts messages under a budget. Safe to use from several threads; what it remembers never changes a count.

    Args:
        budget: limit and tokenizer.
        tools: definitions that are sent along and count too.
        more: any other text that is sent along (a schema).
    """

    def __init__(self, budget: TokenBudget, tools: Sequence[Mapping[str, Any]] = (), more: str = "") -> None:
        self.tokenizer: Tokenizer = _Remembering(resolve_tokenizer(budget.tokenizer))
        self.limit = budget.limit
        self._sizes = Memo[int, tuple[Mapping[str, Any], int]]()
        self._tools = [dict(tool) for tool in tools] or None
        self._more = self.tokenizer.count(more) if more else 0
        self.base = self._more + (self.tokenizer.count(json.dumps(self._tools, default=str)) if self._tools else 0)
        """About what is sent before the first message."""

    def total(self, messages: Sequence[Mapping[str, Any]]) -> int:
        """Tokens of the whole as it is sent (what `TokenBudget.meter` counts)."""
        return self._more + count_chat(self.tokenizer, messages, self._tools)

    def size(self, message: Mapping[str, Any]) -> int:
        """About how many tokens one message takes."""
        found = self._sizes.get(id(message))
        if found is not None and found[0] is message:
            return found[1]
        text, rest = text_of(message), extra_tokens(message)
        size = self.tokenizer.count(text) + (self.tokenizer.count(rest) if rest else 0) + _FRAME
        # The message is held, so its id stays its own.
        return self._sizes.put(id(message), (message, size), len(text) + len(rest))[1]


class _Remembering:
    """A tokenizer that counts each text once."""

    def __init__(self, inner: Tokenizer) -> None:
        self.inner = inner
        self.name = inner.name
        self.exact = inner.exact
        self._counts = Memo[str, int]()

    def count(self, text: str) -> int:
        found = self._counts.get(text)
        return self._counts.put(text, self.inner.count(text), len(text)) if found is None else found

    def count_many(self, texts: Sequence[str]) -> list[int]:
        return [self.count(text) for text in texts]

    def count_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> int:
        if isinstance(self.inner, Tiktoken):  # counts its texts one by one, so each can be remembered
            texts, overhead = openai_texts(messages, tools)
            return sum(self.count_many(texts)) + overhead
        own = getattr(self.inner, "count_chat", None)
        return self.inner.count(chatml(messages, tools)) if own is None else own(messages, tools)
