"""The islands driver: MAP-Elites (arXiv 1504.04909) on several islands, for searches where variety matters.

Each island keeps the best candidate of every cell of a grid: how long the texts are and how many demonstrations there
are. So a short prompt does not have to beat a long one to stay alive. Islands take turns; now and then each hands its
best elite to the next. A child is looked at on a minibatch, then on half of validation; only one that could be the best
of all gets every row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from agentopt.errors import UserError
from agentopt.graph import Candidate
from agentopt.search._objectives import better
from agentopt.search._propose import Proposal

if TYPE_CHECKING:
    from agentopt.search._lab import Lab

Cell = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Islands:
    """Settings of the search.

    Raises:
        UserError: a number below one.
    """

    count: int = 3
    """Islands, which take turns."""
    children: int = 3
    """Proposals of one turn."""
    migrate_every: int = 2
    """Rounds over all islands between two migrations."""
    best_share: float = 0.3
    """Share of turns in which the island's best elite is the parent; otherwise any of its elites."""
    patience: int = 24
    """Turns without a better validation mean."""
    name: str = "islands"

    def __post_init__(self) -> None:
        for label in ("count", "children", "migrate_every", "patience"):
            if getattr(self, label) < 1:
                raise UserError(f"Islands: {label} must be at least 1; found {getattr(self, label)!r}.")
        if not 0 <= self.best_share <= 1:
            raise UserError(f"Islands: best_share must lie between 0 and 1; found {self.best_share!r}.")

    async def run(self, lab: Lab) -> str:
        """Search to the end and say why it ended."""
        return await _Run(self, lab).search()


@dataclass
class _Run:
    settings: Islands
    lab: Lab
    grids: list[dict[Cell, Candidate]] = field(default_factory=list[dict[Cell, Candidate]])

    def __post_init__(self) -> None:
        base = self.lab.baseline
        self.half = list(self.lab.order[: math.ceil(len(self.lab.order) / 2)])
        self.grids = [{cell_of(base): base} for _ in range(self.settings.count)]

    async def search(self) -> str:
        lab = self.lab
        while True:
            reason = lab.stop(self.settings.patience) or self._unaffordable()
            if reason is not None:
                return reason
            async with lab.turn():
                island = lab.iteration % self.settings.count
                rounds, first = divmod(lab.iteration, self.settings.count)
                if first == 0 and rounds and rounds % self.settings.migrate_every == 0:
                    self._migrate()
                await self._turn(island)

    def _unaffordable(self) -> str | None:
        needed = self.lab.sizes.smallest
        if self.lab.affords(needed):
            return None
        return f"budget: {self.lab.left} rollouts left, one more proposal takes up to {needed}"

    def _mean(self, candidate: Candidate) -> float:
        return self.lab.board.mean(candidate, "validation", self.half)

    def _best(self, grid: dict[Cell, Candidate]) -> Candidate:
        return max(grid.values(), key=self._mean)  # the earliest of equals: cells are in order of arrival

    def _migrate(self) -> None:
        leaving = [self._best(grid) for grid in self.grids]
        for place, candidate in enumerate(leaving):
            self._settle_in(self.grids[(place + 1) % len(self.grids)], candidate)

    def _settle_in(self, grid: dict[Cell, Candidate], candidate: Candidate) -> bool:
        """Put a candidate into its cell if that is empty or held by a worse one."""
        cell, lab = cell_of(candidate), self.lab
        if cell in grid and not better(lab.board, candidate, grid[cell], lab.options.objectives, validation=self.half):
            return False
        grid[cell] = candidate
        return True

    async def _turn(self, island: int) -> None:
        lab, grid = self.lab, self.grids[island]
        rng = lab.rng("islands", lab.iteration)
        elites = list(grid.values())
        chosen = elites[int(rng.integers(len(elites)))]
        best = self._best(grid)
        first = best if rng.random() < self.settings.best_share else chosen
        batch = lab.minibatch()
        # An old elite around which everything was tried does not cost its island the turn: then the best is asked.
        for parent in dict.fromkeys((first, best)):
            proposals = await self._children_of(parent, batch)
            if proposals:
                await self._screen(grid, parent, batch, proposals)
                return

    async def _children_of(self, parent: Candidate, batch: Sequence[str]) -> list[Proposal]:
        lab = self.lab
        rollouts = await lab.rollouts(parent, batch)
        if lab.perfect(parent, batch):
            lab.skip(parent, len(batch))
            return []
        return await lab.propose(parent, self._affordable(len(batch)), rollouts)

    async def _screen(
        self, grid: dict[Cell, Candidate], parent: Candidate, batch: Sequence[str], proposals: Sequence[Proposal]
    ) -> None:
        lab = self.lab
        children = [proposal.candidate for proposal in proposals]
        await lab.measure(children, "train", batch)
        gains = {child.hash: _mean(lab.board.paired(parent, child, "train", batch)) for child in children}
        # A child in a cell of its own need not be better than its parent, only not worse.
        passed = [proposal for proposal in proposals if gains[proposal.candidate.hash] >= 0]
        lab.screened(len(batch), gains, [proposal.candidate for proposal in passed])
        for proposal in proposals:
            if proposal not in passed:
                gain = gains[proposal.candidate.hash]
                lab.reject(proposal, "screen", f"worse than its parent on the minibatch ({gain:+.3f})")
        for proposal in passed:
            await self._place(grid, proposal)

    def _affordable(self, batch: int) -> int:
        left = self.lab.left
        if left is None:
            return self.settings.children
        each = (batch + len(self.half)) * self.lab.options.repeats
        return max(1, min(self.settings.children, (left - self.lab.sizes.smallest) // each))

    async def _place(self, grid: dict[Cell, Candidate], proposal: Proposal) -> None:
        lab, child = self.lab, proposal.candidate
        await lab.measure([child], "validation", self.half)
        if not self._settle_in(grid, child):
            lab.reject(proposal, "gate", f"its cell's elite is as good on {len(self.half)} validation rows")
            return
        if self._mean(child) < self._mean(lab.pool.best.candidate):
            lab.reject(proposal, "gate", f"an elite of its island, behind the best on {len(self.half)} validation rows")
            return
        await lab.measure([child], "validation", lab.order)
        best = lab.pool.best
        reason = f"validation {lab.board.mean(child, 'validation'):.3f}, the best so far {best.score:.3f}"
        if better(lab.board, child, best.candidate, lab.options.objectives):
            lab.accept(proposal, reason)
        else:
            lab.reject(proposal, "gate", reason)


def cell_of(candidate: Candidate) -> Cell:
    """The grid cell: the texts' length in doublings of 50 characters, and the number of demonstrations."""
    characters, demos = 0, 0
    for value in candidate.values.values():
        if isinstance(value, list) and all(isinstance(item, dict) and "output" in item for item in value):
            demos += len(value)
        else:
            characters += sum(len(text) for text in _texts(value))
    return int(math.log2(1 + characters / 50)), demos


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in cast("dict[str, Any]", value).values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in cast("list[Any]", value):
            yield from _texts(item)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
