"""Keep spans that reach into the white space around units: that white space becomes a part of the unit.

A person's pattern may match a space or an empty line. It is to be in the capsule like everything else that is kept, so
it must not be mistaken for what only separates.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right

from agentopt.capsules._types import Document, Span, Unit


def stretched(document: Document) -> Document:
    """The document with units that cover all of its keep spans."""
    if not document.keep or document.whole:
        return document
    if not document.units:
        whole = Unit(0, len(document.text), "sentence", 0, keep=True)
        return dataclasses.replace(document, units=(whole,))
    starts = [unit.start for unit in document.units]
    units = list(document.units)
    for span in document.keep:
        _cover(units, starts, span)
    return dataclasses.replace(document, units=tuple(units))


def _cover(units: list[Unit], starts: list[int], span: Span) -> None:
    """Move the borders of the units beside a span's ends outward, where an end lies in white space."""
    after = bisect_right(starts, span.start)
    before = after - 1
    if before >= 0 and units[before].end < span.end and (after == len(units) or starts[after] >= span.end):
        # All of it, or its end, is white space behind a unit; no other unit begins in it.
        units[before] = dataclasses.replace(units[before], end=span.end, keep=True)
    elif after < len(units) and (before < 0 or units[before].end <= span.start):
        reaches = starts[after] < span.end or before < 0
        if reaches:
            units[after] = dataclasses.replace(units[after], start=min(starts[after], span.start), keep=True)
            starts[after] = units[after].start
            _cover_end(units, starts, span)
    else:
        _cover_end(units, starts, span)


def _cover_end(units: list[Unit], starts: list[int], span: Span) -> None:
    """The last unit that begins within a span reaches at least to its end."""
    last = bisect_right(starts, span.end - 1) - 1
    if units[last].end < span.end:
        units[last] = dataclasses.replace(units[last], end=span.end, keep=True)
