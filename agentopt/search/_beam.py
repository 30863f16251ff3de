"""The beam driver: every round works on the `width` best candidates alike and keeps the best of parents and children.

The breadth costs proposals that greedy would spend on the leader; it pays where the leader is a dead end (ProTeGi's
search, arXiv 2305.03495, and upstream Trace's beam).
"""

from __future__ import annotations

from dataclasses import dataclass

from agentopt.errors import UserError
from agentopt.search._driver import SearchState, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Beam:
    """Settings of the search.

    Raises:
        UserError: a number below one.
    """

    width: int = 4
    """Parents of one round."""
    children: int = 2
    """Proposals of each parent, as far as the budget carries them."""
    name: str = "beam"

    def __post_init__(self) -> None:
        for label in ("width", "children"):
            if getattr(self, label) < 1:
                raise UserError(f"Beam: {label} must be at least 1; found {getattr(self, label)!r}.")

    def next(self, state: SearchState) -> Step | str:
        """The next round, or why there is none."""
        sizes = state.sizes
        if state.left is not None and state.left < sizes.smallest:
            return f"budget: {state.left} rollouts left, one more proposal takes up to {sizes.smallest}"
        if state.proposals_left is not None and state.proposals_left <= 0:
            return "budget: proposals used up"
        parents = [entry.candidate for entry in state.pool.top(self.width)]
        # A full round: every child screened, and half as many validations as the beam is wide.
        each = (2 * sizes.batch + self.children * sizes.batch) * sizes.repeats
        gate = max(1, self.width // 2) * sizes.validation * sizes.repeats
        if state.left is not None:
            parents = parents[: max(1, int((state.left - gate) / each))]
        # The first round has one parent: it makes the whole first generation.
        count = self.children * self.width if len(parents) == 1 else self.children
        if state.proposals_left is not None:
            parents = parents[: max(1, state.proposals_left // count)]
            count = min(count, state.proposals_left)
        wanted = len(parents) * each + gate
        return Step(
            parents=tuple((parent, count) for parent in parents),
            allotment=wanted if state.left is None else max(sizes.smallest, min(state.left, wanted)),
        )
