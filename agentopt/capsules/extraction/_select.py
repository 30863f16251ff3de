"""In which order units are taken: for a question by worth and by what of it is still unanswered, else by coverage."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from agentopt.capsules.extraction._terms import Floats, Ints

_SIZE = 0.2
"""How much a unit's size counts against it: worth is divided by tokens to this power. A long answer is still one."""
_ANSWERED = 0.6
"""How much a unit's worth falls when everything it answers to was answered by others."""
_LEFT = 0.5
"""Share of a question term that is still open after a unit that holds it."""
_CLOSED = 0.05
"""Share below which a term counts as answered."""


def by_question(values: Floats, costs: Sequence[int], facets: Sequence[Ints], shares: Floats, room: float) -> list[int]:
    """Rows, the one to take first first, then the rest by worth.

    Args:
        values: The worth of each row.
        costs: Tokens of each row.
        facets: What of the question each row answers to.
        shares: The weight of each part of the question.
        room: Tokens to spend.
    """
    size = (np.maximum(np.asarray(costs, dtype=np.float64), 1.0) ** _SIZE).tolist()
    worth: list[float] = values.tolist()
    share: list[float] = (_ANSWERED * shares).tolist()
    open_ = [1.0] * len(share)
    answers: list[list[int]] = [mine.tolist() for mine in facets]
    heap = [(-value / size[row], row) for row, value in enumerate(worth)]
    heapq.heapify(heap)
    chosen: list[int] = []
    late: list[int] = []
    spent = 0.0
    while heap:
        bound, row = heapq.heappop(heap)
        if spent + costs[row] > room:
            late.append(row)
            continue
        mine = answers[row]
        answered = sum(share[one] * (1.0 - open_[one]) for one in mine)
        now = (worth[row] - answered) / size[row]
        if now < -bound - 1e-12 and heap and now < -heap[0][0]:
            heapq.heappush(heap, (-now, row))
            continue
        for one in mine:
            if open_[one] > _CLOSED:  # beyond that nothing changes any more, so nothing is weighed again
                open_[one] *= _LEFT
        chosen.append(row)
        spent += costs[row]
    return chosen + late
