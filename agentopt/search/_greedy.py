"""The greedy driver: a race over many cheap proposals, then rounds that build on the best few.

Each round may take a fixed share of what is left, so early rounds look at many different ideas and later ones refine
the winner, and there is always enough for a full validation at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from agentopt.graph import Candidate
from agentopt.search._driver import SearchState, Step
from agentopt.search._racing import screen_cost

UNBOUNDED_ROUND = 12
"""Allotment, in fully evaluated proposals, of a round when nothing bounds the rollouts."""


@dataclass(frozen=True, slots=True)
class Greedy:
    """Works on the `beam` best candidates; `share` of the remaining rollouts goes into each round.

    The first round gets more: it alone looks at ideas of every kind, the others refine what won.
    """

    first_share: float = 0.45
    share: float = 0.35
    gate_rows: float = 2.0
    """Validation passes that a round sets aside for its gate."""
    near: float = 0.25
    """Runner-ups within this many times 1/sqrt(validation rows) of the best share its rounds."""
    name: str = "greedy"

    def next(self, state: SearchState) -> Step | str:
        """The next round, or why there is none."""
        smallest = state.sizes.smallest
        if state.left is not None and state.left < smallest:
            return f"budget: {state.left} rollouts left, one more proposal takes up to {smallest}"
        if state.proposals_left is not None and state.proposals_left <= 0:
            return "budget: proposals used up"
        share = self.first_share if state.iteration == 0 else self.share
        if state.left is None:
            allotment = UNBOUNDED_ROUND * smallest
        elif state.left < 2 * smallest:
            allotment = state.left
        else:
            allotment = max(smallest, min(state.left - smallest, int(state.left * share)))
        count = self._count(state, allotment)
        return Step(parents=self._parents(state, count), allotment=allotment)

    def _count(self, state: SearchState, allotment: int) -> int:
        sizes = state.sizes
        rows = allotment / sizes.repeats
        gate = min(self.gate_rows * sizes.validation, rows / 2)
        pool = (rows - gate - sizes.batch) / screen_cost(sizes.batch)
        count = max(1, min(state.options.max_round, int(pool)))
        return count if state.proposals_left is None else min(count, state.proposals_left)

    def _parents(self, state: SearchState, count: int) -> tuple[tuple[Candidate, int], ...]:
        # A runner-up is worth a share of the round only while validation hardly tells it from the best.
        near = state.pool.best.score - self.near / math.sqrt(state.sizes.validation)
        top = [entry.candidate for entry in state.pool.top(state.options.beam) if entry.score >= near]
        if len(top) == 1 or count < 4:
            # With few proposals a round, every third one gives the runner-up a try.
            chosen = top[1] if len(top) > 1 and state.iteration % 3 == 2 else top[0]
            return ((chosen, count),)
        first = count - (count * 2 // 5)
        rest = count - first
        others = top[1:]
        shares = [rest // len(others) + (1 if i < rest % len(others) else 0) for i in range(len(others))]
        return ((top[0], first), *((c, n) for c, n in zip(others, shares, strict=True) if n > 0))
