"""What may be chosen or left as one: single units, and demonstrations with all of their units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agentopt.capsules._types import Document, Unit


@dataclass(frozen=True, slots=True)
class Item:
    """One choice. Headings come with what they govern and are items only where they stand alone."""

    part: int
    units: tuple[int, ...]
    rows: tuple[int, ...]
    """The units' rows among all units of all documents."""
    cost: int
    group: int
    """Items of one group are versions of the same thing: one of them is taken at most."""
    short: bool = False
    """A demonstration without its rationale; taken only when the whole has no room."""


def items_of(documents: Sequence[Document], costs: Sequence[Sequence[int]], *, tight: bool = False) -> list[Item]:
    """Everything that may leave; when it is `tight`, also the rest of the units of which only keep spans must stay."""
    out: list[Item] = []
    offset = 0
    for part, document in enumerate(documents):
        if not document.whole:
            _add(out, part, document, costs[part], offset, tight)
        offset += len(document.units)
    return out


def _add(out: list[Item], part: int, document: Document, costs: Sequence[int], offset: int, tight: bool) -> None:
    units = document.units
    governs = {unit.heading for unit in units}
    needed = {unit.heading for unit in units if unit.keep}
    index = 0
    while index < len(units):
        unit = units[index]
        if unit.kind == "demonstration":
            end = index + 1
            while end < len(units) and units[end].kind == "demonstration" and units[end].block == unit.block:
                end += 1
            _add_demonstration(out, part, units, range(index, end), costs, offset)
            index = end
            continue
        # A heading without anything below it is an item, and so is one above something that stays in any case.
        closes = unit.kind == "heading" and unit.heading >= 0 and document.text.startswith("</", unit.start)
        if not ((unit.keep and not tight) or closes) and (index not in governs or index in needed):
            out.append(Item(part, (index,), (offset + index,), costs[index], len(out)))
        index += 1


def _add_demonstration(
    out: list[Item], part: int, units: Sequence[Unit], span: range, costs: Sequence[int], offset: int
) -> None:
    """The whole demonstration, and its question and answer alone where there is a rationale between them."""
    free = [index for index in span if not units[index].keep]
    if not free:
        return
    group = len(out)
    chosen = tuple(free)
    out.append(Item(part, chosen, tuple(offset + i for i in chosen), sum(costs[i] for i in chosen), group))
    ends = tuple(index for index in (span[0], span[-1]) if not units[index].keep)
    if len(span) > 2 and ends:
        rows = tuple(offset + index for index in ends)
        out.append(Item(part, ends, rows, sum(costs[index] for index in ends), group, short=True))


def by_document(documents: Sequence[Document], counts: Sequence[int]) -> list[list[int]]:
    """Counts of all units, by document."""
    costs: list[list[int]] = []
    place = 0
    for document in documents:
        costs.append(list(counts[place : place + len(document.units)]))
        place += len(document.units)
    return costs
