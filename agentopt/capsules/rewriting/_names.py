"""Names that a text has and its source has not.

A capital letter inside a sentence is a name; at the beginning of a sentence, line or cell it may be any word, so there
it counts only as the subject of what follows ("Alice approves ...").
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from agentopt.capsules.rewriting._clauses import stem, stems

_TOKEN = re.compile(r"[^\W\d_](?:[\w'’&-]*\w)?")
_OPENS = re.compile(r"(?:^|[\n.!?:;|*#>•\"“”'‘(\[{/=→—–-])[\s\"“”'‘*_(\[]*$")
_FOLLOWS = re.compile(
    r"[ \t]+(?:[A-Z]|(?:is|was|are|were|has|had|will|must|can|may|should|and|or|of|in|at|from)\b|[a-z]{3,}(?:s|ed)\b)"
)
_NEAR = 200
_NO_SUBJECTS = (
    "the a an this that these those it its he she they we you i his her their our your my if when while where unless "
    "until after before for from in on at by to with without as and or but not no never none all any each every some "
    "only also then there here what who which how why do does did is are was were be has have had can may must will "
    "would should could use keep give see note task goal input output answer question reply return user users system "
    "assistant agent model rule rules format step steps role example examples summary context tools tool yes always "
    "nothing anything everything one two three four five six seven eight nine ten both more most less least other "
    "others otherwise avoid ask check make take write read say include exclude ensure per via"
)
_NO_SUBJECT = frozenset(_NO_SUBJECTS.split())


class Known:
    """The words of a source, as names are looked up in them."""

    def __init__(self, text: str) -> None:
        tokens = _TOKEN.findall(text)
        self._words = {token.lower() for token in tokens}
        self._stems = set(stems(text)) | {stem(word) for word in self._words}
        self._sorted: Sequence[str] = sorted(self._words)
        self._initials = "".join(token[0].lower() for token in tokens)
        self._capitals = {token for token in tokens if token.isupper() and len(token) > 1}

    def __contains__(self, token: str) -> bool:
        word = token.lower()
        if word in self._words or stem(word) in self._stems:
            return True
        parts = re.split(r"[-&'’]", word)
        if len(parts) > 1 and all(not part or part in self._words or stem(part) in self._stems for part in parts):
            return True
        return self._abbreviates(word) or (token.isupper() and len(token) > 1 and word in self._initials)

    def _abbreviates(self, word: str) -> bool:
        """Whether a longer word of the source begins with it."""
        place = bisect_left(self._sorted, word)
        return len(word) > 2 and place < len(self._sorted) and self._sorted[place].startswith(word)


def invented(text: str, known: Known) -> Iterator[str]:
    """The names in `text` that are not in the source."""
    tokens = [match for match in _TOKEN.finditer(text) if match[0][0].isupper()]
    inside = {match[0] for match in tokens if not _opens(text, match.start())}
    for match in tokens:
        token = match[0]
        if token in known or token.lower() in _NO_SUBJECT or (len(token) < 3 and not token.isupper()) or token == "I":
            continue
        if token in inside:
            if not _titled(text, match):
                yield token
        elif _FOLLOWS.match(text, match.end()):
            yield token


def _opens(text: str, start: int) -> bool:
    return start == 0 or _OPENS.search(text[max(0, start - 12) : start]) is not None


def _titled(text: str, match: re.Match[str]) -> bool:
    """Whether the word stands in a heading or label in which every longer word has a capital."""
    low, high = max(0, match.start() - _NEAR), min(len(text), match.end() + _NEAR)
    start = max(low, text.rfind("\n", low, match.start()) + 1)
    end = text.find("\n", match.end(), high)
    line = text[start : end if end >= 0 else high]
    colon = line.find(":", match.end() - start)
    label = line[:colon] if colon >= 0 else line
    words = [word for word in _TOKEN.findall(label) if len(word) > 3]
    return len(label) < 60 and not label.rstrip().endswith(".") and all(word[0].isupper() for word in words)
