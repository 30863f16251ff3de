"""Pareto fronts over single examples, as GEPA keeps them (arXiv 2507.19457, algorithm 2), as pure functions.

Candidates are numbers in the order in which they came in; scores are maps from a key (an example, or an objective) to a
score. Randomness is a `random.Random` that the caller owns, drawn from in a fixed order.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


def fronts(scores: Sequence[Mapping[Key, float]]) -> dict[Key, set[int]]:
    """For each key the candidates with the best score there; keys in the order of the first candidate that has them."""
    best: dict[Key, float] = {}
    found: dict[Key, set[int]] = {}
    for number, known in enumerate(scores):
        for key, score in known.items():
            if key not in best or score > best[key]:
                best[key], found[key] = score, {number}
            elif score == best[key]:
                found[key].add(number)
    return found


def undominated(front: Mapping[Key, set[int]], means: Sequence[float]) -> dict[Key, set[int]]:
    """The fronts without dominated candidates.

    Going through candidates from the lowest mean up, one is dropped when every front it stands in also holds another
    one that is still there; after each drop the search begins again.
    """
    order: list[int] = []
    for members in front.values():
        order += [number for number in sorted(members) if number not in order]
    kept = sorted(order, key=lambda number: means[number])
    while True:
        gone = next((number for number in kept if _covered(number, kept, front)), None)
        if gone is None:
            break
        kept.remove(gone)
    alive = set(kept)
    return {key: members & alive for key, members in front.items()}


def _covered(number: int, kept: Sequence[int], front: Mapping[Key, set[int]]) -> bool:
    others = set(kept) - {number}
    return all(members & others for members in front.values() if number in members)


def pick_parent(front: Mapping[Key, set[int]], means: Sequence[float], rng: random.Random) -> int:
    """One candidate of the pruned fronts, with probability proportional to the number of fronts it stands in."""
    counts: dict[int, int] = {}
    for members in undominated(front, means).values():
        for number in sorted(members):
            counts[number] = counts.get(number, 0) + 1
    return rng.choice([number for number, count in counts.items() for _ in range(count)])


def dominators(front: Mapping[Key, set[int]], means: Sequence[float]) -> list[int]:
    """The candidates that stand in some pruned front, ascending."""
    return sorted(set[int]().union(*undominated(front, means).values()))


class EpochBatches:
    """Minibatches without replacement: rows are shuffled each epoch, the last batch is padded with least-used rows."""

    def __init__(self, ids: Sequence[str], size: int, rng: random.Random) -> None:
        self._ids = list(ids)
        self._size = min(size, len(ids))
        self._rng = rng
        self._epoch = -1
        self._order: list[str] = []

    def batch(self, index: int) -> list[str]:
        """Minibatch `index`; indices must not go down."""
        start = index * self._size
        epoch = 0 if self._epoch == -1 else start // len(self._order)
        if epoch > self._epoch:
            self._epoch = epoch
            self._order = self._shuffled()
        start %= len(self._order)
        return self._order[start : start + self._size]

    def _shuffled(self) -> list[str]:
        order = list(self._ids)
        self._rng.shuffle(order)
        used = dict.fromkeys(order, 1)
        for _ in range(-len(order) % self._size):
            # Of the least used the one that was shuffled last, as in the reference.
            least = min(used.values())
            chosen = [row_id for row_id, count in used.items() if count == least][-1]
            order.append(chosen)
            used[chosen] += 1
        return order
