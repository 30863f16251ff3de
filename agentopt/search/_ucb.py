"""The UCB driver: candidates are arms of a bandit, and a block of validation rows is one pull.

A turn first buys rows for the arms with the highest upper confidence bound (UCB1, Auer et al. 2002), then works on the
arm that leads by that bound. So rows go to candidates that may still be the best, and no bad child gets all of
validation. Only an arm with all rows can be kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentopt.errors import UserError
from agentopt.graph import Candidate
from agentopt.search._objectives import better
from agentopt.search._propose import Proposal

if TYPE_CHECKING:
    from agentopt.search._lab import Lab


@dataclass(frozen=True, slots=True, kw_only=True)
class UCB:
    """Settings of the search.

    Raises:
        UserError: a number out of its range.
    """

    exploration: float = 0.5
    """The c of mean + c * sqrt(ln T / n), times the range of scores seen; T is all rows bought, n the arm's own."""
    children: int = 2
    """Proposals of one turn."""
    pulls: int = 3
    """Blocks of validation rows bought in one turn, besides the first one of each child."""
    name: str = "ucb"

    def __post_init__(self) -> None:
        for label in ("children", "pulls"):
            if getattr(self, label) < 1:
                raise UserError(f"UCB: {label} must be at least 1; found {getattr(self, label)!r}.")
        if not self.exploration >= 0:
            raise UserError(f"UCB: exploration must not be negative; found {self.exploration!r}.")

    async def run(self, lab: Lab) -> str:
        """Search to the end and say why it ended."""
        return await _Run(self, lab).search()


@dataclass
class _Run:
    settings: UCB
    lab: Lab
    arms: list[Candidate] = field(default_factory=list[Candidate])
    open: dict[str, Proposal] = field(default_factory=dict[str, Proposal])
    """Arms that do not have all rows yet, by hash."""

    def __post_init__(self) -> None:
        self.arms.append(self.lab.baseline)
        self.block = self.lab.options.block_size

    async def search(self) -> str:
        lab = self.lab
        while True:
            reason = lab.stop(3 * lab.options.patience) or self._unaffordable()
            if reason is not None:
                async with lab.turn():
                    await self._finish()
                return reason
            async with lab.turn():
                await self._grow()
                for _ in range(self.settings.pulls):
                    if not await self._pull():
                        break

    def _unaffordable(self) -> str | None:
        sizes, repeats = self.lab.sizes, self.lab.options.repeats
        # Minibatches of parent and children, the children's first blocks, and what completes one open arm.
        children = self.settings.children
        needed = ((1 + children) * sizes.batch + children * self.block) * repeats + self._to_complete()
        if self.lab.affords(needed):
            return None
        return f"budget: {self.lab.left} rollouts left, one more turn takes up to {needed}"

    def _to_complete(self) -> int:
        lab = self.lab
        missing = [len(lab.board.missing(arm, "validation", lab.order)) for arm in self.arms if arm.hash in self.open]
        return min(missing, default=lab.sizes.validation) * lab.options.repeats

    def _bound(self, arm: Candidate) -> float:
        board = self.lab.board
        known = board.scores(arm, "validation")
        total = sum(len(board.scores(other, "validation")) for other in self.arms)
        values = [score for other in self.arms for score in board.scores(other, "validation").values()]
        spread = max(values) - min(values) if values else 1.0
        bonus = self.settings.exploration * math.sqrt(math.log(total + 1) / len(known)) * spread
        return min(sum(known.values()) / len(known) + bonus, max(values, default=1.0))

    def _ranked(self, arms: Sequence[Candidate]) -> list[Candidate]:
        mean = self.lab.board.mean
        # Bounds are clipped to the scores seen; among equal ones the higher mean, then the earlier arm.
        return sorted(arms, key=lambda arm: (-self._bound(arm), -mean(arm, "validation")))

    async def _grow(self) -> None:
        lab = self.lab
        parent = self._ranked(self.arms)[0]
        batch = lab.minibatch()
        rollouts = await lab.rollouts(parent, batch)
        if lab.perfect(parent, batch):
            lab.skip(parent, len(batch))
            return
        proposals = await lab.propose(parent, self.settings.children, rollouts)
        children = [proposal.candidate for proposal in proposals]
        await lab.measure(children, "train", batch)
        gains = {child.hash: _mean(lab.board.paired(parent, child, "train", batch)) for child in children}
        names = lab.options.objectives
        passed = [
            proposal
            for proposal in proposals
            if gains[proposal.candidate.hash] > 0
            or (len(names) > 1 and better(lab.board, proposal.candidate, parent, names, batch))
        ]
        lab.screened(len(batch), gains, [proposal.candidate for proposal in passed])
        for proposal in proposals:
            if proposal not in passed:
                gain = gains[proposal.candidate.hash]
                lab.reject(proposal, "screen", f"no gain over its parent on the minibatch ({gain:+.3f})")
        await lab.measure([proposal.candidate for proposal in passed], "validation", lab.order[: self.block])
        for proposal in passed:
            self.arms.append(proposal.candidate)
            self.open[proposal.candidate.hash] = proposal
            self._settle(proposal)

    async def _pull(self) -> bool:
        """Buy the next block for the open arm with the highest bound; False when there is none or it does not pay."""
        waiting = [arm for arm in self.arms if arm.hash in self.open]
        if not waiting:
            return False
        arm = self._ranked(waiting)[0]
        if not self.lab.affords(self.block * self.lab.options.repeats):
            return False
        await self._buy(arm)
        return True

    async def _buy(self, arm: Candidate) -> None:
        lab = self.lab
        have = len(lab.board.scores(arm, "validation"))
        await lab.measure([arm], "validation", lab.order[have : have + self.block])
        self._settle(self.open[arm.hash])

    def _settle(self, proposal: Proposal) -> None:
        """Keep or drop an arm that has all rows; drop one whose bound is below the best kept mean."""
        lab, arm = self.lab, proposal.candidate
        best = lab.pool.best
        if lab.board.complete(arm, "validation"):
            del self.open[arm.hash]
            before = lab.board.mean(proposal.parent, "validation", lab.order)
            after = lab.board.mean(arm, "validation")
            reason = f"validation {after:.3f}, its parent {before:.3f} so far"
            if self._improves(arm, proposal.parent):
                lab.accept(proposal, reason)
            else:
                self.arms.remove(arm)
                lab.reject(proposal, "gate", reason)
        elif self._bound(arm) < best.score:
            del self.open[arm.hash]
            self.arms.remove(arm)
            seen = len(lab.board.scores(arm, "validation"))
            lab.reject(proposal, "gate", f"its upper bound after {seen} validation rows is below the best mean")

    def _improves(self, arm: Candidate, parent: Candidate) -> bool:
        board = self.lab.board
        if board.complete(parent, "validation"):
            return better(board, arm, parent, self.lab.options.objectives)
        return _mean(board.paired(parent, arm, "validation")) > 0  # the parent is an open arm: on the rows it has

    async def _finish(self) -> None:
        """Complete the open arms that may still be the best, as far as the budget goes, and let the rest go."""
        lab = self.lab
        while self.open:
            arm = self._ranked([arm for arm in self.arms if arm.hash in self.open])[0]
            if lab.solved and self._bound(arm) <= lab.pool.best.score:
                break
            missing = len(lab.board.missing(arm, "validation", lab.order)) * lab.options.repeats
            if not lab.affords(missing):
                break
            while arm.hash in self.open:
                await self._buy(arm)
        for proposal in self.open.values():
            seen = len(lab.board.scores(proposal.candidate, "validation"))
            lab.reject(proposal, "gate", f"the search ended after {seen} of its validation rows")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
