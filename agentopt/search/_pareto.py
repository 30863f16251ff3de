"""The Pareto driver: GEPA's search (arXiv 2507.19457), with any optimizer as its mutation.

Every candidate that beat its parent on a minibatch of three gets all of validation and stays. Parents are drawn from
the per-example fronts, so a candidate that alone solves some row is kept at work although its mean is low. With
several objectives each objective is one more front.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from agentopt.errors import UserError
from agentopt.graph import Candidate, set_value
from agentopt.optimizers import Update
from agentopt.search._fronts import EpochBatches, dominators, fronts, pick_parent
from agentopt.search._merge import Merge, Merges, find_merge, subsample
from agentopt.search._objectives import better, means

if TYPE_CHECKING:
    from agentopt.evaluation import Rollout
    from agentopt.search._lab import Lab
    from agentopt.search._propose import Proposal


@dataclass(frozen=True, slots=True, kw_only=True)
class Pareto:
    """Settings of the search; the defaults are those of the reference, with merging on.

    Raises:
        UserError: a number out of its range.
    """

    minibatch: int = 3
    """Training rows on which a child is compared with its parent."""
    merge: bool = True
    """Join descendants of one ancestor that improved different parameters; needs two parameters at least."""
    max_merges: int = 5
    """Accepted merges in one run."""
    components: Literal["round-robin", "all"] = "round-robin"
    """Parameters that one proposal may touch: the next one of this parent, or any."""
    select: Literal["pareto", "best", "epsilon"] = "pareto"
    """How a parent is drawn: by its share of fronts, the best mean, or the best mean with one random draw in ten."""
    equal_passes: bool = False
    """Let a child pass whose minibatch score equals its parent's."""
    patience: int = 40
    """Turns without a better validation mean; they are cheap here, most cost twice the minibatch."""
    name: str = "pareto"

    def __post_init__(self) -> None:
        for label in ("minibatch", "max_merges", "patience"):
            if getattr(self, label) < 1:
                raise UserError(f"Pareto: {label} must be at least 1; found {getattr(self, label)!r}.")

    async def run(self, lab: Lab) -> str:
        """Search to the end and say why it ended."""
        return await _Run(self, lab).search()


@dataclass
class _Run:
    """One search: everything GEPA keeps, in the order in which candidates came in."""

    settings: Pareto
    lab: Lab
    candidates: list[Candidate] = field(default_factory=list[Candidate])
    parents: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    turns: list[int] = field(default_factory=list[int])
    """For each candidate the index of the parameter that is next."""
    done: Merges = field(default_factory=Merges)
    merges_due: int = 0
    merged: int = 0
    just_accepted: bool = False

    def __post_init__(self) -> None:
        # One stream of draws for parents, minibatches and merges, as in the reference.
        self.rng = random.Random(self.lab.seed)
        self.names = list(self.lab.specs)
        # Rows in the order of their dataset: the draws depend on it, and so do sums of scores in the last digit.
        self.rows = self.lab.board.splits["validation"].ids
        self.batches = EpochBatches(self.lab.board.splits["train"].ids, self.settings.minibatch, self.rng)
        self._add(self.lab.baseline, ())

    def _add(self, candidate: Candidate, parents: Sequence[int]) -> None:
        self.candidates.append(candidate)
        self.parents.append(tuple(parents))
        # A child goes on where its parents stand.
        self.turns.append(max((self.turns[parent] for parent in parents), default=0))

    # --- what is known ---

    def _scores(self) -> list[Mapping[str, float]]:
        known = [self.lab.board.scores(candidate, "validation") for candidate in self.candidates]
        return [{row_id: scores[row_id] for row_id in self.rows} for scores in known]

    def _means(self) -> list[float]:
        return [self.lab.board.mean(candidate, "validation", self.rows) for candidate in self.candidates]

    def _fronts(self) -> dict[str, set[int]]:
        found = fronts(self._scores())
        objectives = [name for name in self.lab.options.objectives if name != "score"]
        if objectives:
            board = self.lab.board
            values = [means(board.rows(candidate, "validation"), objectives) for candidate in self.candidates]
            labelled = [{f"objective {name}": value for name, value in point.items()} for point in values]
            found.update(fronts(labelled))
        return found

    # --- the loop ---

    async def search(self) -> str:
        lab = self.lab
        while True:
            reason = lab.stop(self.settings.patience) or self._unaffordable()
            if reason is not None:
                return reason
            async with lab.turn():
                if not await self._merge():
                    self.just_accepted = False
                    await self._mutate()

    def _unaffordable(self) -> str | None:
        needed = (2 * self.settings.minibatch + self.lab.sizes.validation) * self.lab.options.repeats
        if self.lab.affords(needed):
            return None
        return f"budget: {self.lab.left} rollouts left, one more proposal takes up to {needed}"

    def _parent(self) -> int:
        current = self._means()
        best = current.index(max(current))
        match self.settings.select:
            case "best":
                return best
            case "epsilon":
                return self.rng.randint(0, len(current) - 1) if self.rng.random() < 0.1 else best
            case "pareto":
                return pick_parent(self._fronts(), current, self.rng)

    async def _mutate(self) -> None:
        lab = self.lab
        number = self._parent()
        parent = self.candidates[number]
        batch = self.batches.batch(lab.iteration)
        ids = list(dict.fromkeys(batch))  # a padding row may stand in it twice: run once, counted twice
        rollouts = await lab.rollouts(parent, ids)
        if lab.perfect(parent, ids):
            lab.skip(parent, len(ids))
            return
        for proposal in await self._children(number, rollouts, batch):
            await lab.measure([proposal.candidate], "train", ids)
            gain = self._gain(parent, proposal.candidate, batch)
            passed = self._passes(parent, proposal.candidate, gain, ids)
            lab.screened(len(ids), {proposal.candidate.hash: gain / len(batch)}, [proposal.candidate] * passed)
            if not passed:
                lab.reject(proposal, "screen", f"no gain over its parent on the minibatch ({gain:+.3f} in sum)")
                continue
            await self._keep(proposal, (number,))
            self.just_accepted = True
            if self.settings.merge and self.merged < self.settings.max_merges:
                self.merges_due += 1

    def _gain(self, parent: Candidate, child: Candidate, batch: Sequence[str]) -> float:
        """The child's sum minus the parent's; a sum of differences would call rounding a gain."""
        board = self.lab.board
        hidden = board.shown(parent) | board.shown(child)
        before, after = (
            sum(known[row_id] for row_id in batch if row_id not in hidden)
            for known in (board.scores(parent, "train"), board.scores(child, "train"))
        )
        return after - before

    def _passes(self, parent: Candidate, child: Candidate, gain: float, ids: Sequence[str]) -> bool:
        if gain > 0 or (gain == 0 and self.settings.equal_passes):
            return True
        objectives = self.lab.options.objectives
        return len(objectives) > 1 and better(self.lab.board, child, parent, objectives, ids)

    async def _children(self, number: int, rollouts: Sequence[Rollout], batch: Sequence[str]) -> list[Proposal]:
        """One proposal; a parameter for which the optimizer has none gives its turn to the next."""
        parent = self.candidates[number]
        if self.settings.components == "all" or len(self.names) < 2:
            return await self.lab.propose(parent, 1, rollouts, batch=batch)
        for _ in self.names:
            name = self.names[self.turns[number]]
            self.turns[number] = (self.turns[number] + 1) % len(self.names)
            proposals = await self.lab.propose(parent, 1, rollouts, only=[name], batch=batch)
            if proposals:
                return proposals
        return []

    async def _keep(self, proposal: Proposal, parents: Sequence[int]) -> None:
        lab = self.lab
        await lab.measure([proposal.candidate], "validation", lab.order)
        before = max(lab.board.mean(self.candidates[parent], "validation") for parent in parents)
        after = lab.board.mean(proposal.candidate, "validation")
        lab.accept(proposal, f"passed its minibatch; validation {after:.3f}, its parent {before:.3f}")
        self._add(proposal.candidate, parents)

    # --- merging ---

    async def _merge(self) -> bool:
        """Try a merge when one is due; tells whether this turn was used for it."""
        if not (self.settings.merge and self.just_accepted and self.merges_due > 0):
            return False
        self.just_accepted = False
        current = self._means()
        values = [candidate.values for candidate in self.candidates]
        eligible = dominators(self._fronts(), current)
        found = find_merge(
            values, self.parents, current, eligible, self.done, self.rng, overlap=self.lab.sizes.validation
        )
        if found is None:
            return False
        proposal = self._joined(found)
        if proposal is None:
            return False
        await self._test_merge(proposal, found)
        return True

    def _joined(self, found: Merge) -> Proposal | None:
        first, second = self.candidates[found.first], self.candidates[found.second]
        edits = tuple(
            set_value(self.lab.specs[name], value) for name, value in found.values.items() if value != first.get(name)
        )
        why = "joins what two descendants of one candidate improved"
        return self.lab.offer(first, Update(edits, why, "merge"), others=[second]) if edits else None

    async def _test_merge(self, proposal: Proposal, found: Merge) -> None:
        board = self.lab.board
        scores = self._scores()
        first, second = scores[found.first], scores[found.second]
        ids = subsample(first, second, self.rng)
        await self.lab.measure([proposal.candidate], "validation", ids)
        known = board.scores(proposal.candidate, "validation")
        reached = sum(known[row_id] for row_id in ids)
        wanted = max(sum(have[row_id] for row_id in ids) for have in (first, second))
        passed = reached >= wanted
        gain = (reached - wanted) / len(ids)
        self.lab.screened(len(ids), {proposal.candidate.hash: gain}, [proposal.candidate] * passed)
        if not passed:
            self.lab.reject(proposal, "screen", f"{reached:g} on {len(ids)} rows, the better parent has {wanted:g}")
            return
        await self._keep(proposal, (found.first, found.second))
        self.merges_due -= 1
        self.merged += 1
