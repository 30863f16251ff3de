"""From the units that stay to the text: neighbours keep what stood between them, a gap its strongest break.

A text of which everything stays is given back character for character.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agentopt.capsules._types import Document

NOTHING, SPACE, LINE, BLANK = range(4)
_NONE: Mapping[int, str] = {}


def strength(glue: str) -> int:
    """How strongly a stretch of white space separates: not at all, a space, a new line, a blank line."""
    if not glue:
        return NOTHING
    breaks = glue.count("\n") or glue.count("\r")
    return SPACE if not breaks else LINE if breaks == 1 else BLANK


def render(document: Document, kept: Sequence[bool], pieces: Mapping[int, str] = _NONE) -> str:
    """The text of the units that stay.

    Args:
        document: The text and its units.
        kept: Whether each unit stays.
        pieces: What stands in place of a unit that was cut, by its index; such a unit stays.
    """
    if not pieces and all(kept):
        return document.text
    return "".join(_parts(document, kept, pieces))


def render_with_places(document: Document, kept: Sequence[bool]) -> tuple[str, list[tuple[int, int]]]:
    """The text of the units that stay, and for each its index and where in that text it begins."""
    parts = _parts(document, kept, _NONE)
    places: list[tuple[int, int]] = []
    at = 0
    for number, index in enumerate(index for index, stays in enumerate(kept) if stays):
        # Glue and units take turns, a unit first.
        at += len(parts[2 * number - 1]) if number else 0
        places.append((index, at))
        at += len(parts[2 * number])
    return "".join(parts), places


def _parts(document: Document, kept: Sequence[bool], pieces: Mapping[int, str]) -> list[str]:
    """Units that stay and the glue between them, in turn."""
    text, units = document.text, document.units
    out: list[str] = []
    strongest, end = "", -1
    for index, unit in enumerate(units):
        if end >= 0:
            glue = text[end : unit.start]
            if strength(glue) > strength(strongest):
                strongest = glue
        end = unit.end
        if not (kept[index] or index in pieces):
            continue
        if out:
            before = text[units[index - 1].end : unit.start]
            adjacent = kept[index - 1] or (index - 1) in pieces
            out.append(before if adjacent else _join(strongest, before))
        out.append(pieces.get(index) or text[unit.start : unit.end])
        strongest = ""
    return out


def _join(strongest: str, before: str) -> str:
    """The break between two units that were not neighbours: the strongest one, with the second unit's indentation."""
    force = strength(strongest)
    if force < LINE:
        return " " if force else ""
    newline = "\r\n" if "\r\n" in strongest else "\n" if "\n" in strongest else "\r"
    last = max(before.rfind("\n"), before.rfind("\r"))
    return newline * (force - 1) + (before[last + 1 :] if last >= 0 else "")
