"""Events of a stream that are the same but for one text: read without parsing each as JSON.

An engine sends a reply of a thousand tokens as a thousand JSON objects that differ in a few letters. From one of them,
what stands before and after its text is kept; whether only that text depends on what stands there is tried out, with
the reader of all events and another text in its place. An event with the same beginning and end says then just what
its JSON string holds. Whatever differs in anything else is left to the reader.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

_scan: Callable[[str, int], tuple[str, int]] = json.JSONDecoder().raw_decode
"""(text, place of a quote) -> (the JSON string there, the place behind its last quote)."""
_PLACE = re.compile(r'"(?:content|text)": ?"')
_PROBE = "\u2042probe\u2042"
_FREE = 4
_HITS = 4
"""Events that must have been read by one stencil before another is made, beyond the first few: streams that never
repeat themselves cost no more than without any of this."""


class Stencil:
    """What the events of one stream have in common. Give `says` each event, and `learn` those that it did not read."""

    __slots__ = ("_head", "_hits", "_made", "_probe", "_tail", "choice")

    def __init__(self, probe: Callable[[str], tuple[int, str] | None]) -> None:
        """`probe`: the number of the choice and the text of an event that says nothing else; None for all others."""
        self._probe = probe
        self._head = self._tail = ""
        self._made = self._hits = 0
        self.choice = 0
        """Whose texts these are."""

    def says(self, event: str) -> str | None:
        """The text of an event that differs in it alone; None for an event that has to be read as a whole."""
        head = self._head
        if not head or not event.startswith(head):
            return None
        try:
            text, end = _scan(event, len(head) - 1)
        except ValueError:
            return None
        if event[end:] != self._tail:
            return None
        self._hits += 1
        return text

    def learn(self, event: str) -> None:
        """Look whether events such as this one differ in one text alone."""
        if self._made >= _FREE + self._hits // _HITS:
            return
        found = _PLACE.search(event)
        if found is None:
            return
        self._made += 1
        head = event[: found.end()]
        try:
            _, end = _scan(event, len(head) - 1)
        except ValueError:
            return
        tail = event[end:]
        probed = self._probe(f'{head}{_PROBE}"{tail}')
        if probed is not None and probed[1] == _PROBE:
            self._head, self._tail, self.choice = head, tail, probed[0]
