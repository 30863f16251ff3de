"""Edits that lose nothing: white space that says nothing, white space of JSON, and exact repeats.

Never inside code, tables, quotes, XML or JSON strings, nor inside a keep span. The result is never longer, and giving
it in again changes nothing.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence

from agentopt.capsules._types import Span
from agentopt.capsules.units._demonstrations import find_demonstrations, find_turns
from agentopt.capsules.units._intact import find_intact
from agentopt.capsules.units._keep import find_keep
from agentopt.capsules.units._lines import Element, read_lines

_ROUNDS = 12
_LONG = 40
"""Characters from which a repeated line or paragraph is no coincidence."""
_LONG_ELSEWHERE = 200
"""The same where a heading stands between the copies: a short one may mean something else there."""
_RUN = re.compile(r"(?<=\S) {2,}(?=\S)")
_COLUMNS = re.compile(r"\S {3,}\S")
_QUOTED = re.compile(
    r"""`[^`\n]+`|"[^"\n]*"|“[^“”\n]*”|«[^«»\n]*»|「[^「」\n]*」|『[^『』\n]*』|‘[^‘’\n]*’|《[^《》\n]*》|(?<!\w)'[^'\n]*'|<[^<>\n]*>|[\[{(][^\n]*[\]})]"""
)
_JSON_PART = re.compile(r'"(?:[^"\\]|\\.)*+"|\s+|[^"\s]+', re.DOTALL)
_VERBATIM = ("quote", "code", "xml")
"""Kinds of intact spans whose white space is theirs. That of JSON says nothing outside its strings."""
_PROSE = ("text", "label")
_EDITED = ("text", "label", "item", "heading")

_TRAILING, _BLANK, _SPACES, _JSON, _REPEATS = _ORDER = (
    "trailing white space",
    "blank lines",
    "runs of spaces",
    "JSON white space",
    "exact repeats",
)


def lossless(text: str, keep: Sequence[str] = ()) -> tuple[str, list[str]]:
    """`text` after the edits, and the names of those that changed something.

    Args:
        text: Any text.
        keep: Regular expressions; what they match is left alone.
    """
    names: set[str] = set()
    for _ in range(_ROUNDS):
        editor = _Editor(text, find_keep(text, keep))
        edited = editor.edit()
        if edited == text:
            break
        names |= editor.names
        text = edited
    return text, [name for name in _ORDER if name in names]


class _Editor:
    """One round over the elements of a text."""

    def __init__(self, text: str, spans: Sequence[Span]) -> None:
        self.text = text
        self.spans = spans
        self.starts = [span.start for span in spans]
        self.verbatim: list[Span] | None = None
        self.names: set[str] = set()
        self.elements = [element for element in read_lines(text) if element.kind != "blank"]

    def edit(self) -> str:
        """The text after one round."""
        text, elements = self.text, self.elements
        if not elements:
            return text
        gone = self._repeats()
        out: list[str] = []
        at = 0
        last: Element | None = None
        for place, element in enumerate(elements):
            if place in gone:
                continue
            # After a repeat was left out, the white space before it stands for the white space on both sides.
            begin = at if place == 0 or place - 1 not in gone else elements[place - 1].end
            out.append(self._gap(begin, element, last))
            out.append(self._inside(place, element))
            at, last = element.end, element
        out.append(self._tail(at, elements[-1].end, last))
        return "".join(out)

    def _held(self, start: int, end: int) -> bool:
        """Whether a keep span reaches into the stretch."""
        at = bisect_right(self.starts, start) - 1
        if at >= 0 and self.spans[at].end > start:
            return True
        return at + 1 < len(self.spans) and self.spans[at + 1].start < end

    def _is_verbatim(self, start: int, end: int) -> bool:
        """Whether the stretch of white space stands within a quote, code or XML, wherever on its line that begins."""
        if self.verbatim is None:
            self.verbatim = [span for span in find_intact(self.text) if span.kind in _VERBATIM]
        at = bisect_right(self.verbatim, start, key=lambda span: span.start) - 1
        return at >= 0 and end <= self.verbatim[at].end

    def _gap(self, begin: int, element: Element, last: Element | None) -> str:
        """White space between two elements: at most one blank line, and the indentation of what follows."""
        gap = self.text[begin : element.start]
        newline = gap.rfind("\n")
        if newline < 0 or self._held(begin, element.start):
            return gap
        indent = gap[newline + 1 :]
        if last is None:
            self.names.add(_BLANK)
            return indent
        count = gap.count("\n")
        if count > 2 and last.kind == "text" and element.kind == "text" and min(last.level, element.level) >= 4:
            return gap  # blank lines within indented code
        edited = "\n" * min(count, 2) + indent
        if len(edited) < len(gap) and self._is_verbatim(begin, element.start):
            return gap
        if len(edited) < len(gap):
            self.names.add(_BLANK if count > 2 else _TRAILING)
        return edited

    def _tail(self, begin: int, end: int, last: Element | None) -> str:
        tail = self.text[end:]
        if last is None or self._held(begin, len(self.text)) or last.kind == "code":
            return tail
        edited = "\n" if "\n" in tail else ""
        if len(edited) < len(tail):
            self.names.add(_TRAILING)
        return edited

    def _inside(self, place: int, element: Element) -> str:
        """The element's own characters, edited where its kind allows."""
        content = self.text[element.start : element.end]
        if element.kind == "json":
            return self._json(element, content)
        if element.kind not in _EDITED or "  " not in content or (element.level >= 4 and element.kind == "text"):
            return content
        if self._is_aligned(place, content):
            return content
        quoted = [match.span() for match in _QUOTED.finditer(content)]

        def collapse(run: re.Match[str]) -> str:
            if any(start < run.start() and run.end() < end for start, end in quoted):
                return run[0]
            where = element.start + run.start(), element.start + run.end()
            if self._held(*where) or self._is_verbatim(*where):
                return run[0]
            self.names.add(_SPACES)
            return " "

        return _RUN.sub(collapse, content)

    def _is_aligned(self, place: int, content: str) -> bool:
        """Whether gaps are columns: two wide ones in this line, or one in the line before or after it."""
        if len(_COLUMNS.findall(content)) > 1:
            return True
        around = self.elements[max(0, place - 1) : place] + self.elements[place + 1 : place + 2]
        return any(_COLUMNS.search(self.text, other.start, other.end) for other in around)

    def _json(self, element: Element, content: str) -> str:
        if self._held(element.start, element.end) or not _is_json(content):
            return content
        edited = "".join(part for part in _JSON_PART.findall(content) if not part.isspace())
        if len(edited) < len(content):
            self.names.add(_JSON)
        return edited

    # --- repeats -----------------------------------------------------------------------------------------------------

    def _repeats(self) -> set[int]:
        """Elements that say again, word for word, what an earlier paragraph says."""
        elements = self.elements
        fixed = find_turns(self.text, elements)
        for one in find_demonstrations(self.text, elements):
            fixed.update(range(one.first, one.last))
        gone: set[int] = set()
        seen: dict[str, int] = {}
        section, first = 0, 0
        while first < len(elements):
            kind = elements[first].kind
            last = self._paragraph_end(first) if kind in _PROSE else first + 1
            if kind in ("heading", "open", "close"):
                section += 1
            elif kind in _PROSE and fixed.isdisjoint(range(first, last)) and self._repeated(first, last, section, seen):
                gone.update(range(first, last))
            first = last
        if gone:
            self.names.add(_REPEATS)
        return gone

    def _paragraph_end(self, first: int) -> int:
        """The element after the paragraph that begins at `first`."""
        last = first + 1
        while last < len(self.elements) and self.elements[last].kind in _PROSE and self._breaks(last) == 1:
            last += 1
        return last

    def _breaks(self, place: int) -> int:
        """Line ends before an element; many at either end of the text."""
        if place in (0, len(self.elements)):
            return 9
        return self.text.count("\n", self.elements[place - 1].end, self.elements[place].start)

    def _repeated(self, first: int, last: int, section: int, seen: dict[str, int]) -> bool:
        """Whether the paragraph stands alone, is long enough, and was there before in a place that means the same."""
        start, end = self.elements[first].start, self.elements[last - 1].end
        paragraph = self.text[start:end]
        if len(paragraph) < _LONG or paragraph[-1] in ":：" or self._held(start, end):
            return False
        if self._breaks(first) < 2 or self._breaks(last) < 2:
            return False
        known = seen.get(paragraph)
        if known is None:
            seen[paragraph] = section
            return False
        return known == section or len(paragraph) >= _LONG_ELSEWHERE


def _is_json(content: str) -> bool:
    """Whether the content is one JSON value of ordinary depth."""
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True
