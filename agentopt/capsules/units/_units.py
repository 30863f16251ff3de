"""A text as a document: units that may leave as a whole, with their kinds, blocks, headings and keep spans.

What holds for the blocks of a document:

* **Demonstration** (`kind == "demonstration"`): one block. A short one is a single unit. In a longer one the first unit
  is the question up to the cue of the answer ("A:", "Let's think step by step."), the last unit is the answer, and the
  units between them are the rationale. First and last stay together or the whole block leaves; a unit between them may
  leave alone.
* **Heading** (`kind == "heading"`): also a lead-in that ends in a colon ("Options:"), and the opening tag of an XML
  wrapper around prose. It leaves when nothing it governs stays. The closing tag is a heading too, governed by its
  opening tag: it stays exactly when the opening tag stays (`closing_tags`).
* **Table**: small ones are one unit; in a longer one the head is a unit and governs the rows (`heading`).
* **Code, JSON, XML blocks**: one unit, whatever their size.
* A list, a paragraph, a log, a turn is a block of items, sentences, lines.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import cast

from agentopt.capsules._types import Document, Span, Unit, UnitKind
from agentopt.capsules.units._demonstrations import Demonstration, find_demonstrations, find_turns
from agentopt.capsules.units._keep import find_keep, is_schema, merge
from agentopt.capsules.units._lines import Element, read_lines
from agentopt.capsules.units._sentences import split

SHORT = 500
"""Characters of a demonstration, an item, a turn or a table up to which it is one unit."""

_DIRECTIVE = re.compile(
    r"""(?:[-*•]\s+|\(?\w{1,3}[.)]\s+)?[*_("]{0,3}(?:
      (?P<constraint>(?:please\s)?(?:do\snot|don['’]t|never|always|must|ensure|make\ssure|avoid|only|be\ssure
        |remember|note\sthat
         |important|under\sno|at\sall\stimes|no\s\w+\s(?:is|are)\sallowed|you\s(?:must|may|can(?:not|['’]t)?
           |should|shall|are\s(?:not|only|required|allowed))
         |(?:your|the|each|all|every)\s(?:final\s)?(?:answers?|responses?|outputs?|repl(?:y|ies)|quer(?:y
           |ies))\s(?:must|should|may|shall|can))\b)
     |(?P<instruction>you\sare\s(?:an?|the|going|now|given|asked)\b|you['’](?:re|ll)\s|your\s(?:task|job|goal
       |role|mission)\b|act\sas\b|i\swant\syou\b|please\b
         |given\s(?:a|an|the|two)\b|imagine\syou)
    )""",
    re.VERBOSE | re.IGNORECASE,
)
_IMPERATIVE = re.compile(
    r"""(?:answer|solve|classify|translate|summari[sz]e|write|determine|evaluate|extract|identify|clarify|infer|sort
    |recommend|find|list|describe|explain|use|follow|read|consider|decide|label|rewrite|convert|generate|create
      |choose|select
    |predict|compute|calculate|compare|analy[sz]e|review|help|think|respond|return|output|complete|count|tell
      |give|provide|rank
    |detect|correct|fix|plan|judge|rate|assess)\b""",
    re.VERBOSE | re.IGNORECASE,
)
_TOOLS = re.compile(r"\b(?:tools?|functions?|apis?|actions)\b", re.IGNORECASE)
_SIGNATURE = re.compile(
    r"(?:[-*•]\s+|\d+[.)]\s+)?[`*]{0,3}(?:def\s+)?[A-Za-z_][\w.]{0,60}\([^()\n]{0,300}\)[`*]{0,3}\s*(?:->|:|[-–—]|\Z)"
)
_ENTRY = re.compile(r"[`*]{0,3}[A-Za-z_][\w.-]{0,40}[`*]{0,3}\s?(?:\([^()\n]{0,200}\))?\s?:\s")
_FUNCTION = re.compile(r'"(?:function|parameters|input_schema)"\s*:')
_PROSE = ("text", "label", "quote")
_ANNOUNCED = frozenset({"item", "code", "json", "table", "label"})
_STANDS = frozenset({"code", "json", "xml", "demonstration"})
_TITLE = re.compile(r"\*\*[^*\n]{1,80}\*\*:?\Z|__[^_\n]{1,80}__:?\Z")


def parse(text: str, keep: Sequence[str] = (), *, role: str = "", whole: bool = False) -> Document:
    """Cut `text` into units.

    Args:
        text: Any text.
        keep: Regular expressions; what they match is a keep span.
        role: The role of the chat message whose content it is.
        whole: Every unit must stay.

    Raises:
        UserError: a pattern that is no regular expression.
    """
    spans = find_keep(text, keep)
    builder = _Builder(text, spans)
    units = builder.build()
    return Document(text, units, tuple(builder.spans), role, whole)


def closing_tags(document: Document) -> dict[int, int]:
    """Index of each unit that is the opening tag of a wrapper, and the index of the unit that closes it."""
    text = document.text
    return {
        unit.heading: at
        for at, unit in enumerate(document.units)
        if unit.kind == "heading" and unit.heading >= 0 and text.startswith("</", unit.start)
    }


class _Builder:
    """Goes through the elements of a text and collects units."""

    def __init__(self, text: str, spans: list[Span]) -> None:
        self.text = text
        self.spans = spans
        self.units: list[tuple[int, int, UnitKind, int, int]] = []
        self.block = -1
        self.headings: list[tuple[int, int]] = []
        """Level and unit of the headings that govern here, outermost first."""
        self.lead: int | None = None
        """Unit of the lead-in line that governs here."""
        self.wrappers: list[tuple[int, list[tuple[int, int]]]] = []

    def build(self) -> tuple[Unit, ...]:
        """All units, with kinds and keep flags."""
        elements = read_lines(self.text)
        demonstrations = self._demonstrations(elements)
        turns = find_turns(self.text, elements)
        at, ahead = 0, 0
        while at < len(elements):
            if ahead < len(demonstrations) and demonstrations[ahead].first == at:
                at = self._demonstration(elements, demonstrations[ahead])
                ahead += 1
            elif at in turns:
                stop = demonstrations[ahead].first if ahead < len(demonstrations) else len(elements)
                at = self._turn(elements, at, stop, turns)
            else:
                stop = demonstrations[ahead].first if ahead < len(demonstrations) else len(elements)
                at = self._element(elements, at, stop, turns)
        first = self._first_demonstration()
        return self._finish(first)

    def _demonstrations(self, elements: list[Element]) -> list[Demonstration]:
        """Those that are not the example of an output format; the open question at the end becomes a keep span."""
        found: list[Demonstration] = []
        formats = [span for span in self.spans if span.kind in ("format", "schema")]
        starts = [span.start for span in formats]
        for one in find_demonstrations(self.text, elements):
            start, end = elements[one.first].start, elements[one.last - 1].end
            if not one.answered:
                self.spans = merge([*self.spans, Span(start, end, "keep", "format")])
                continue
            before = bisect_right(starts, start) - 1
            if before < 0 or formats[before].end < end:
                found.append(one)
        return found

    # --- units -------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        self.block += 1

    def _add(self, start: int, end: int, kind: UnitKind, heading: int | None = None) -> None:
        if heading is None:
            heading = self.lead if self.lead is not None else self.headings[-1][1] if self.headings else -1
        self.units.append((start, end, kind, self.block, heading))

    def _sentences(self, start: int, end: int, kind: UnitKind) -> None:
        for first, last in split(self.text, start, end):
            self._add(first, last, kind)

    def _heading(self, start: int, end: int, level: int) -> None:
        self.lead = None
        while self.headings and self.headings[-1][0] >= level:
            self.headings.pop()
        self._open()
        self._add(start, end, "heading")
        self.headings.append((level, len(self.units) - 1))

    def _element(self, elements: list[Element], at: int, stop: int, turns: set[int]) -> int:
        """Units of what begins at element `at`; the next element."""
        element = elements[at]
        kind = element.kind
        if kind == "blank":
            if self.lead is not None and len(self.units) - 1 > self.lead:
                self.lead = None
            return at + 1
        if kind in _PROSE:
            return self._paragraph(elements, at, stop, turns)
        if kind == "item":
            return self._list(elements, at, stop, turns)
        if kind == "table":
            return self._table(elements, at, stop)
        if kind == "log":
            return self._log(elements, at, stop)
        if kind == "heading":
            self._heading(element.start, element.end, element.level)
        elif kind in ("open", "close"):
            self._wrapper(element)
        elif kind in _STANDS:
            self._open()
            self._add(element.start, element.end, self._kind_of_block(element))
        else:  # a rule
            self._open()
            self._add(element.start, element.end, "sentence")
        return at + 1

    def _kind_of_block(self, element: Element) -> UnitKind:
        if element.kind in ("json", "code") and is_schema(self.text, element.start, element.end):
            return "tool" if _FUNCTION.search(self.text, element.start, element.end) else "schema"
        return cast("UnitKind", element.kind)

    def _wrapper(self, element: Element) -> None:
        self._open()
        if element.kind == "open":
            self._add(element.start, element.end, "heading")
            self.wrappers.append((len(self.units) - 1, self.headings))
            self.headings = [*self.headings, (-1, len(self.units) - 1)]
            self.lead = None
            return
        opening, self.headings = self.wrappers.pop()
        self.lead = None
        self._add(element.start, element.end, "heading", opening)

    def _paragraph(self, elements: list[Element], at: int, stop: int, turns: set[int]) -> int:
        """Lines of prose up to a blank one or to another kind of line."""
        first = elements[at]
        following = elements[at + 1] if at + 1 < stop else None
        single = following is None or following.kind not in _PROSE or at + 1 in turns
        if following is not None and following.kind == "rule" and first.end - first.start <= 120:
            mark = self.text[following.start]
            if mark in "=-":  # an underlined heading
                self._heading(first.start, following.end, 1 if mark == "=" else 2)
                return at + 2
        if self._is_title(first, single, following):
            self._heading(first.start, first.end, 6)
            return at + 1
        if self._is_short_lead(first) if not single else self._is_lead(elements, at + 1, following):
            self._open()
            self._lead(first.start, first.end)
            return at + 1
        return self._prose(elements, at, stop, turns)

    def _prose(self, elements: list[Element], at: int, stop: int, turns: set[int]) -> int:
        last = at + 1
        while last < stop and elements[last].kind in _PROSE and last not in turns:
            last += 1
        start, end = elements[at].start, elements[last - 1].end
        self._open()
        if last - at > 1 and self._is_lead(elements, last, elements[last] if last < stop else None):
            self._sentences(start, elements[last - 2].end, "sentence")
            self._lead(elements[last - 1].start, end)
        elif self._is_code(elements, at, last):
            self._add(start, end, "code")
        else:
            self._sentences(start, end, "sentence")
        return last

    def _lead(self, start: int, end: int) -> None:
        """A line whose last sentence announces what follows: that sentence governs it, and leaves with it."""
        self.lead = None
        *before, (first, last) = split(self.text, start, end)
        for piece in before:
            self._add(*piece, "sentence")
        self._add(first, last, "heading")
        self.lead = len(self.units) - 1

    def _is_short_lead(self, line: Element) -> bool:
        return line.kind == "label" and line.end - line.start <= 40 and self.text[line.end - 1] in ":："

    def _is_title(self, first: Element, single: bool, following: Element | None) -> bool:
        if first.end - first.start > 90:
            return False
        line = self.text[first.start : first.end]
        if _TITLE.match(line):
            return True
        return single and following is not None and len(line) > 3 and line.isupper() and line[-1] not in ".!?,;"

    def _is_lead(self, elements: list[Element], last: int, following: Element | None) -> bool:
        """Whether the last line of a paragraph announces the block after it."""
        line = elements[last - 1]
        if self.text[line.end - 1] not in ":：" or line.end - line.start > 120 or following is None:
            return False
        if following.kind == "blank":
            after = elements[last + 1] if last + 1 < len(elements) else None
            return after is not None and (after.kind in _ANNOUNCED or line.kind == "label")
        return following.kind not in ("heading", "open", "close", "rule")

    def _is_code(self, elements: list[Element], at: int, last: int) -> bool:
        lines = elements[at:last]
        if any(line.level < 4 for line in lines) or (at and elements[at - 1].kind == "item"):
            return False
        marks = sum(
            bool(re.search(r"[={};]|\w\(|^(?:def|class|return|import|from|for|if)\b", line))
            for line in self.text[lines[0].start : lines[-1].end].split("\n")
        )
        return 2 * marks >= len(lines)

    def _list(self, elements: list[Element], at: int, stop: int, turns: set[int]) -> int:
        """Items up to a blank line that no item follows; lines that continue an item belong to it."""
        self._open()
        while at < stop and elements[at].kind == "item":
            last = at + 1
            while last < stop and elements[last].kind == "text" and last not in turns:
                last += 1
            start, end = elements[at].start, elements[last - 1].end
            if end - start <= SHORT:
                self._add(start, end, "item")
            else:
                self._sentences(start, end, "item")
            at = last
            if at + 1 < stop and elements[at].kind == "blank" and elements[at + 1].kind == "item":
                at += 1
        return at

    def _table(self, elements: list[Element], at: int, stop: int) -> int:
        last = at + 1
        while last < stop and elements[last].kind == "table":
            last += 1
        self._open()
        start, end = elements[at].start, elements[last - 1].end
        if end - start <= SHORT or last - at < 4:
            self._add(start, end, "table")
            return last
        ruled = set(self.text[elements[at + 1].start : elements[at + 1].end]) <= set("|-: +=\t")
        head = at + 2 if ruled else at + 1
        self._add(start, elements[head - 1].end, "table")
        governs = len(self.units) - 1
        for row in elements[head:last]:
            self._add(row.start, row.end, "table", governs)
        return last

    def _log(self, elements: list[Element], at: int, stop: int) -> int:
        """Log lines; lines that are indented belong to the one before."""
        self._open()
        while at < stop and elements[at].kind == "log":
            last = at + 1
            while last < stop and elements[last].kind == "text" and elements[last].level > 0:
                last += 1
            self._add(elements[at].start, elements[last - 1].end, "log")
            at = last
        return at

    def _turn(self, elements: list[Element], at: int, stop: int, turns: set[int]) -> int:
        """What one speaker said: up to the next turn, or to a line of another kind."""
        last = at + 1
        while last < stop and elements[last].kind in ("text", "label", "quote", "item") and last not in turns:
            last += 1
        self._open()
        start, end = elements[at].start, elements[last - 1].end
        if end - start <= SHORT:
            self._add(start, end, "turn")
        else:
            self._sentences(start, end, "turn")
        return last

    def _demonstration(self, elements: list[Element], one: Demonstration) -> int:
        self._open()
        start, end = elements[one.first].start, elements[one.last - 1].end
        odd = any(element.kind in _STANDS for element in elements[one.first : one.last])
        if end - start <= SHORT or odd:
            self._add(start, end, "demonstration")
            return one.last
        pieces = split(self.text, one.asked, end)
        self._add(start, one.asked, "demonstration")
        for first, last in pieces:
            self._add(first, last, "demonstration")
        return one.last

    # --- kinds -------------------------------------------------------------------------------------------------------

    def _first_demonstration(self) -> int:
        return next((at for at, unit in enumerate(self.units) if unit[2] == "demonstration"), -1)

    def _finish(self, demonstration: int) -> tuple[Unit, ...]:
        """Units with their final kinds and keep flags."""
        text, spans = self.text, self.spans
        first_block = self.units[0][3] if self.units else 0
        units: list[Unit] = []
        ahead = 0
        for at, (start, end, kind, block, heading) in enumerate(self.units):
            while ahead < len(spans) and spans[ahead].end <= start:
                ahead += 1
            held = ahead < len(spans) and spans[ahead].start < end
            if kind in ("sentence", "item"):
                opening = at < demonstration or block == first_block
                kind = self._directive(text, start, end, kind, opening, heading)
                if kind == "sentence" and at < demonstration and block == first_block:
                    kind = "instruction"  # what stands before the demonstrations says what they demonstrate
                if held and spans[ahead].kind == "format" and kind != "tool":
                    kind = "schema"
            units.append(Unit(start, end, kind, block, heading, held))
        return tuple(units)

    def _directive(self, text: str, start: int, end: int, kind: UnitKind, opening: bool, heading: int) -> UnitKind:
        """The kind of a sentence or an item by how it begins."""
        found = _DIRECTIVE.match(text, start, end)
        if found is not None:
            return "constraint" if found["constraint"] else "instruction"
        if opening and _IMPERATIVE.match(text, start, end):
            return "instruction"
        if heading >= 0 and (kind == "item" or _ENTRY.match(text, start, end)):
            title = self.units[heading]
            if _TOOLS.search(text, title[0], min(title[1], title[0] + 60)) or _SIGNATURE.match(text, start, end):
                return "tool"
        return kind
