"""Where a text may be cut without breaking what a reader sees as one character."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable
from typing import Any, cast

_JOINERS = "\u200d\u200c"
_WINDOW = 256


def safe_cut(text: str, start: int, limit: int) -> int:
    """The greatest offset in (start, limit] between two graphemes; `limit` when a grapheme is absurdly long."""
    if limit >= len(text):
        return len(text)
    if text[limit - 1 : limit + 1].isascii() and text[limit] != "\n":
        return limit
    floor = max(start, limit - _WINDOW)
    at = _last_boundary(text, floor, limit)
    return at if at > start else limit


def boundaries(text: str) -> list[int]:
    """All offsets between two graphemes of `text`, both ends included."""
    pattern = _pattern()
    if pattern is not None:
        return _by_pattern(pattern, text)
    return [0, *(at for at in range(1, len(text)) if _between(text, at)), *([len(text)] if text else [])]


def _by_pattern(pattern: Any, text: str) -> list[int]:
    """Window by window: a long run of flags takes a time that grows with the square of what is looked at."""
    found, at, width = [0], 0, _WINDOW
    while at < len(text):
        ends = [at + match.end() for match in pattern.finditer(text[at : at + width])]
        if at + width < len(text):
            ends.pop()  # it may go on after the window
        width = _WINDOW if ends else 2 * width
        found += ends
        at = found[-1]
    return found


def _last_boundary(text: str, floor: int, limit: int) -> int:
    pattern = _pattern()
    if pattern is None:
        for at in range(limit, floor, -1):
            if _between(text, at):
                return at
        return floor
    # A grapheme may begin before the floor: a little of what comes before is read too, and of what follows.
    base = max(0, floor - _WINDOW)
    last = base
    for match in pattern.finditer(text[base : limit + _WINDOW]):
        if base + match.end() > limit:
            break
        last = base + match.end()
    return last


@functools.cache
def _pattern() -> Any:
    try:
        import regex
    except ImportError:
        return None
    return cast("Callable[[str], Any]", regex.compile)(r"\X")


def _between(text: str, at: int) -> bool:
    """The main rules of grapheme clusters: marks, joiners, modifiers, pairs of flags, Hangul and line ends."""
    before, after = text[at - 1], text[at]
    if before == "\r" and after == "\n":
        return False
    if after in _JOINERS or before == "\u200d" or _extends(after):
        return False
    if _is_flag(before) and _is_flag(after):
        run = at
        while run > max(0, at - 500) and _is_flag(text[run - 1]):
            run -= 1
        return (at - run) % 2 == 0
    return not (_hangul(before) and "\u1160" <= after <= "\u11ff")


def _extends(character: str) -> bool:
    if character < "\u0300":
        return False
    return unicodedata.category(character) in ("Mn", "Me", "Mc") or "\U0001f3fb" <= character <= "\U0001f3ff"


def _is_flag(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"


def _hangul(character: str) -> bool:
    return "\u1100" <= character <= "\u11ff" or "\uac00" <= character <= "\ud7a3"
