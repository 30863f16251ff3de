"""The final pick among near ties.

The best of many on one validation set is partly luck. Candidates that the validation rows cannot tell apart are
compared on every row already paid for, training rows included (except those either shows as a demonstration), and
what is left of the budget buys more training rows for them. A candidate that validation puts clearly behind is never
picked.
"""

from __future__ import annotations

from collections.abc import Sequence

from agentopt.graph import Candidate
from agentopt.search._board import Board
from agentopt.search._budget import OutOfBudget
from agentopt.search._objectives import means
from agentopt.search._pool import Pool
from agentopt.search._racing import behind

FINALISTS = 4
_BEHIND = 0.2


def near_ties(
    board: Board, pool: Pool, baseline: Candidate, others: Sequence[Candidate] | None = None
) -> list[Candidate]:
    """The leader and those of the top that validation does not put behind it; the baseline only when it leads.

    `others` are looked at instead of the top few.
    """
    leader = pool.best.candidate
    ties = [leader]
    for candidate in [entry.candidate for entry in pool.top(FINALISTS)] if others is None else others:
        if candidate in (leader, baseline):
            continue
        if not behind(board.paired(leader, candidate, "validation"), _BEHIND):
            ties.append(candidate)
    return ties


async def playoff(board: Board, ties: Sequence[Candidate], train: Sequence[str], block: int) -> Candidate:
    """Give the tied candidates more training rows while the budget lasts, and return the best on all rows."""
    hidden = frozenset[str]().union(*(board.shown(candidate) for candidate in ties))
    rows = [row_id for row_id in train if row_id not in hidden]
    live = list(ties)
    for start in range(0, len(rows), block):
        if len(live) == 1:
            break
        try:
            await board.run_many(live, "train", rows[start : start + block])
        except OutOfBudget:
            break
        leader = best_pooled(board, live)
        live = [c for c in live if c is leader or not behind(_pooled(board, leader, c), _BEHIND)]
    return best_pooled(board, live)


def best_pooled(board: Board, ties: Sequence[Candidate]) -> Candidate:
    """The candidate with the best mean over rows of train and validation; the validation order breaks ties.

    Everyone is compared with the first (the validation leader) on the rows that both have.
    """
    first = ties[0]
    best, best_mean = first, 0.0
    for candidate in ties[1:]:
        diffs = _pooled(board, first, candidate)
        mean = sum(diffs) / len(diffs) if diffs else 0.0
        if mean > best_mean:
            best, best_mean = candidate, mean
    return best


def _pooled(board: Board, a: Candidate, b: Candidate) -> list[float]:
    return board.paired(a, b, "validation") + board.paired(a, b, "train")


def cheapest(board: Board, ties: Sequence[Candidate], names: Sequence[str]) -> Candidate:
    """Of candidates that the score does not tell apart, the best in the first further objective that differs."""
    others = [name for name in names if name != "score"]
    values = [means(board.rows(candidate, "validation"), others) for candidate in ties]
    best = max(range(len(ties)), key=lambda at: ([values[at][name] for name in others], -at))
    return ties[best]
