"""The extractive engine: whole units, the ones worth most per token, within the limit; no model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from agentopt.capsules._bm25 import Bm25, normalised
from agentopt.capsules._coverage import cover, term_weights
from agentopt.capsules._cut import Cutter, Draft, Item, fit
from agentopt.capsules._errors import BudgetInfeasible
from agentopt.capsules._options import Scorer
from agentopt.capsules._terms import Floats, Table, Vocabulary, table
from agentopt.capsules._tokens import Meter
from agentopt.capsules._types import Document, DroppedUnit

_KIND = {"instruction": 0.8, "constraint": 0.9, "schema": 0.9, "tool": 0.8, "turn": 0.2}
"""What a unit of a kind is worth beside its relevance, which is at most 1; the others are worth nothing by kind."""


@dataclass(frozen=True, slots=True)
class Extraction:
    """What was extracted."""

    texts: tuple[str, ...]
    """One per document."""
    dropped: tuple[DroppedUnit, ...]
    kept: tuple[tuple[int, int], ...]
    """(document, unit) of every unit that stayed, whole or cut."""


def extract(
    documents: Sequence[Document],
    meter: Meter,
    *,
    query: str | None = None,
    scorer: Scorer = "auto",
    seed: int = 0,
    values: Sequence[Sequence[float]] | None = None,
) -> Extraction:
    """The units of `documents` that are worth most, within the meter's limit.

    Args:
        documents: Texts that share the budget.
        meter: Counts what is rendered, and holds the limit.
        query: What the reader will be asked; None when that is not known.
        scorer: How units are valued.
        seed: Decides nothing but ties.
        values: The worth of every unit of every document, in place of a scorer's.

    Raises:
        BudgetInfeasible: what must stay is longer than the limit.
    """
    texts = [document.text for document in documents]
    everything = [[True] * len(document.units) for document in documents]
    if meter.fits(texts):
        return _extraction(documents, Draft(everything, [{} for _ in documents]), None)
    if not any(document.units for document in documents):
        return _blank(documents, meter)
    flat = [document.text[unit.start : unit.end] for document in documents for unit in document.units]
    counts = meter.units(flat)
    costs: list[list[int]] = []
    place = 0
    for document in documents:
        costs.append(counts[place : place + len(document.units)])
        place += len(document.units)
    vocabulary = Vocabulary()
    lists = [vocabulary.read(text) for text in flat]
    found = table(lists, len(vocabulary))
    worth, gains = np.zeros(len(flat)), np.zeros(len(flat))
    if values is not None:
        worth = np.asarray([value for row in values for value in row], dtype=np.float64)
    elif query is not None:
        asked = {number: 1.0 for number in vocabulary.read(query) if number < found.size}
        worth = normalised(Bm25(found).scores(asked))
    else:
        gains = term_weights(found)
    items, rows = _items(documents, costs, worth)

    def order(room: float) -> Iterable[int]:
        if query is None and values is None:
            mean = float(gains.mean()) * 10 if len(gains) else 1.0
            extra = np.asarray([_KIND.get(documents[item.part].units[item.units[0]].kind, 0.0) for item in items])
            chosen = cover(_subset(lists, rows, len(vocabulary)), [item.cost for item in items], extra * mean, room)
        else:
            chosen = []
        taken = set(chosen)
        rest = [number for number in range(len(items)) if number not in taken]
        return [*chosen, *sorted(rest, key=lambda number: (-items[number].value, number))]

    cutter = Cutter(documents, meter, costs, items, order)
    return _extraction(documents, fit(cutter), cutter)


def _blank(documents: Sequence[Document], meter: Meter) -> Extraction:
    """Of documents that are nothing but white space: one character of the first."""
    texts = [document.text if document.whole else "" for document in documents]
    first = next(part for part, document in enumerate(documents) if document.text)
    if not any(texts):
        texts[first] = documents[first].text[:1]
    total = meter.total(texts)
    if total > meter.limit:
        name = meter.tokenizer.name
        raise BudgetInfeasible(minimum=total, limit=meter.limit, tokenizer=name, because="the text is white space")
    return Extraction(tuple(texts), (), ())


def _subset(lists: Sequence[list[int]], rows: Sequence[list[int]], size: int) -> Table:
    return table([[number for row in group for number in lists[row]] for group in rows], size)


def _items(
    documents: Sequence[Document], costs: Sequence[Sequence[int]], worth: Floats
) -> tuple[list[Item], list[list[int]]]:
    """What may leave, with the flat rows of its units. Headings come with what they govern."""
    items: list[Item] = []
    rows: list[list[int]] = []
    place = 0
    for part, document in enumerate(documents):
        governs = {unit.heading for unit in document.units}
        for index, unit in enumerate(document.units):
            if document.whole or unit.keep or (unit.kind == "heading" and index in governs):
                continue
            value = float(worth[place + index]) + _KIND.get(unit.kind, 0.0)
            items.append(Item(part, (index,), costs[part][index], value))
            rows.append([place + index])
        place += len(document.units)
    return items, rows


def _extraction(documents: Sequence[Document], draft: Draft, cutter: Cutter | None) -> Extraction:
    texts = [document.text for document in documents] if cutter is None else cutter.texts(draft)
    dropped: list[DroppedUnit] = []
    kept: list[tuple[int, int]] = []
    for part, document in enumerate(documents):
        for index, unit in enumerate(document.units):
            atoms = draft.cuts[part].get(index)
            if draft.kept[part][index] or atoms is not None:
                kept.append((part, index))
                if cutter is not None and atoms is not None:
                    left = cutter.pieces[part].left_out(index, atoms)
                    dropped += [DroppedUnit(text, unit.kind, "cut", part) for text in left]
            else:
                text = document.text[unit.start : unit.end]
                dropped.append(DroppedUnit(text, unit.kind, "value", part))
    return Extraction(tuple(texts), tuple(dropped), tuple(kept))
