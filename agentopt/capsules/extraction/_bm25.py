"""BM25 over a table of terms, as the spec has it: k1 1.2, b 0.75."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from agentopt.capsules.extraction._terms import Floats, Table

K1, B = 1.2, 0.75


def idf(found: Table) -> Floats:
    """The weight of each term: high for what few texts hold, never negative."""
    frequency = found.document_frequency()
    return np.log1p((found.texts - frequency + 0.5) / (frequency + 0.5))


class Bm25:
    """Scores every text against weighted query terms."""

    def __init__(self, found: Table) -> None:
        self._table = found
        self.idf = idf(found)
        mean = float(found.lengths.mean()) if found.texts else 0.0
        norm = K1 * (1 - B + B * found.lengths / (mean or 1.0))
        self._weights = self.idf[found.columns] * found.counts * (K1 + 1) / (found.counts + norm[found.rows])

    def scores(self, query: Mapping[int, float]) -> Floats:
        """The score of each text; `query` holds the weight of each term number."""
        weight = np.zeros(self._table.size)
        for term, value in query.items():
            weight[term] = value
        products = self._weights * weight[self._table.columns]
        return np.bincount(self._table.rows, weights=products, minlength=self._table.texts).astype(np.float64)


def normalised(scores: Floats) -> Floats:
    """Scores divided by the highest."""
    top = float(scores.max()) if len(scores) else 0.0
    return scores / top if top > 0 else scores
