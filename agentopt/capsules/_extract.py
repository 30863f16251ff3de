"""The extractive engine: whole units, the ones worth most per token, within the limit; no model.

Each unit is worth something by its kind (instructions, constraints, schemas and tools much, demonstrations and passages
only what they say) and by what it says: for a question its relevance, without one what it adds to what is covered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from agentopt.capsules._coverage import cover
from agentopt.capsules._cut import fit
from agentopt.capsules._demos import label_of, spread
from agentopt.capsules._draft import Cutter, Draft
from agentopt.capsules._duplicates import duplicates
from agentopt.capsules._errors import BudgetInfeasible
from agentopt.capsules._field import Field, field_of, jittered
from agentopt.capsules._items import Item, items_of
from agentopt.capsules._options import Scorer
from agentopt.capsules._relevance import relevance
from agentopt.capsules._select import by_question
from agentopt.capsules._stretch import stretched
from agentopt.capsules._terms import Floats, Ints, table
from agentopt.capsules._tokens import Meter
from agentopt.capsules._types import Document, DroppedUnit
from agentopt.errors import UserError

_KIND = {"instruction": 0.8, "constraint": 0.9, "schema": 0.9, "tool": 0.8, "turn": 0.1}
"""What a unit of a kind is worth beside its relevance, which is at most 1; the others are worth nothing by kind."""
_LONG = 1 << 16
"""Characters from which a text whose units count more than twice the limit is not counted as a whole."""

Order = Callable[[float], list[int]]


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
    whole = [document.text for document in documents]
    documents = [stretched(document) for document in documents]
    flat = [document.text[unit.start : unit.end] for document in documents for unit in document.units]
    everything = Draft([[True] * len(document.units) for document in documents], [{} for _ in documents])
    counts = [] if sum(map(len, whole)) < _LONG else meter.units(flat)
    if sum(counts) <= 2 * meter.limit and meter.fits(whole):
        return Extraction(tuple(whole), (), _kept(documents, everything))
    if not flat:
        return _blank(documents, meter)
    costs = _by_document(documents, counts or meter.units(flat))
    items = items_of(documents, costs)
    field = field_of(documents, flat)
    repeats = duplicates(field)
    if values is not None:
        order = _by_value(items, np.asarray([value for row in values for value in row], dtype=np.float64), seed)
    else:
        order = _order(field, items, documents, repeats, asked if scorer != "coverage" else None, scorer, seed)
    cutter = Cutter(documents, meter, costs, items, order)
    draft = fit(cutter)
    return Extraction(tuple(cutter.texts(draft)), _dropped(cutter, draft, repeats), _kept(documents, draft))


def _order(
    field: Field,
    items: Sequence[Item],
    documents: Sequence[Document],
    repeats: dict[int, int],
    query: str | None,
    scorer: Scorer,
    seed: int,
) -> Order:
    """In which order items are taken."""
    kinds = np.asarray([_KIND.get(documents[item.part].units[item.units[0]].kind, 0.0) for item in items])
    fresh = np.asarray([not all(row in repeats for row in item.rows) for item in items], dtype=np.float64)
    meaning = None
    if scorer == "embedding":
        from agentopt.capsules._embedding import Encoder

        meaning = Encoder.load()
    if query is None:
        return _by_coverage(field, items, kinds, fresh, seed, None if meaning is None else meaning.typical(field.texts))
    found = relevance(field, query, meaning=None if meaning is None else meaning.similarity(query, field.texts))
    best = np.asarray([float(found.scores[list(item.rows)].max()) for item in items])
    values = jittered((best + kinds) * fresh, seed) if items else np.zeros(0)
    facets: list[Ints] = [
        found.facets[item.rows[0]]
        if len(item.rows) == 1
        else np.unique(np.concatenate([found.facets[r] for r in item.rows]))
        for item in items
    ]
    costs = [item.cost for item in items]
    return lambda room: _short_last(items, by_question(values, costs, facets, found.shares, room))


def _by_coverage(
    field: Field, items: Sequence[Item], kinds: Floats, fresh: Floats, seed: int, typical: Floats | None
) -> Order:
    """Lazy greedy by what is covered per token; demonstrations far from one another first."""
    lists = [[term for row in item.rows for term in field.lists[row]] for item in items]
    found = table(lists, field.own.size)
    costs = [item.cost for item in items]
    lead = np.asarray([1.0 if field.position[item.rows[0]] == 0 else 0.0 for item in items])
    if typical is not None:
        lead += np.asarray([float(typical[list(item.rows)].max()) for item in items])
    demos = [
        number for number, item in enumerate(items) if not item.short and field.kinds[item.rows[0]] == "demonstration"
    ]
    ranked: list[int] = []
    if demos:
        labels = [label_of(field.texts[items[number].rows[-1]]) for number in demos]
        ranked = [demos[place] for place in spread([lists[number] for number in demos], field.own.size, labels)]

    def order(room: float) -> list[int]:
        out = _short_last(items, cover(found, costs, kinds, lead, fresh, room, seed))
        # Where the cover takes a demonstration, the next of their own order stands.
        places = [place for place, number in enumerate(out) if number in known]
        for place, number in zip(places, ranked, strict=True):
            out[place] = number
        return out

    known = set(demos)
    return order


def _by_value(items: Sequence[Item], values: Floats, seed: int) -> Order:
    worth = jittered(np.asarray([float(values[list(item.rows)].mean()) for item in items]), seed)
    order = _short_last(items, np.argsort(-worth, kind="stable").tolist())
    return lambda room: order


def _short_last(items: Sequence[Item], order: Sequence[int]) -> list[int]:
    """Demonstrations without their rationale come after everything that is whole."""
    return [n for n in order if not items[n].short] + [n for n in order if items[n].short]


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


def _by_document(documents: Sequence[Document], counts: Sequence[int]) -> list[list[int]]:
    costs: list[list[int]] = []
    place = 0
    for document in documents:
        costs.append(list(counts[place : place + len(document.units)]))
        place += len(document.units)
    return costs


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
