"""Tokens to text as they come: whole characters only, and nothing of a stop string.

What may be the beginning of a stop string, or a character whose bytes are not all there, is held back until it is known
what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "\ufffd"
_CONTEXT = 6


class Text:
    """The text of one reply.

    Args:
        tokenizer: of the model.
        stops: strings that end the reply; they are not part of it.
        before: tokens that the reply goes on with.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), *, before: Sequence[int] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        # Tokens without a text stay out: after one of them a word would look like the first, and lose its space.
        self._silent = frozenset(tokenizer.all_special_ids)
        self._ids = [token for token in before[-_CONTEXT:] if token not in self._silent]
        self._start = 0
        """From here on tokens are decoded together: a token's text can depend on the one before it."""
        self._known = len(self._ids)
        """Tokens whose text is in `_held` or was given out."""
        self._held = ""
        self.stopped: str | None = None
        """The stop string that came."""

    def add(self, token: int) -> str:
        """The text that is certain now."""
        if token in self._silent:
            return ""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._known])
        now = self._decode(self._ids[self._start :])
        if now.endswith(_BROKEN) and len(self._ids) - self._known < 8:
            return ""
        self._start, self._known = self._known, len(self._ids)
        self._held += now[len(before) :]
        return self._certain()

    def end(self) -> str:
        """What was held back, once nothing more comes."""
        if self.stopped is not None:
            return ""
        before = self._decode(self._ids[self._start : self._known])
        self._held += self._decode(self._ids[self._start :])[len(before) :]
        self._known = len(self._ids)
        given = self._certain()
        given, self._held = (given + self._held, "") if self.stopped is None else (given, "")
        return given

    def _certain(self) -> str:
        places = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
        if places:
            place, self.stopped = min(places)
            given, self._held = self._held[:place], ""
            return given
        kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        place = len(self._held) - kept
        given, self._held = self._held[:place], self._held[place:]
        return given

    def _decode(self, ids: Sequence[int]) -> str:
        found: Any = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(found)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that may begin the stop string."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
