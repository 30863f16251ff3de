"""The tokenizers a name, a path or a file can stand for; nothing is loaded before it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agentopt.capsules._tokens import Tokenizer


class Bytes:
    """UTF-8 bytes: never fewer than the tokens of a byte-level BPE, so a budget in bytes is a sound bound."""

    name = "bytes"
    exact = True

    def count(self, text: str) -> int:
        """Length in UTF-8; a lone surrogate counts as three bytes."""
        return len(text.encode("utf-8", "surrogatepass"))

    def count_many(self, texts: Sequence[str]) -> list[int]:
        """`count` of each."""
        return [self.count(text) for text in texts]


def resolve_tokenizer(name: str | Path | Tokenizer) -> Tokenizer:
    """The tokenizer that `name` stands for."""
    if isinstance(name, Tokenizer):
        return name
    return Bytes()
