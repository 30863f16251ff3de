"""How many candidates go on to the next look, and which of them are clearly behind.

Successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943) over the minibatch thins a pool of cheap proposals; on
validation the race drops what is significantly behind the leader on the same prefix (CAPO, arXiv 2504.16005).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from agentopt.evaluation import wilcoxon

KEEP = 0.4
"""Share of the pool that goes from the first half of the minibatch to the whole of it."""
_FIRST_LOOK = 0.5
_CUTS = (0.2, 0.4, 0.7)
"""Shares of validation after which the race is halved when the allotment cannot carry everybody."""


def first_look(batch: int, pool: int) -> int:
    """Rows of the minibatch that a large pool is looked at first; small pools get all of it at once."""
    return batch if pool <= 4 else max(1, math.ceil(batch * _FIRST_LOOK))


def screen_cost(batch: int) -> float:
    """Rollouts that one member of a large pool takes on average before the gate."""
    first = math.ceil(batch * _FIRST_LOOK)
    return first + (batch - first) * KEEP


def gate_cost(rows: int) -> float:
    """Validation rollouts that one challenger takes on average in a race that is halved at every cut."""
    shares = [*_CUTS, 1.0]
    total, alive, before = 0.0, 1.0, 0.0
    for share in shares:
        total += alive * (share - before)
        alive, before = alive / 2, share
    return total * rows


def keep_best(standing: Mapping[str, float], order: Sequence[str], count: int) -> list[str]:
    """The `count` best by standing, in that order; the earlier proposal wins a tie."""
    rank = {key: i for i, key in enumerate(order)}
    return sorted(order, key=lambda key: (-standing[key], rank[key]))[: max(0, count)]


def behind(diffs: Sequence[float], alpha: float) -> bool:
    """Whether paired differences (challenger minus leader) lie below zero at the one-sided level `alpha`."""
    return bool(diffs) and sum(diffs) < 0 and wilcoxon(diffs, "less") < alpha


def quota(alive: int, done: int, total: int, block: int, allotment: float) -> int:
    """How many of `alive` challengers may go on after `done` of `total` rows with `allotment` rollouts to spend."""
    if alive * (total - done) <= allotment:
        return alive
    passed_cut = any(done - block < share * total <= done for share in _CUTS)
    halved = math.ceil(alive / 2) if passed_cut else alive
    # One must still be able to finish after everybody's next block, else all of it was for nothing.
    after = max(0, total - done - block)
    fits = int((allotment - after) // min(block, max(1, total - done)))
    return max(1, min(halved, fits))
