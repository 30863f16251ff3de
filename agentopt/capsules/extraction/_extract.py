"""The extractive engine: whole units, the ones worth most per token, within the limit; no model.

Each unit is worth something by its kind (instructions, constraints, schemas and tools much, demonstrations and passages
only what they say) and by what it says: for a question its relevance, without one what it adds to what is covered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agentopt.capsules._errors import BudgetInfeasible
from agentopt.capsules._options import Scorer
from agentopt.capsules._types import Document, DroppedUnit
from agentopt.capsules.counting._tokens import Meter
from agentopt.capsules.extraction._cut import fit
from agentopt.capsules.extraction._draft import Cutter, Draft
from agentopt.capsules.extraction._duplicates import duplicates
from agentopt.capsules.extraction._field import field_of
from agentopt.capsules.extraction._items import Item, by_document, items_of
from agentopt.capsules.extraction._narrow import CHUNK, narrowed
from agentopt.capsules.extraction._order import Order, Taste, by_value, by_worth
from agentopt.capsules.extraction._stretch import stretched
from agentopt.errors import UserError

_COUNTED = 1 << 16
"""Characters from which a text whose units count more than twice the limit is not counted as a whole."""


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
        scorer: `auto` is `bm25` for a query, `coverage` without; `embedding` adds the meaning of sentences to either.
        seed: Decides between units of equal worth.
        values: The worth of every unit of every document, in place of a scorer's; the highest are taken first.

    Raises:
        BudgetInfeasible: what must stay is longer than the limit.
        UserError: a scorer that needs a query or an encoder that is not there.
    """
    asked = query if query and query.strip() else None
    if scorer == "bm25" and asked is None and values is None:
        raise UserError("scorer: found bm25 without a query, expected a query to score against; give one, or use auto.")
    taste = Taste(asked if scorer != "coverage" else None, scorer, seed)
    whole = [document.text for document in documents]
    if values is None and sum(map(len, whole)) > 2 * CHUNK:
        return _long(documents, meter, taste)
    return _short(documents, meter, taste, values)


def _short(
    documents: Sequence[Document], meter: Meter, taste: Taste, values: Sequence[Sequence[float]] | None = None
) -> Extraction:
    """All units in one race."""
    whole = [document.text for document in documents]
    original, documents = documents, [stretched(document) for document in documents]
    flat = [document.text[unit.start : unit.end] for document in documents for unit in document.units]
    counts = [] if sum(map(len, whole)) < _COUNTED else meter.units(flat)
    # A tokenizer may take minutes for megabytes of white space.
    blank = not flat and sum(map(len, whole)) > max(_COUNTED, 16 * meter.limit)
    if not blank and sum(counts) <= 2 * meter.limit and meter.fits(whole):
        units = [(part, index) for part, document in enumerate(original) for index in range(len(document.units))]
        return Extraction(tuple(whole), (), tuple(units))
    if not flat:
        return _blank(documents, meter)
    costs = by_document(documents, counts or meter.units(flat))
    items = items_of(documents, costs)
    field = field_of(documents, flat)
    repeats = duplicates(field)

    def order_of(items: Sequence[Item]) -> Order:
        if values is None:
            return by_worth(field, items, repeats, taste)
        given = np.zeros(len(flat))
        worth = [value for row in values for value in row]
        given[: len(worth)] = worth
        return by_value(items, given, taste.seed)

    cutter = Cutter(documents, meter, costs, items, order_of(items))
    if cutter.tight():
        items = items_of(documents, costs, tight=True)
        cutter = Cutter(documents, meter, costs, items, order_of(items))
    draft = fit(cutter)
    return Extraction(tuple(cutter.texts(draft)), _dropped(cutter, draft, repeats), _kept(original, draft))


def _long(documents: Sequence[Document], meter: Meter, taste: Taste) -> Extraction:
    """Long documents lose, chunk by chunk, what would not win against the rest of its chunk; then all race."""
    if not any(document.units for document in documents):
        return _short(documents, meter, taste)
    pairs = [narrowed(document, meter, taste) for document in documents]
    found = _short([document for document, _ in pairs], meter, taste)
    kept = {(part, pairs[part][1][index]) for part, index in found.kept}
    raced = {(part, index) for part, (_, indices) in enumerate(pairs) for index in indices}
    early = [
        DroppedUnit(document.text[unit.start : unit.end], unit.kind, "value", part)
        for part, document in enumerate(documents)
        for index, unit in enumerate(document.units)
        if (part, index) not in raced
    ]
    return Extraction(found.texts, (*found.dropped, *early), tuple(sorted(kept)))


def _blank(documents: Sequence[Document], meter: Meter) -> Extraction:
    """Of documents that are nothing but white space: one character of the first."""
    texts = [document.text if document.whole else "" for document in documents]
    first = next((part for part, document in enumerate(documents) if document.text), None)
    if first is not None and not any(texts):
        texts[first] = documents[first].text[:1]
    total = meter.total(texts)
    if total > meter.limit:
        name = meter.tokenizer.name
        raise BudgetInfeasible(minimum=total, limit=meter.limit, tokenizer=name, because="the text is white space")
    return Extraction(tuple(texts), (), ())


def _kept(documents: Sequence[Document], draft: Draft) -> tuple[tuple[int, int], ...]:
    return tuple(
        (part, index)
        for part, document in enumerate(documents)
        for index in range(len(document.units))
        if draft.stays(part, index)
    )


def _dropped(cutter: Cutter, draft: Draft, repeats: dict[int, int]) -> tuple[DroppedUnit, ...]:
    out: list[DroppedUnit] = []
    row = 0
    stays = [draft.stays(part, index) for part, doc in enumerate(cutter.documents) for index in range(len(doc.units))]
    for part, document in enumerate(cutter.documents):
        for index, unit in enumerate(document.units):
            atoms = draft.cuts[part].get(index)
            if atoms is not None:
                left = cutter.pieces[part].left_out(index, atoms)
                out += [DroppedUnit(text, unit.kind, "cut", part) for text in left]
            elif not stays[row]:
                said = row in repeats and stays[repeats[row]]
                text = document.text[unit.start : unit.end]
                out.append(DroppedUnit(text, unit.kind, "duplicate" if said else "value", part))
            row += 1
    return tuple(out)
