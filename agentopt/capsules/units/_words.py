"""Lists of words, written as text."""

from __future__ import annotations


def words(text: str) -> frozenset[str]:
    """The words of a list, separated by white space."""
    return frozenset(text.split())
