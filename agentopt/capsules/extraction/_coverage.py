"""What to keep when no question is known: units that together cover the text's weighty terms, by lazy greedy.

The value of a set is a weighted cover: each term counts once, by how rare and how often used it is. The cover is
submodular, so gains only fall and a heap of old gains is an upper bound (lazy greedy). Greedy by gain per token alone
can be arbitrarily bad for a knapsack; compared with the best single unit it keeps a constant factor of the optimum.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from agentopt.capsules.extraction._field import jittered
from agentopt.capsules.extraction._terms import Floats, Table

_LEAD = 0.5
"""What the first unit of a passage is worth beside its terms, per square root of its tokens."""


def term_weights(found: Table) -> Floats:
    """The worth of covering each term: used more often is worth more (slowly), in every text is worth little."""
    frequency = found.document_frequency()
    totals = np.bincount(found.columns, weights=found.counts, minlength=found.size)
    rarity = np.log1p(found.texts / np.maximum(frequency, 1.0))
    return np.log1p(totals) * rarity


def cover(
    found: Table, costs: Sequence[int], kinds: Floats, lead: Floats, fresh: Floats, limit: float, seed: int
) -> list[int]:
    """Rows, the one to take first first: as lazy greedy takes them within `limit`, then the rest by gain per token.

    Args:
        found: The terms of each row.
        costs: Tokens of each row.
        kinds: What a row is worth by its kind, as a share of what is worth most per token.
        lead: What a row is worth by its place, in the same measure but little.
        fresh: 0 for a row that repeats another one.
        limit: Tokens to spend.
        seed: Decides between equals.
    """
    if not found.texts:
        return []
    weights = term_weights(found)
    price = np.maximum(np.asarray(costs, dtype=np.float64), 1.0)
    gains = np.bincount(found.rows, weights=weights[found.columns], minlength=found.texts)
    high = float(np.quantile(gains / price, 0.95))
    extra = jittered((kinds * price + _LEAD * lead * np.sqrt(price)) * high, seed)
    first = (gains + extra) * fresh
    fixed = (extra * fresh).tolist()
    prices = price.tolist()
    repeated = (fresh == 0).tolist()
    heap = [(-gain, row) for row, gain in enumerate((first / price).tolist())]
    heapq.heapify(heap)
    order: list[int] = []
    spent = worth = 0.0
    while heap:
        bound, row = heapq.heappop(heap)
        if spent + prices[row] > limit:
            continue
        mine = found.of(row)
        gain = 0.0 if repeated[row] else (float(weights[mine].sum()) + fixed[row]) / prices[row]
        if heap and gain < -heap[0][0] and gain < -bound - 1e-12:
            heapq.heappush(heap, (-gain, row))
            continue
        order.append(row)
        spent += prices[row]
        worth += gain * prices[row]
        weights[mine] = 0.0
    single = int(np.where(price <= limit, first, -1.0).argmax())
    if price[single] <= limit and first[single] > worth:
        order = [single, *(row for row in order if row != single)]
    taken = set(order)
    late = sorted((row for row in range(found.texts) if row not in taken), key=lambda row: -first[row] / prices[row])
    return order + late
