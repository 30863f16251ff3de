"""A long document made short enough to race: chunk by chunk, everything that would lose against its own chunk leaves.

Each chunk may keep more than the whole capsule may have, so what decides in the end is one race of all that is left:
the last token of each chunk buys the same gain, as water fills vessels to one level. Nothing that must stay leaves
here, nor do the shortest units, which a very small limit falls back on.
"""

from __future__ import annotations

import dataclasses
import heapq
from bisect import bisect_left

from agentopt.capsules._types import Document, Span, Unit
from agentopt.capsules.counting._tokens import Meter
from agentopt.capsules.extraction._cut import SMALLEST_TRIED, take
from agentopt.capsules.extraction._draft import Cutter
from agentopt.capsules.extraction._duplicates import duplicates
from agentopt.capsules.extraction._field import field_of
from agentopt.capsules.extraction._items import by_document, items_of
from agentopt.capsules.extraction._order import Taste, by_worth
from agentopt.capsules.extraction._render import render_with_places
from agentopt.capsules.extraction._stretch import stretched

CHUNK = 1 << 20
"""Characters that are scored at once."""
LEAST = 4096
"""Tokens that a chunk may keep even if the limit is smaller: the race is not to be decided here."""


def narrowed(document: Document, meter: Meter, taste: Taste) -> tuple[Document, list[int]]:
    """A document with the units worth most, and their indices in the given one."""
    if document.whole or len(document.text) <= CHUNK:
        return document, list(range(len(document.units)))
    document = stretched(document)
    pool = Pool(meter, taste)
    indices: list[int] = []
    first = 0
    while first < len(document.units):
        last = _end_of_chunk(document, first)
        glue = document.text[document.units[first - 1].end : document.units[first].start] if first else ""
        indices += range(first, last)
        indices = [indices[place] for place in pool.add(part_of(document, first, last), glue)]
        first = last
    return dataclasses.replace(pool.held, role=document.role), indices


class Pool:
    """What is left of the chunks so far. Its size is that of a chunk and of what the limit allows, not of the text."""

    def __init__(self, meter: Meter, taste: Taste, size: int = CHUNK) -> None:
        self._meter, self._taste, self._size = meter, taste, size
        self._room = max(3 * meter.limit // 2, LEAST)
        self._threshold = 2 * size
        self.held = Document("", ())

    def add(self, chunk: Document, glue: str) -> list[int]:
        """Take up a chunk; gives which of the units, those held before and then the chunk's, are left."""
        before = len(self.held.units)
        smaller, chosen = narrow(chunk, self._meter, self._taste, self._room)
        self.held = joined(self.held, smaller, glue)
        left = [*range(before), *(before + index for index in chosen)]
        if len(self.held.text) > self._threshold:
            self.held, again = narrow(self.held, self._meter, self._taste, self._room)
            left = [left[place] for place in again]
            # A pool that stays large because the limit is large is not narrowed again with every chunk.
            self._threshold = max(2 * self._size, 2 * len(self.held.text))
        return left


def _end_of_chunk(document: Document, first: int) -> int:
    """The unit with which the next chunk begins; demonstrations and keep spans are not divided."""
    units = document.units
    last = first + 1
    limit = units[first].start + CHUNK
    while last < len(units) and units[last].end <= limit:
        last += 1
    starts = [span.start for span in document.keep]
    while last < len(units):
        inside = bisect_left(starts, units[last].start) - 1
        together = units[last].kind == "demonstration" and units[last].block == units[last - 1].block
        if not together and (inside < 0 or document.keep[inside].end <= units[last].start):
            break
        last += 1
    return last


def narrow(document: Document, meter: Meter, taste: Taste, room: int) -> tuple[Document, list[int]]:
    """The units that win within `room` tokens by estimate, and all that must stay."""
    flat = [document.text[unit.start : unit.end] for unit in document.units]
    counts = meter.units(flat)
    if sum(counts) <= room:
        return document, list(range(len(flat)))
    costs = by_document([document], counts)
    items = items_of([document], costs)
    field = field_of([document], flat)
    cutter = Cutter([document], meter, costs, items, by_worth(field, items, duplicates(field), taste))
    base = cutter.mandatory()
    left = room - sum(cost for cost, stays in zip(counts, base.kept[0], strict=True) if stays)
    draft = cutter.with_items(base, take(cutter, base, cutter.order(left), left)) if left > 0 else base
    for index in heapq.nsmallest(SMALLEST_TRIED, range(len(flat)), key=lambda at: (len(flat[at]), at)):
        draft.kept[0][index] = True
    return with_kept(document, draft.kept[0])


def with_kept(document: Document, kept: list[bool]) -> tuple[Document, list[int]]:
    """The document of the units that stay, and their indices."""
    text, places = render_with_places(document, kept)
    numbers = {index: number for number, (index, _) in enumerate(places)}
    units: list[Unit] = []
    spans: list[Span] = []
    starts = [span.start for span in document.keep]
    for index, start in places:
        unit = document.units[index]
        shift = start - unit.start
        heading = numbers.get(unit.heading, -1)
        units.append(dataclasses.replace(unit, start=start, end=unit.end + shift, heading=heading))
        for span in document.keep[bisect_left(starts, unit.start) : bisect_left(starts, unit.end)]:
            spans.append(dataclasses.replace(span, start=span.start + shift, end=span.end + shift))
    return Document(text, tuple(units), tuple(spans), document.role), [index for index, _ in places]


def part_of(document: Document, first: int, last: int) -> Document:
    """Units `first` up to (not with) `last` as a document of their own."""
    start, end = document.units[first].start, document.units[last - 1].end
    units = tuple(
        dataclasses.replace(
            unit,
            start=unit.start - start,
            end=unit.end - start,
            heading=unit.heading - first if unit.heading >= first else -1,
        )
        for unit in document.units[first:last]
    )
    spans = tuple(
        dataclasses.replace(span, start=span.start - start, end=span.end - start)
        for span in document.keep
        if start <= span.start < end
    )
    return Document(document.text[start:end], units, spans, document.role)


def joined(one: Document, two: Document, glue: str) -> Document:
    """Two documents as one."""
    if not one.units:
        return two
    if not two.units:
        return one
    shift, block, number = len(one.text) + len(glue), one.units[-1].block + 1, len(one.units)
    units = tuple(
        dataclasses.replace(
            unit,
            start=unit.start + shift,
            end=unit.end + shift,
            block=unit.block + block,
            heading=unit.heading + number if unit.heading >= 0 else -1,
        )
        for unit in two.units
    )
    spans = tuple(dataclasses.replace(span, start=span.start + shift, end=span.end + shift) for span in two.keep)
    return Document(one.text + glue + two.text, one.units + units, one.keep + spans, one.role)
