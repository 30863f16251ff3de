"""The lines of a text with what each begins with; fenced code, JSON and XML blocks come as one element.

Everything here is one pass: a bracket, a fence or a tag is looked at once, however it is nested and whether or not it
is ever closed.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# The line end of old systems; replaced one for one, so that offsets stay. The separators of Unicode are left: they may
# stand in a JSON string.
_OTHER_ENDS = re.compile("\r(?!\n)")

_LINE = re.compile(
    r"""(?P<indent>[^\S\n]*)
    (?:(?P<blank>(?=\n|\Z))
      |(?P<fence>`{3,}(?=[^`\n]*(?:\n|\Z))|~{3,})
      |(?P<heading>\#{1,6}(?=[^\S\n]+\S))
      |(?P<rule>(?:-{3,}|={3,}|\*{3,}|_{3,})(?=[^\S\n]*(?:\n|\Z)))
      |(?P<log>\[?\d{4}-\d\d-\d\d[T ]\d\d:\d\d|\[?\d\d:\d\d:\d\d\b
        |\[?(?:INFO|DEBUG|WARN|WARNING|ERROR|TRACE|FATAL|CRITICAL)\b(?=[]:\s])|[A-Z][a-z]{2}\ [\ \d]\d\ \d\d:\d\d:\d\d)
      |(?P<item>(?:[-*+•◦▪‣–—·]|\(?(?:\d{1,4}|[a-zA-Z]|[ivx]{1,5})[.)])(?=[^\S\n]+\S))
      |(?P<table>\|)
      |(?P<json>[\[{])
      |(?P<xml><(?=[A-Za-z_]))
      |(?P<label>(?:\*\*|<)?[^\W\d_][\w /'\#-]{0,40}(?:\*\*)?[:：](?=\s|\Z|\*\*|[^\x00-\x7f])
        |<\|[\w-]{1,30}\|>|\[/?INST\]|(?:Example|EXAMPLE)\ \d+\b)
    )?[^\n]*""",
    re.VERBOSE,
)
_BLANK_LINES = re.compile(r"(?:[^\S\n]*+\n)*+")
_JSON_TOKEN = re.compile(r'"(?:[^"\\\n]|\\[^\n])*+"?|[\[\]{}]')
_TAG = re.compile(r"<(/?)([A-Za-z_][\w:.-]*)([^<>]*)>")
# A table of data without a leading bar: at least two bars with something between them.
_BARS = re.compile(r"[^|\n]+\|[^|\n]+\|[^\n]*")

DEMONSTRATION_TAGS = frozenset({"example", "demo", "demonstration", "sample", "shot"})
_VOID = frozenset({"br", "hr", "img", "input", "meta", "link", "area", "base", "col", "wbr"})
# An XML block shorter than this is one unit; a longer one that is mostly prose is a wrapper around its contents.
_SMALL_XML = 300


# No data is nested deeper; what is gets read as text.
_DEEPEST = 10_000


class Element(NamedTuple):
    """A line or a block: `text[start:end]` without white space at either end (empty for blank lines, a run of them)."""

    start: int
    end: int
    kind: str
    level: int
    """Depth of a heading; columns of indentation for everything else."""


def same_length(text: str) -> str:
    """`text` with every kind of line end as one newline, every character in its place."""
    return _OTHER_ENDS.sub("\n", text)


class Brackets:
    """Where the bracket that opens at an offset closes; strings are skipped, a mismatch closes nothing."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._seen: dict[int, int] = {}
        self._upto = 0

    def close(self, opening: int) -> int:
        """Offset after the bracket that closes the one at `opening`; -1 when none does."""
        if opening not in self._seen:
            if opening < self._upto:
                return -1
            self._scan(opening)
        return self._seen.get(opening, -1)

    def _scan(self, opening: int) -> None:
        """From `opening` to where it closes, to a mismatch or to the end; what was passed is not looked at again."""
        text, seen, stack = self._text, self._seen, list[int]()
        at = opening
        for token in _JSON_TOKEN.finditer(text, opening):
            at = token.end()
            first = text[token.start()]
            if first in "[{":
                if len(stack) == _DEEPEST:
                    break
                stack.append(token.start())
                continue
            if first == '"':
                if at - token.start() > 1 and text[at - 1] == '"':
                    continue
                break
            if not stack or (text[stack[-1]] == "[") != (first == "]"):
                break
            seen[stack.pop()] = at
            if not stack:
                break
        else:
            at = len(text)
        self._upto = max(self._upto, at)


class Tags:
    """Where the element of an opening tag ends, for every tag of the text; built when first asked."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._ends: dict[int, tuple[int, int]] | None = None

    def close(self, opening: int) -> tuple[int, int]:
        """Offsets where the closing tag of the tag at `opening` starts and ends; (-1, -1) when there is none."""
        if self._ends is None:
            self._ends = {}
            stacks: dict[str, list[int]] = {}
            for tag in _TAG.finditer(self._text):
                slash, name, rest = tag.groups()
                stack = stacks.setdefault(name, [])
                if not slash:
                    if not rest.endswith("/") and name.lower() not in _VOID:
                        stack.append(tag.start())
                elif stack:
                    self._ends[stack.pop()] = tag.span()
        return self._ends.get(opening, (-1, -1))

    @property
    def spans(self) -> dict[int, tuple[int, int]]:
        """All closed tags: offset of the opening tag, offsets of the closing one."""
        self.close(-1)
        return self._ends or {}


def fence_end(text: str, opening: int) -> int:
    """Offset after the line that closes the fence at `opening`; the end of the text when none does."""
    mark = text[opening]
    length = opening
    while length < len(text) and text[length] == mark:
        length += 1
    line = text.find("\n", length)
    if line < 0:
        return len(text)
    # A run of more than a hundred marks closes any fence of more than a hundred.
    closing = re.compile(rf"^[^\S\n]*{re.escape(mark)}{{{min(length - opening, 100)},}}[^\S\n]*$", re.MULTILINE)
    found = closing.search(text, line + 1)
    return found.end() if found else len(text)


class _Reader:
    """Walks over a text once and collects its elements."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.brackets = Brackets(text)
        self.tags = Tags(text)
        self.elements: list[Element] = []
        self.closers: list[tuple[int, int]] = []

    def read(self) -> list[Element]:
        """The elements, in order."""
        text, match, elements = self.text, _LINE.match, self.elements
        at, size = 0, len(text)
        while at < size:
            found = match(text, at)
            if found is None:  # the pattern matches every line
                break
            kind = found.lastgroup or "indent"
            start, end = found.end("indent"), found.end()
            if self.closers and self.closers[-1][0] < end:
                at = self._closing(start, kind)
                continue
            if kind in ("fence", "json", "xml"):
                block = getattr(self, f"_{kind}")(start, end)
                if block >= 0:
                    at = block
                    continue
                kind = "indent"
            if kind == "blank":
                elements.append(Element(start, start, "blank", 0))
                blank = _BLANK_LINES.match(text, at)
                at = max(end + 1, blank.end() if blank else 0)
            else:
                self._line(start, end, kind, start - at)
                at = end + 1
        return elements

    def _line(self, start: int, end: int, kind: str, indent: int) -> None:
        text = self.text
        if text[end - 1].isspace():
            end = start + len(text[start:end].rstrip())
        if kind == "heading":
            indent = len(text[start : start + 7]) - len(text[start : start + 7].lstrip("#"))
        elif kind in ("indent", "label"):
            if kind == "indent":
                kind = "text"
            if "|" in (line := text[start:end]) and "<|" not in line and _BARS.match(line):
                kind = "table"
        self.elements.append(Element(start, end, kind, indent))

    def _skip_line_rest(self, end: int) -> int:
        """Offset of the next line when only white space follows `end` on its line; -1 otherwise."""
        text, size = self.text, len(self.text)
        while end < size and text[end] != "\n":
            if not (text[end].isspace() or text[end] in ",;"):
                return -1
            end += 1
        return min(end + 1, size)

    def _block(self, start: int, end: int, kind: str) -> int:
        self.elements.append(Element(start, start + len(self.text[start:end].rstrip()), kind, 0))
        return end

    def _fence(self, start: int, end: int) -> int:
        del end
        limit = self.closers[-1][0] if self.closers else len(self.text)
        return self._block(start, min(fence_end(self.text, start), limit), "code")

    def _json(self, start: int, end: int) -> int:
        del end
        close = self.brackets.close(start)
        limit = self.closers[-1][0] if self.closers else len(self.text)
        if close < 0 or close > limit or not looks_like_json(self.text, start, close):
            return -1
        after = self._skip_line_rest(close)
        if after < 0:
            return -1
        return self._block(start, after, "json")

    def _xml(self, start: int, end: int) -> int:
        text = self.text
        opening = _TAG.match(text, start)
        inner, close = self.tags.close(start)
        limit = self.closers[-1][0] if self.closers else len(text)
        if opening is None or inner < 0 or close > limit:
            return -1
        after = self._skip_line_rest(close)
        name = opening[2].lower()
        if name in DEMONSTRATION_TAGS and after >= 0:
            return self._block(start, close, "demonstration")
        group = name.removesuffix("s") in DEMONSTRATION_TAGS  # <examples> around several <example>
        if is_opaque(text, opening.end(), inner) and not group:
            return self._block(start, close, "xml") if after >= 0 else -1
        if after < 0 and close > end:
            return -1
        self.elements.append(Element(start, opening.end(), "open", 0))
        self.closers.append((inner, close))
        return opening.end()

    def _closing(self, start: int, kind: str) -> int:
        """The line up to the closing tag of the innermost wrapper, then the tag."""
        inner, close = self.closers.pop()
        text = self.text
        if start < inner and text[start:inner].strip():
            self._line(start, inner, "indent" if kind in ("fence", "json", "xml", "blank") else kind, 0)
        self.elements.append(Element(inner, close, "close", 0))
        return close


def looks_like_json(text: str, start: int, end: int) -> bool:
    """Whether the bracketed stretch begins as a JSON object or array does."""
    at = start + 1
    while at < end - 1 and text[at].isspace():
        at += 1
    first = text[at]
    return first in '"}' if text[start] == "{" else first in '"{[]-0123456789tfn'


def is_opaque(text: str, start: int, end: int) -> bool:
    """Whether the inside of an XML element is data, so that the element is one block, and no prose in a wrapper."""
    return end - start <= _SMALL_XML or end - start < 40 * text.count("<", start, end)


def read_lines(text: str) -> list[Element]:
    """The elements of `text`, in order; together they hold every character that is not white space."""
    return _Reader(same_length(text)).read()
