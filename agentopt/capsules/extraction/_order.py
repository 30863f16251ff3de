"""The order in which units are taken: worth by kind, and by a question, by coverage, or as given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from agentopt.capsules._options import Scorer
from agentopt.capsules.extraction._coverage import cover
from agentopt.capsules.extraction._demos import label_of, spread
from agentopt.capsules.extraction._field import Field, jittered
from agentopt.capsules.extraction._items import Item
from agentopt.capsules.extraction._relevance import relevance
from agentopt.capsules.extraction._select import by_question
from agentopt.capsules.extraction._terms import Floats, Ints, table

_KIND = {"instruction": 0.8, "constraint": 0.9, "schema": 0.9, "tool": 0.8, "turn": 0.1}
"""What a unit of a kind is worth beside its relevance, which is at most 1; the others are worth nothing by kind."""
Order = Callable[[float], list[int]]
"""All items, the one to take first first, given the tokens there are to spend."""


@dataclass(frozen=True, slots=True)
class Taste:
    """What makes a unit worth keeping."""

    query: str | None
    """What will be asked; None for coverage."""
    scorer: Scorer
    """`embedding` adds the meaning of sentences."""
    seed: int
    """Decides between equals."""


def by_worth(
    field: Field,
    items: Sequence[Item],
    repeats: dict[int, int],
    taste: Taste,
) -> Order:
    """By what units say and of what kind they are.

    Args:
        field: All units.
        items: What may leave.
        repeats: For each row that repeats an earlier one, that row.
        taste: What is asked for.
    """
    query, seed = taste.query, taste.seed
    kinds = np.asarray([_KIND.get(field.kinds[item.rows[0]], 0.0) for item in items])
    fresh = np.asarray([not all(row in repeats for row in item.rows) for item in items], dtype=np.float64)
    meaning = None
    if taste.scorer == "embedding":
        from agentopt.capsules.extraction._embedding import Encoder

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


def by_value(items: Sequence[Item], values: Floats, seed: int) -> Order:
    """By given worths of all units, the highest first."""
    worth = jittered(np.asarray([float(values[list(item.rows)].mean()) for item in items]), seed)
    order = _short_last(items, np.argsort(-worth, kind="stable").tolist())
    return lambda room: order


def _short_last(items: Sequence[Item], order: Sequence[int]) -> list[int]:
    """Demonstrations without their rationale come after everything that is whole."""
    return [n for n in order if not items[n].short] + [n for n in order if items[n].short]
