"""What to keep when no question is known: units that together cover the text's weighty terms, by lazy greedy.

The value of a set is a weighted cover: each term counts once, by how rare and how often used it is. The cover is
submodular, so gains only fall and a heap of old gains is an upper bound (lazy greedy). Greedy by gain per token alone
can be arbitrarily bad for a knapsack; compared with the best single unit it keeps a constant factor of the optimum.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from agentopt.capsules._terms import Floats, Table


def term_weights(found: Table) -> Floats:
    """The worth of covering each term: used more often is worth more (slowly), in every text is worth little."""
    frequency = found.document_frequency()
    totals = np.bincount(found.columns, weights=found.counts, minlength=found.size)
    rarity = np.log1p(found.texts / np.maximum(frequency, 1.0))
    return np.log1p(totals) * rarity


def cover(found: Table, costs: Sequence[int], extra: Floats, limit: float, taken: Sequence[int] = ()) -> list[int]:
    """Rows in the order in which lazy greedy takes them, until everything that fits `limit` is in or has no gain.

    Args:
        found: The terms of each row.
        costs: Tokens of each row.
        extra: What a row is worth beside its terms.
        limit: Tokens to spend.
        taken: Rows whose terms are covered from the start.
    """
    weights = term_weights(found)
    for row in taken:
        weights[found.of(row)] = 0.0
    first = extra + np.bincount(found.rows, weights=weights[found.columns], minlength=found.texts)
    price = np.maximum(np.asarray(costs, dtype=np.float64), 1.0)
    out = set(taken)
    heap = [(-gain, row) for row, gain in enumerate((first / price).tolist()) if row not in out]
    heapq.heapify(heap)
    order: list[int] = []
    spent = 0.0
    while heap:
        bound, row = heapq.heappop(heap)
        if spent + price[row] > limit:
            continue
        mine = found.of(row)
        gain = (float(weights[mine].sum()) + float(extra[row])) / float(price[row])
        if heap and gain < -heap[0][0] - 1e-12 and gain < -bound:
            heapq.heappush(heap, (-gain, row))
            continue
        order.append(row)
        spent += float(price[row])
        weights[mine] = 0.0
    single = _best_single(first, price, limit, out)
    if single is not None and single not in order and first[single] > float(sum(first[row] for row in order)):
        return [single, *order]
    return order


def _best_single(first: Floats, price: Floats, limit: float, out: set[int]) -> int | None:
    """The row that alone is worth most among those that fit."""
    worth = np.where(price <= limit, first, -1.0)
    worth[list(out)] = -1.0
    best = int(worth.argmax()) if len(worth) else 0
    return best if len(worth) and worth[best] >= 0 else None
