"""The gate: challengers race on validation in blocks, each compared with the leader on the same prefix.

Only a challenger with all rows can be accepted, and only when its mean is above the incumbent's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from agentopt.graph import Candidate
from agentopt.search._board import Board
from agentopt.search._racing import behind, quota


@dataclass(slots=True)
class GateResult:
    """Who finished (all rows), and who was dropped: hash → (rows seen, reason)."""

    finished: list[Candidate] = field(default_factory=list[Candidate])
    dropped: dict[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])


@dataclass(frozen=True, slots=True)
class Gate:
    """One race. `order` is the run's fixed order of validation rows, `allotment` the rollouts it may take."""

    board: Board
    order: Sequence[str]
    block: int
    alpha: float
    allotment: float

    async def race(
        self,
        incumbent: Candidate,
        challengers: Sequence[Candidate],
        on_look: Callable[[int, list[Candidate], Candidate], None],
    ) -> GateResult:
        """Run the race; `on_look(rows, live, leader)` is called after each block.

        Raises:
            OutOfBudget: the next block does not fit any more; nobody else is accepted then.
        """
        result = GateResult()
        live = list(challengers)
        left = self.allotment
        total = len(self.order)
        done = 0
        live = self._cut(live, 0, left, result)
        while live and done < total:
            block = self.order[done : done + self.block]
            left -= sum(len(self.board.missing(candidate, "validation", block)) for candidate in live)
            await self.board.run_many(live, "validation", block)
            done += len(block)
            live = self._drop(incumbent, live, done, left, result)
            on_look(done, live, self._leader(incumbent, live, done))
        result.finished = live
        return result

    def _leader(self, incumbent: Candidate, live: Sequence[Candidate], done: int) -> Candidate:
        prefix = self.order[:done]
        return max([incumbent, *live], key=lambda c: self.board.mean(c, "validation", prefix))

    def _drop(
        self, incumbent: Candidate, live: list[Candidate], done: int, left: float, result: GateResult
    ) -> list[Candidate]:
        if done >= len(self.order):
            return live
        prefix = self.order[:done]
        leader = self._leader(incumbent, live, done)
        staying: list[Candidate] = []
        for candidate in live:
            diffs = self.board.paired(leader, candidate, "validation", prefix)
            if candidate is not leader and behind(diffs, self.alpha):
                mean = sum(diffs) / len(diffs)
                result.dropped[candidate.hash] = (done, f"behind the leader by {-mean:.3f} on {done} validation rows")
            else:
                staying.append(candidate)
        return self._cut(staying, done, left, result)

    def _cut(self, live: list[Candidate], done: int, left: float, result: GateResult) -> list[Candidate]:
        """Thin the field to what the allotment carries; before the first block the screen's order decides."""
        keep = quota(len(live), done, len(self.order), self.block, left)
        if keep >= len(live):
            return live
        prefix = self.order[:done]
        ranked = sorted(live, key=lambda c: -self.board.mean(c, "validation", prefix))  # stable: earlier wins
        for candidate in ranked[keep:]:
            result.dropped[candidate.hash] = (done, f"not among the best {keep} after {done} validation rows")
        return [candidate for candidate in live if candidate in ranked[:keep]]
