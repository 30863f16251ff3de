"""Which stretches of the source a model rewrites, and how much of the budget each gets.

A part that extraction leaves as it is, or leaves out, is not touched. The others get what extraction gave them and a
share of what it left over. A part that is longer than the model's context is cut between units, each piece with the
share of what extraction kept in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from agentopt.capsules._errors import BudgetInfeasible
from agentopt.capsules._types import Document, Unit
from agentopt.capsules.counting._tokens import Meter
from agentopt.capsules.rewriting._probes import recall
from agentopt.capsules.rewriting._verify import Source

if TYPE_CHECKING:
    from agentopt.capsules.extraction._extract import Extraction

_BREAK = "\n\n"


@dataclass(frozen=True)
class Piece:
    """A stretch of one part, to be rewritten within a limit of its own."""

    part: int
    number: int
    source: Source
    meter: Meter
    fallback: str
    """What extraction makes of it."""
    problem: str = ""
    """Why it is not given to a model."""

    @property
    def document(self) -> Document:
        """The stretch as a document."""
        return self.source.document

    @cached_property
    def floor(self) -> float:
        """The share of questions that extraction answers: a rewrite has to answer as many."""
        return recall(self.source.probes, self.fallback)


def join(texts: Sequence[str]) -> str:
    """The pieces of one part as one text."""
    return texts[0] if len(texts) == 1 else _BREAK.join(text.strip("\n") for text in texts if text.strip())


def plan(
    documents: Sequence[Document],
    meter: Meter,
    extraction: Extraction,
    *,
    chunk: int,
    query: str | None,
    seed: int,
) -> list[Piece]:
    """The pieces in order, with limits that together keep within the meter's."""
    texts = extraction.texts
    parts = [
        part
        for part, document in enumerate(documents)
        if not document.whole and texts[part].strip() and texts[part] != document.text
    ]
    sizes = dict(zip(parts, meter.units([texts[part] for part in parts]), strict=True))
    slack = max(0, meter.limit - meter.total(texts))
    total = sum(sizes.values()) or 1
    pieces: list[Piece] = []
    for part in parts:
        share = Meter(sizes[part] + slack * sizes[part] // total, meter.tokenizer)
        document = documents[part]
        if len(document.text) <= chunk:
            pieces.append(Piece(part, 0, Source(document, query, seed), share, texts[part]))
            continue
        kept = {unit for place, unit in extraction.kept if place == part}
        pieces += _in_chunks(part, document, share, kept, chunk, query, seed)
    return pieces


def _in_chunks(
    part: int, document: Document, share: Meter, kept: set[int], chunk: int, query: str | None, seed: int
) -> Iterator[Piece]:
    from agentopt.capsules.extraction._extract import extract

    runs = list(_runs(document, chunk))
    counts = share.units([document.text[unit.start : unit.end] for unit in document.units])
    weights = [sum(counts[unit] for unit in range(first, last) if unit in kept) for first, last in runs]
    room = max(1, share.limit - 2 * len(runs))
    for number, ((first, last), weight) in enumerate(zip(runs, weights, strict=True)):
        piece = _slice(document, first, last)
        own = replace(share, limit=max(1, room * weight // (sum(weights) or 1)))
        source = Source(piece, query, seed)
        if not weight:
            yield Piece(part, number, source, own, "", "extraction keeps nothing of it")
            continue
        try:
            text = extract([piece], own, query=query, seed=seed).texts[0]
        except BudgetInfeasible as error:
            own = replace(own, limit=error.minimum)
            text = extract([piece], own, query=query, seed=seed).texts[0]
        long = len(piece.text) > 2 * chunk
        yield Piece(part, number, source, own, text, "one unit is longer than the model's context" if long else "")


def _runs(document: Document, chunk: int) -> Iterator[tuple[int, int]]:
    """Stretches of units of at most `chunk` characters where units allow it, ended between blocks if one is near."""
    units = document.units
    inside = _crossed(document)
    first = 0
    while first < len(units):
        last = first + 1
        best = last
        while last < len(units) and units[last].end - units[first].start <= chunk:
            last += 1
        best = last
        for place in range(last, first, -1):
            if place >= len(units) or place not in inside:
                far = units[place - 1].end - units[first].start < chunk // 2
                if place >= len(units) or units[place].block != units[place - 1].block or far:
                    best = last if far else place
                    break
        while best < len(units) and best in inside:
            best += 1
        yield first, best
        first = best


def _crossed(document: Document) -> set[int]:
    """Units that a keep span of an earlier unit reaches into: no piece begins there."""
    found: set[int] = set()
    spans = iter(document.keep)
    span = next(spans, None)
    for number, unit in enumerate(document.units):
        while span is not None and span.end <= unit.start:
            span = next(spans, None)
        if span is not None and span.start < unit.start:
            found.add(number)
    return found


def _slice(document: Document, first: int, last: int) -> Document:
    """The units from `first` up to `last` as a document of their own."""
    units = document.units
    start = units[first].start if first else 0
    end = units[last - 1].end if last < len(units) else len(document.text)

    def moved(unit: Unit) -> Unit:
        heading = unit.heading - first if first <= unit.heading < last else -1
        return replace(unit, start=unit.start - start, end=unit.end - start, heading=heading)

    keep = tuple(
        replace(span, start=span.start - start, end=span.end - start)
        for span in document.keep
        if start <= span.start and span.end <= end
    )
    return replace(document, text=document.text[start:end], units=tuple(map(moved, units[first:last])), keep=keep)
