"""How relevant each unit is to a question: BM25, a second hop, and the passages that relevant units name.

A unit is scored with the title of its passage. A second search adds the best units' terms to the question (two hops).
A passage as a whole, and a passage whose title the question names, lend their units weight. Then the bridge: a passage
whose title a relevant unit mentions is where the next fact is, and a unit that mentions a relevant passage leads to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from agentopt.capsules.extraction._bm25 import Bm25, normalised
from agentopt.capsules.extraction._field import Field
from agentopt.capsules.extraction._terms import Floats, Ints, Table

_TOP = 3
"""Units whose terms the second search adds."""
_NAMED = 0.7
"""Share of a title's weight that a text must hold to count as naming it."""
_BRIDGES = 64
"""Relevant units (and passages) from which bridges are followed."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What each kind of evidence is worth beside the unit's own BM25, which is 1 for the best unit."""

    hop: float = 0.5
    passage: float = 0.4
    title: float = 0.4
    opening: float = 0.2
    bridge: float = 0.6
    bridge_opening: float = 0.3
    leads: float = 0.2
    pronoun: float = 0.5
    meaning: float = 0.8


DEFAULT = Weights()


@dataclass(frozen=True, slots=True)
class Relevance:
    """The score of each row, the best being 1, and what of the question each row answers to."""

    scores: Floats
    facets: list[Ints]
    """The question's terms (their place in `shares`) in each row or its title."""
    shares: Floats
    """The weight of each of the question's terms; they sum to 1."""


def relevance(
    field: Field,
    query: str,
    *,
    meaning: Callable[[Sequence[int]], Floats] | None = None,
    weights: Weights | None = None,
) -> Relevance:
    """Score every row of `field` for `query`.

    Args:
        field: The units.
        query: The question.
        meaning: Cosine similarity of some rows with the question, where an encoder is at hand.
        weights: What counts how much; None for the usual.
    """
    weights = weights or DEFAULT
    asked = [number for number in dict.fromkeys(field.vocabulary.read(query)) if number < field.own.size]
    titled = field.with_titles()
    search = Bm25(titled)
    plain = search.scores(dict.fromkeys(asked, 1.0))
    scores = normalised(plain) + weights.hop * normalised(search.scores(_expanded(asked, titled, plain)))
    whole = Bm25(field.passages())
    share = _Shares(field.titles, whole.idf)
    scores += weights.passage * normalised(whole.scores(dict.fromkeys(asked, 1.0)))[field.passage]
    scores += weights.title * share.of(asked)[field.passage]
    opening = (field.position == 0).astype(np.float64)
    scores += weights.opening * opening * (scores > 0)
    if meaning is not None:
        scores += weights.meaning * _meant(scores, meaning)
    scores = _bridged(field, scores, share, opening, weights)
    for row in field.follows() if weights.pronoun else ():
        scores[row - 1] = max(scores[row - 1], weights.pronoun * scores[row])
    return Relevance(normalised(scores), *_facets(titled, asked, search.idf))


def _expanded(asked: Sequence[int], titled: Table, plain: Floats) -> dict[int, float]:
    """The question with the terms of the best units."""
    query = dict.fromkeys(asked, 1.0)
    for row in np.argsort(-plain, kind="stable")[:_TOP].tolist():
        if plain[row] > 0:
            query.update(dict.fromkeys(titled.of(row).tolist(), 1.0))
    return query


def _meant(scores: Floats, meaning: Callable[[Sequence[int]], Floats]) -> Floats:
    """Similarity of meaning for the rows that the words rank highest; an encoder is too slow for all of a long text."""
    looked = np.argsort(-scores, kind="stable")[:256]
    out = np.zeros(len(scores))
    out[looked] = np.clip(meaning(looked.tolist()), 0.0, None)
    return normalised(out)


class _Shares:
    """How much of each title's weight a set of terms holds."""

    def __init__(self, titles: Sequence[Sequence[int]], idf: Floats) -> None:
        self._terms = np.asarray([term for title in titles for term in title], dtype=np.int64)
        self._titles = np.repeat(np.arange(len(titles)), [len(title) for title in titles])
        self._weights = idf[self._terms] if len(self._terms) else np.zeros(0)
        total = np.bincount(self._titles, weights=self._weights, minlength=len(titles))
        self._total = np.where(total > 0, total, 1.0)
        self._size = len(idf)

    def of(self, terms: Sequence[int] | Ints) -> Floats:
        """Between 0 and 1 for each title."""
        has = np.zeros(self._size)
        has[np.asarray(terms, dtype=np.int64)] = 1.0
        held = np.bincount(self._titles, weights=self._weights * has[self._terms], minlength=len(self._total))
        return held / self._total


def _bridged(field: Field, scores: Floats, share: _Shares, opening: Floats, weights: Weights) -> Floats:
    """Scores with what is due for naming and for being named."""
    relevant = normalised(scores)
    passages = len(field.titles)
    best = np.zeros(passages)
    np.maximum.at(best, field.passage, relevant)
    strongest = np.zeros(passages, dtype=bool)
    strongest[np.argsort(-best, kind="stable")[:_BRIDGES]] = True
    named, leads = np.zeros(passages), np.zeros(len(scores))
    for row in np.argsort(-relevant, kind="stable")[: 4 * _BRIDGES].tolist():
        if relevant[row] <= 0:
            break
        held = share.of(field.own.of(row))
        held = np.where(held >= _NAMED, held, 0.0)
        held[field.passage[row]] = 0.0
        named = np.maximum(named, held * relevant[row])
        leads[row] = float((held * best * strongest).max())
    bridge = named[field.passage]
    return scores + (weights.bridge + weights.bridge_opening * opening) * bridge + weights.leads * leads


def _facets(titled: Table, asked: Sequence[int], idf: Floats) -> tuple[list[Ints], Floats]:
    """Which of the question's terms each row holds, and the terms' shares of the question's weight."""
    place = np.full(titled.size, -1, dtype=np.int64)
    place[np.asarray(asked, dtype=np.int64)] = np.arange(len(asked))
    where = place[titled.columns]
    inside = where >= 0
    rows, found = titled.rows[inside], where[inside]
    starts = np.searchsorted(rows, np.arange(titled.texts + 1))
    shares = idf[np.asarray(asked, dtype=np.int64)] if asked else np.zeros(0)
    total = float(shares.sum())
    facets = [found[starts[row] : starts[row + 1]] for row in range(titled.texts)]
    return facets, shares / total if total else shares
