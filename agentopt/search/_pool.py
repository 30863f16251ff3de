"""The best candidates so far, as possible parents."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from agentopt.graph import Candidate


@dataclass(frozen=True, slots=True)
class PoolEntry:
    """A candidate with its mean over all validation rows; `order` is when it came in (0 = baseline)."""

    candidate: Candidate
    score: float
    order: int


class Pool:
    """A true top-k: holds the `size` best entries by score, earlier entries first on a tie.

    A bounded memory that keeps the worst entries is a defect seen elsewhere (D11); here what leaves is always the entry
    with the lowest score.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: list[PoolEntry] = []
        self._count = 0

    def add(self, candidate: Candidate, score: float) -> bool:
        """Put a candidate in; returns whether it stayed among the top k. A hash that is already there is ignored."""
        if any(entry.candidate.hash == candidate.hash for entry in self._entries):
            return False
        entry = PoolEntry(candidate, score, self._count)
        self._count += 1
        bisect.insort(self._entries, entry, key=lambda e: (-e.score, e.order))
        dropped = self._entries[self._size :]
        del self._entries[self._size :]
        return entry not in dropped

    def top(self, k: int) -> list[PoolEntry]:
        """The `k` best, best first."""
        return self._entries[:k]

    @property
    def best(self) -> PoolEntry:
        """The entry with the highest score."""
        return self._entries[0]

    def __iter__(self) -> Iterator[PoolEntry]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
