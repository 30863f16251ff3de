"""Protected spans as marks that a language model copies well, and back to the very same characters.

A span becomes `[[3: $45.00]]`: an opaque number, which alone decides what is put back, and a readable label, because a
model that cannot see what a mark stands for writes nonsense around it, and a legend beside the text has to be looked
up, which small models do not do: of 46 spans in nine GSM8K questions the embedded 135M model brought back 22 with
labels, 14 with bare numbers and 6 with a legend. Labels of long spans are cut. A reply may hold `[[3]]`,
`[[3: $45.00]]` or the plain characters: all give the same text. A mark whose label belongs to another span is a mix-up
and is left as it is, so that verification sees it. ASCII brackets come first because every tokenizer has short tokens
for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from agentopt.capsules._types import Document, Span, SpanKind

HIDDEN: frozenset[SpanKind] = frozenset(
    {"number", "date", "money", "quote", "url", "path", "identifier", "code", "json", "xml"}
)
"""The intact kinds that become marks. Names, negations and quantifiers stay readable and are checked instead."""

_FORMS = (("[[", "]]"), ("<<", ">>"), ("((", "))"), ("⟦", "⟧"), ("⟪", "⟫"))
_LABEL = 40


@dataclass(frozen=True)
class Marks:
    """The protected spans of one document, numbered in order from 1, and how a mark looks in its text."""

    opening: str
    closing: str
    spans: tuple[str, ...]
    """The characters of each span; mark number n stands for `spans[n - 1]`."""
    kept: tuple[bool, ...]
    """Whether each may never be lost."""
    _labels: tuple[str, ...] = field(default=(), repr=False)

    def bare(self, number: int) -> str:
        """The mark as it is asked for."""
        return f"{self.opening}{number}{self.closing}"

    def labelled(self, number: int) -> str:
        """The mark as the model reads it."""
        return f"{self.opening}{number}: {self._labels[number - 1]}{self.closing}"

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """A mark as a model may write it: spaces inside, with a label or without."""
        return re.compile(
            rf"{re.escape(self.opening)}[ \t]*(\d{{1,7}})[ \t]*(?::([^\n]{{0,200}}?))?{re.escape(self.closing)}"
        )

    def restore(self, text: str) -> str:
        """`text` with every mark replaced by its span; unknown and mixed-up marks stay."""
        return self.pattern.sub(self._span, text) if self.spans else text

    def numbers(self, text: str) -> list[int]:
        """The marks that `text` holds and `restore` would replace, in order."""
        return [int(match[1]) for match in self.pattern.finditer(text) if self._span(match) != match[0]]

    def leftover(self, text: str) -> list[str]:
        """Marks that stand for nothing, after restoration."""
        return [match[0] for match in self.pattern.finditer(text) if match[0] not in self._whole]

    @cached_property
    def _whole(self) -> str:
        return "\n".join(self.spans)

    def _span(self, match: re.Match[str]) -> str:
        number = int(match[1])
        if not 1 <= number <= len(self.spans):
            return match[0]
        label = (match[2] or "").strip()
        if label and label != self._labels[number - 1] and label in self._owners:
            return match[0]
        return self.spans[number - 1]

    @cached_property
    def _owners(self) -> frozenset[str]:
        return frozenset(self._labels)


@dataclass(frozen=True, slots=True)
class Masked:
    """A document's text with marks in place of its protected spans."""

    text: str
    marks: Marks


def mask(document: Document, find: Callable[[str], Sequence[Span]] | None = None) -> Masked:
    """Put marks in place of the keep spans and of the intact spans that a rewriter may not touch.

    `find` gives the intact spans of a text; `find_intact` by default. `masked.marks.restore(masked.text)` is the
    document's text, byte for byte.
    """
    if find is None:
        from agentopt.capsules.units._spans import find_intact

        find = find_intact
    text = document.text
    merged = list(_merged([*document.keep, *(span for span in find(text) if span.kind in HIDDEN)]))
    spans = tuple(text[start:end] for start, end, _, _ in merged)
    for opening, closing in _forms(text):
        labels = tuple(
            _label(span, kind, opening, closing) for span, (_, _, _, kind) in zip(spans, merged, strict=True)
        )
        marks = Marks(opening, closing, spans, tuple(keep for _, _, keep, _ in merged), labels)
        out: list[str] = []
        place = 0
        for number, (start, end, _, _) in enumerate(merged, 1):
            out += (text[place:start], marks.labelled(number))
            place = end
        masked = "".join((*out, text[place:]))
        if marks.restore(masked) == text:
            return Masked(masked, marks)
    return Masked(text, Marks("", "", (), ()))  # unreachable: some run of Zs is not in the text


def _forms(text: str) -> Iterator[tuple[str, str]]:
    """Brackets of which neither half stands in the text; the last ones cannot, whatever the text is."""
    for opening, closing in _FORMS:
        if opening not in text and closing not in text:
            yield opening, closing
    longest = max((len(run) for run in re.findall("Z+", text)), default=0)
    letters = "Z" * (longest + 1)
    yield f"[[{letters}", f"{letters}]]"


def _merged(spans: Sequence[Span]) -> Iterator[tuple[int, int, bool, SpanKind]]:
    """Overlapping spans as one: start, end, whether any is a keep span, the kind of the longest."""
    current: tuple[int, int, bool, SpanKind] | None = None
    longest = 0
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        if span.end <= span.start:
            continue
        keep = span.level == "keep"
        if current is None or span.start >= current[1]:
            if current is not None:
                yield current
            begun: tuple[int, int, bool, SpanKind] = (span.start, span.end, keep, span.kind)
            current, longest = begun, span.end - span.start
            continue
        kind: SpanKind = span.kind if span.end - span.start > longest else current[3]
        longest = max(longest, span.end - span.start)
        current = current[0], max(current[1], span.end), current[2] or keep, kind
    if current is not None:
        yield current


def _label(span: str, kind: SpanKind, opening: str, closing: str) -> str:
    """What a reader sees of a span: itself on one line, the beginning of a long one with its kind."""
    flat = " ".join(span.split())
    for half in (opening, closing, *opening, *closing):  # a label can neither end the mark nor begin another
        flat = flat.replace(half, "")
    flat = " ".join(flat.split())
    if len(flat) <= _LABEL:
        return flat or kind
    return f"{kind} {flat[: _LABEL - 10].rstrip()}..."
