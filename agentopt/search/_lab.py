"""The lab: what a driver works with. Building blocks that propose, measure and keep, within budget and replayable.

A driver is one coroutine over these blocks. Whatever it calls, three promises hold: nothing is paid for twice, no bound
is exceeded, and a resumed run goes the same way, because every block reads its results in a fixed order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import numpy as np

from agentopt.evaluation import EvaluationResult, Rollout
from agentopt.graph import Candidate, ParameterSpec
from agentopt.models import LM
from agentopt.optimizers import Optimizer, PastProposal, ProposeContext, Update
from agentopt.search._board import Board, Split
from agentopt.search._budget import Budget, OutOfBudget
from agentopt.search._driver import SearchState
from agentopt.search._events import (
    CandidateAccepted,
    CandidateRejected,
    Event,
    GateProgress,
    MinibatchSkipped,
    ProposalMade,
    ScreenDone,
    Spend,
)
from agentopt.search._failures import Failures
from agentopt.search._gate import Gate, GateResult
from agentopt.search._options import TuneOptions
from agentopt.search._plan import Sizes
from agentopt.search._pool import Pool
from agentopt.search._propose import Checker, Proposal, ask, update_to_dict
from agentopt.search._resume import FAILURES, Replay
from agentopt.search._sampling import Minibatches, draw

if TYPE_CHECKING:
    from agentopt.evaluation import Dataset


BARREN_TURNS = 3
BARREN_PROPOSALS = 12
"""So many turns, and so many proposals asked for in them, without a single new one end the search."""


@dataclass(frozen=True)
class Asking:
    """What every question to the optimizer has in common."""

    optimizer: Optimizer
    program_name: str
    train: Dataset
    lm: LM | None = None
    optimizer_model: str = ""
    program_summary: str = ""
    metric_name: str = ""
    files: str = ""


@dataclass
class _Turn:
    """What happened in the running turn."""

    best: float
    proposals: list[Proposal] = field(default_factory=list[Proposal])
    problems: list[ProposalMade] = field(default_factory=list[ProposalMade])
    asked: int = 0
    wanted: int = 0
    skipped: int = 0
    places: Counter[str] = field(default_factory=Counter[str])
    told: set[str] = field(default_factory=set[str])
    """Candidates that were reported as accepted or rejected."""


class Lab:
    """One run's bench. Attributes are for reading; what changes them are the methods."""

    def __init__(
        self,
        *,
        asking: Asking,
        specs: Mapping[str, ParameterSpec],
        baseline: Candidate,
        board: Board,
        pool: Pool,
        checker: Checker,
        order: Sequence[str],
        minibatches: Minibatches,
        sizes: Sizes,
        budget: Budget,
        options: TuneOptions,
        seed: int,
        replay: Replay,
        failures: Failures,
        emit: Callable[[Event], None],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self.specs = specs
        """The tunable parameters."""
        self.baseline = baseline
        self.board = board
        """Every score that is known."""
        self.pool = pool
        """The best candidates with all validation rows."""
        self.order = order
        """The validation rows in this run's order; every prefix is nearly balanced over labels."""
        self.minibatches = minibatches
        self.sizes = sizes
        self.options = options
        self.seed = seed
        self.history: list[PastProposal] = []
        self.kept: list[Candidate] = [baseline]
        """The baseline and every candidate that was accepted, also those that the pool had no place for."""
        self.iteration = 0
        self.emit = emit
        self.skips = 0
        """Turns in a row in which every parent was perfect on its minibatch."""
        self._asking = asking
        self._checker = checker
        self._budget = budget
        self._replay = replay
        self._failures = failures
        self._sleep = sleep
        self._since_gain = 0
        self._gained_at = board.ledger.rollouts
        self._barren = 0
        self._wanted_in_vain = 0
        self._refused = ""
        self._learned_out = False
        self._turn = _Turn(0.0)

    # --- where the run stands ---

    def rng(self, *parts: object) -> np.random.Generator:
        """A random generator that is a function of the run's seed and `parts`."""
        return draw(self.seed, *parts)

    @property
    def left(self) -> int | None:
        """Rollouts that still fit before the reserve for the test; None when nothing bounds them."""
        return self.board.ledger.left()

    def affords(self, rollouts: int) -> bool:
        """Whether so many rollouts (rows times repeats) fit before the reserve for the test."""
        return self.board.ledger.exhausted(rollouts) is None

    def stop(self, patience: int | None = None) -> str | None:
        """Why the search is over, or None.

        `patience` is for drivers whose turns are cheap: turns without a gain before the search ends. The rollouts of
        twice the option's number of whole proposals must have gone by as well. None means the option's number of turns.
        """
        limit = self.options.patience if patience is None else patience
        ledger = self.board.ledger
        spent = ledger.rollouts - self._gained_at
        wait = patience is not None and spent < 2 * self.options.patience * self.sizes.smallest
        patient = wait and self._since_gain < 10 * limit
        if self.pool.best.score >= self.options.perfect_score and self.solved:
            return "every validation row is solved"
        if self.skips >= self.options.patience and self._learned_out:
            return "every training row is solved: there is nothing left to learn from"
        if self._since_gain >= limit and not patient:
            return f"no gain in {self._since_gain} iterations"
        if self._barren >= BARREN_TURNS and self._wanted_in_vain >= BARREN_PROPOSALS:
            return "the optimizer has nothing new to propose" + (f"; {self._refused}" if self._refused else "")
        if ledger.out_of_proposals():
            return "budget: proposals used up"
        return ledger.exhausted()

    @property
    def solved(self) -> bool:
        """Whether a perfect score leaves nothing to search for: it does when the score is the only objective."""
        return len(self.options.objectives) == 1

    def state(self) -> SearchState:
        """The same for a planner, which may look but not touch."""
        budget, ledger = self._budget, self.board.ledger
        return SearchState(
            iteration=self.iteration,
            seed=self.seed,
            pool=self.pool,
            left=ledger.left(),
            proposals_left=None if budget.proposals is None else budget.proposals - ledger.proposals,
            sizes=self.sizes,
            options=self.options,
            history=tuple(self.history),
        )

    # --- one turn ---

    @asynccontextmanager
    async def turn(self) -> AsyncGenerator[None]:
        """One iteration: counts it, waits out a failing model, reports what was spent. Everything paid belongs inside.

        Raises:
            OutOfBudget: from inside; it ends the search.
            RunError: too many iterations in a row failed.
        """
        self._turn = turn = _Turn(self.pool.best.score)
        self._since_gain += 1
        try:
            yield
            if self.pool.best.score > turn.best:
                self._since_gain = 0
                self._gained_at = self.board.ledger.rollouts
            if turn.proposals:
                self.skips = self._barren = self._wanted_in_vain = 0
                self._count_errors(turn.proposals)
            else:
                await self._nothing(turn)
        except OutOfBudget as error:
            for proposal in turn.proposals:
                if proposal.candidate.hash not in turn.told:
                    stage = "gate" if self.board.scores(proposal.candidate, "validation") else "screen"
                    self.reject(proposal, stage, f"the search ended before it was decided: {error}")
            self._spent()
            raise
        self._spent()
        self.iteration += 1

    def _spent(self) -> None:
        ledger = self.board.ledger
        self.emit(Spend(iteration=self.iteration, left=ledger.left(), totals=ledger.to_dict()))

    async def _nothing(self, turn: _Turn) -> None:
        self.skips = self.skips + 1 if turn.skipped and not turn.asked else 0
        failed = [made for made in turn.problems if made.outcome in FAILURES]
        if failed:
            pause = self._failures.failed(failed[-1].detail, transient=all(made.transient for made in failed))
            if pause and not self._failures.replayed:
                await self._sleep(pause)
            if all(made.transient for made in failed):
                self._since_gain -= 1  # waiting for a model is no failed attempt at a gain
        elif turn.asked:
            self._refused = next((made.detail for made in turn.problems if made.outcome == "refused"), "")
            self._barren += 1
            self._wanted_in_vain += turn.wanted

    def _count_errors(self, proposals: Sequence[Proposal]) -> None:
        splits: tuple[Split, ...] = ("train", "validation")
        rows = [row for p in proposals for split in splits for row in self.board.rows(p.candidate, split)]
        errors = Counter(row.error.splitlines()[0] if row.error else "" for row in rows)
        if rows and "" not in errors:
            self._failures.failed(f"every rollout of every proposal failed: {errors.most_common(1)[0][0]}")
        else:
            self._failures.clear()

    # --- proposing ---

    def minibatch(self, index: int | None = None, *, first: Sequence[str] = ()) -> list[str]:
        """Training rows of minibatch `index` (by default the iteration's); `first` go to its front."""
        return self.minibatches.batch(self.iteration if index is None else index, first=first)

    def perfect(self, candidate: Candidate, ids: Sequence[str]) -> bool:
        """Whether a candidate has the perfect score on each of these training rows and nothing else counts."""
        if not self.solved:
            return False
        known = self.board.scores(candidate, "train")
        return min(known[row_id] for row_id in ids) >= self.options.perfect_score

    def skip(self, parent: Candidate, rows: int) -> None:
        """Note that a parent was perfect on its minibatch, so that nothing was asked about it."""
        self._turn.skipped += 1
        whole = self.board.splits["train"].ids
        self._learned_out = self.board.complete(parent, "train") and self.perfect(parent, whole)
        self.emit(MinibatchSkipped(iteration=self.iteration, parent=parent.hash, rows=rows))

    async def rollouts(self, parent: Candidate, ids: Sequence[str]) -> Sequence[Rollout]:
        """The parent on these training rows, with traces unless what was proposed from them is known already."""
        place = self._turn.places[parent.hash]
        stored = self._replay.proposal(self.iteration, parent.hash, place) is not None
        result = await self.board.run(parent, "train", ids, traces="never" if stored else "all")
        return result.rollouts if result is not None else ()

    async def propose(
        self,
        parent: Candidate,
        count: int,
        rollouts: Sequence[Rollout],
        *,
        only: Collection[str] | None = None,
        batch: Sequence[str] = (),
    ) -> list[Proposal]:
        """Legal, new children of `parent` from the optimizer, each counted as a proposal; [] when it gave none.

        No more are asked for than the bound on proposals still allows.

        Args:
            parent: the candidate to edit.
            count: how many are wanted.
            rollouts: what the optimizer may learn from; `rollouts()` gives them.
            only: names of the parameters it may touch; None for all.
            batch: training rows on which the children will be compared. On a few rows a good step may show nothing;
                a candidate that only failed on others may then come again.

        Raises:
            OutOfBudget: the optimizer's own calls no longer fit.
            UserError: the optimizer cannot work as configured.
        """
        ledger = self.board.ledger
        if self._budget.proposals is not None:
            count = min(count, self._budget.proposals - ledger.proposals)
        if count < 1:
            return []
        place = self._turn.places[parent.hash]
        self._turn.places[parent.hash] += 1
        self._turn.asked += 1
        self._turn.wanted += count
        retry = self._retry(batch)
        made = self._replay.proposal(self.iteration, parent.hash, place)
        replayed = made is not None
        if made is None:
            context = replace(self._context(parent, count, rollouts, only, place), retry=retry)
            made = await ask(self._asking.optimizer, context, ledger)
            made = replace(made, place=place)
        ledger.charge_optimizer(made.usd, made.tokens, made.calls)
        ledger.proposals += len(made.updates)
        self.emit(made)
        good, refused = self._checker.candidates(made, parent, specs=self._wanted(only), retry=retry)
        if good:
            self._turn.proposals += good
            return good
        if refused and made.outcome == "ok":
            detail = "at last all it proposed was refused (illegal edits or leaks)"
            made = ProposalMade(made.iteration, made.parent, "refused", detail, [], None, 0)
        self._failures.replayed = replayed
        self._turn.problems.append(made)
        return []

    def _retry(self, batch: Sequence[str]) -> frozenset[str]:
        kept = {candidate.hash for candidate in self.kept}  # it may have been let go before it was kept
        past = [entry for entry in self.history if entry.validation is None and entry.candidate_hash not in kept]
        past = past if batch else []
        return frozenset(
            entry.candidate_hash for entry in past if self.board.unmeasured(entry.candidate_hash, "train", batch)
        )

    def _wanted(self, only: Collection[str] | None) -> Mapping[str, ParameterSpec]:
        return self.specs if only is None else {name: spec for name, spec in self.specs.items() if name in only}

    def _context(
        self, parent: Candidate, count: int, rollouts: Sequence[Rollout], only: Collection[str] | None, place: int
    ) -> ProposeContext:
        asking = self._asking
        parts: tuple[object, ...] = (
            (self.iteration, parent.hash) if place == 0 else (self.iteration, parent.hash, place)
        )
        return ProposeContext(
            program_name=asking.program_name,
            parent=parent,
            specs=self._wanted(only),
            train=asking.train,
            rollouts=rollouts,
            history=tuple(self.history),
            seed=int(draw(self.seed, "propose", *parts).integers(2**31)),
            iteration=self.iteration,
            count=count,
            lm=asking.lm,
            optimizer_model=asking.optimizer_model,
            program_summary=asking.program_summary,
            metric_name=asking.metric_name,
            budget_left=self.left,
            objectives=self.options.objectives,
            files=asking.files,
        )

    def offer(
        self, parent: Candidate, update: Update, *, others: Sequence[Candidate] = (), again: bool = False
    ) -> Proposal | None:
        """A child that the driver itself puts together (a merge, a combination): None when illegal, leaking or known.

        `others` are its further parents, for the lineage. With `again` a candidate that was proposed before, but never
        measured, is not refused for being known.
        """
        made = ProposalMade(self.iteration, parent.hash, "ok", "", [update_to_dict(update)], None, 0)
        good, _ = self._checker.candidates(made, parent, again=again)
        if not good:
            return None
        proposal = good[0]
        if others:
            parents = (parent.hash, *(other.hash for other in others))
            child = proposal.candidate.with_values({}, parents=parents, edits=update.edits)
            proposal = Proposal(child, parent, update)
        self.board.ledger.proposals += 1
        self._turn.proposals.append(proposal)
        return proposal

    # --- measuring ---

    async def measure(self, candidates: Sequence[Candidate], split: Split, ids: Sequence[str]) -> None:
        """Scores for all of these rows, all candidates at the same time; known rows cost nothing.

        Raises:
            OutOfBudget: not all of it fits; then nothing is started.
        """
        await self.board.run_many(candidates, split, ids)

    async def measure_traced(self, candidate: Candidate, split: Split, ids: Sequence[str]) -> EvaluationResult:
        """`measure` for one candidate, with the traces."""
        return cast("EvaluationResult", await self.board.run(candidate, split, ids, traces="all"))

    async def race(self, challengers: Sequence[Candidate], allotment: float) -> GateResult:
        """Race challengers over validation against the best of the pool, within `allotment` rows."""
        gate = Gate(self.board, self.order, self.options.block_size, self.options.drop_alpha, allotment)
        return await gate.race(self.pool.best.candidate, challengers, self._look)

    def _look(self, rows: int, live: list[Candidate], leader: Candidate) -> None:
        self.emit(
            GateProgress(
                iteration=self.iteration,
                rows=rows,
                total=len(self.order),
                live=[candidate.hash for candidate in live],
                leader=leader.hash,
                leader_mean=self.board.mean(leader, "validation", self.order[:rows]),
            )
        )

    def screened(self, rows: int, scores: Mapping[str, float], passed: Sequence[Candidate]) -> None:
        """Report a screen: mean difference to the parent by candidate hash, and who goes on."""
        hashes = [candidate.hash for candidate in passed]
        self.emit(ScreenDone(iteration=self.iteration, rows=rows, scores=dict(scores), passed=hashes))

    # --- keeping ---

    def accept(self, proposal: Proposal, reason: str = "") -> None:
        """Take a candidate that has all validation rows into the pool, and tell so.

        Raises:
            ValueError: validation rows are missing; only a candidate with all rows can be kept.
        """
        child, parent = proposal.candidate, proposal.parent
        if not self.board.complete(child, "validation"):
            raise ValueError(f"candidate {child.hash} has no score on some validation rows")
        mean = self.board.mean(child, "validation")
        best = self.pool.best.score
        self.pool.add(child, mean)
        self.kept.append(child)
        self.emit(CandidateAccepted(self.iteration, child.hash, parent.hash, proposal.update.source, mean, best))
        self._remember(proposal, accepted=True, reason=reason)

    def reject(self, proposal: Proposal, stage: str, reason: str) -> None:
        """Let a candidate go, and tell why. `stage` is "screen" or "gate"."""
        source = proposal.update.source
        key, parent = proposal.candidate.hash, proposal.parent.hash
        self.emit(CandidateRejected(self.iteration, key, parent, source, stage, reason))
        self._remember(proposal, accepted=False, reason=reason)

    def _remember(self, proposal: Proposal, *, accepted: bool, reason: str) -> None:
        board, child, parent = self.board, proposal.candidate, proposal.parent
        self._turn.told.add(child.hash)
        batch = list(board.scores(child, "train"))
        seen = board.scores(child, "validation")
        self.history.append(
            PastProposal(
                candidate_hash=child.hash,
                parent_hash=parent.hash,
                update=proposal.update,
                screen=board.mean(child, "train") if batch else None,
                validation=board.mean(child, "validation") if seen else None,
                accepted=accepted,
                reason=reason,
                screen_parent=board.mean(parent, "train", batch) if batch else None,
            )
        )
