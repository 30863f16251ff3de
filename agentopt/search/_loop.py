"""The loop: baseline → rounds of propose, screen, gate → final pick → the one claim on the test set.

Decisions read results in a fixed order at block boundaries, so equal rows give equal decisions, also after a resume.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import anyio

from agentopt.errors import UserError
from agentopt.evaluation import Dataset, EvaluationResult, Rollout
from agentopt.graph import Candidate, ParameterSpec
from agentopt.models import LM
from agentopt.optimizers import Optimizer, PastProposal, ProposeContext
from agentopt.search._baseline import Baseline, check_first_rows, discover
from agentopt.search._board import Board, RowSource, Split
from agentopt.search._budget import Budget, Ledger, OutOfBudget
from agentopt.search._choose import near_ties, playoff
from agentopt.search._claim import Claim, baseline_claim, make_claim, no_claim
from agentopt.search._driver import Driver, SearchState, Step
from agentopt.search._events import (
    BaselineDone,
    CandidateAccepted,
    CandidateRejected,
    Event,
    GateDone,
    GateProgress,
    MinibatchSkipped,
    ProposalMade,
    RunStarted,
    ScreenDone,
    Spend,
    TestDone,
    Warning_,
)
from agentopt.search._failures import Failures
from agentopt.search._gate import Gate, GateResult
from agentopt.search._leaks import LeakGuard
from agentopt.search._options import TuneOptions
from agentopt.search._plan import Plan, Sizes, check_after, check_before, make_plan
from agentopt.search._pool import Pool
from agentopt.search._propose import Checker, Proposal, ask
from agentopt.search._racing import gate_cost, screen_cost
from agentopt.search._resume import FAILURES, Replay
from agentopt.search._sampling import Minibatches, balanced_order, draw
from agentopt.search._screen import SECOND_LOOK, ScreenResult, screen


@dataclass(frozen=True)
class Setup:
    """Everything one search needs; `tune_program` makes it from a program, tests from synthetic rows."""

    run_id: str
    program_name: str
    specs: Mapping[str, ParameterSpec]
    source: RowSource
    optimizer: Optimizer
    driver: Driver
    splits: Mapping[Split, Dataset]
    budget: Budget
    emit: Callable[[Event], None]
    driver_reason: str = ""
    options: TuneOptions = field(default_factory=TuneOptions)
    seed: int = 0
    replay: Replay = field(default_factory=lambda: Replay(()))
    on_candidate: Callable[[Candidate], None] | None = None
    lm: LM | None = None
    optimizer_model: str = ""
    program_summary: str = ""
    metric_name: str = ""
    notices: Sequence[str] = ()
    """Warnings about the input, passed on right after the start."""
    sleep: Callable[[float], Awaitable[None]] = anyio.sleep


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished search knows."""

    baseline: Candidate
    best: Candidate
    claim: Claim
    stop_reason: str
    plan: Plan
    history: list[PastProposal]
    warnings: list[str]


class Search:
    """One run. `board` and `ledger` can be read at any time, also after an exception."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._options = options = setup.options
        splits = setup.splits
        self.sizes = Sizes(
            train=len(splits["train"]),
            validation=len(splits["validation"]),
            test=len(splits["test"]) if "test" in splits else 0,
            screen=options.screen_size,
            repeats=options.repeats,
        )
        self.ledger = Ledger(setup.budget, reserved=self.sizes.claim)
        self.board = Board(
            setup.source,
            splits,
            self.ledger,
            repeats=options.repeats,
            on_candidate=setup.on_candidate,
        )
        self.baseline = Candidate({name: spec.default for name, spec in setup.specs.items()}, note="baseline")
        self.pool = Pool(options.pool_size)
        self.history: list[PastProposal] = []
        self.warnings: list[str] = []
        self._specs = setup.specs
        self._order = balanced_order(splits["validation"], draw(setup.seed, "validation"))
        self._minibatches = Minibatches(splits["train"], options.screen_size, setup.seed)
        self._failures = Failures(options.max_failures, options.max_wait, setup.run_id)
        self._checker = self._make_checker()
        self._iteration = 0
        self._since_gain = 0
        self._barren = 0
        self._skips = 0

    def _make_checker(self) -> Checker:
        leaks = LeakGuard(self._setup.splits, self.baseline, self._specs)
        checker = Checker(self._specs, leaks, self._setup.emit)
        checker.seen.add(self.baseline.hash)
        return checker

    async def run(self) -> Outcome:
        """Run to the end.

        Raises:
            UserError: budget too small or not enforceable; nothing tunable; the optimizer cannot work as configured.
            RunError: the program fails on every row, or too many iterations in a row failed.
        """
        check_before(self.sizes, self._setup.budget)
        self._setup.emit(
            RunStarted(
                run_id=self._setup.run_id,
                program=self._setup.program_name,
                optimizer=self._setup.optimizer.name,
                driver=self._setup.driver.name,
                driver_reason=self._setup.driver_reason,
                seed=self._setup.seed,
                plan=make_plan(self.sizes, self.ledger).to_dict(),
            )
        )
        for notice in self._setup.notices:
            self.warn(notice)
        plan = await self._run_baseline()
        reason = await self._rounds()
        best = await self._choose()
        claim = await self._claim(best)
        return Outcome(self.baseline, best, claim, reason, plan, self.history, self.warnings)

    def warn(self, message: str) -> None:
        """Tell the user something that does not stop the run."""
        self.warnings.append(message)
        self._setup.emit(Warning_(message))

    # --- baseline ---

    async def _run_baseline(self) -> Plan:
        first = self._order[: self._options.screen_size]
        results: list[EvaluationResult] = []
        try:
            for ids in (first, self._order[len(first) :]):
                result = await self.board.run(self.baseline, "validation", ids, traces="all") if ids else None
                if result is not None:
                    results.append(result)
                if ids is first:
                    message = check_first_rows(self.board.rows(self.baseline, "validation"), self._options)
                    if message is not None:
                        self.warn(message)
        except OutOfBudget as error:
            raise UserError(
                f"{error} before the baseline was through ({self.sizes.baseline} rollouts on validation): raise the "
                "budget or give fewer validation rows"
            ) from None
        rollouts = [rollout for result in results for rollout in result.rollouts]
        found = discover(rollouts, self._setup.specs, self._setup.program_name)
        self._specs = found.tunable
        self._checker = self._make_checker()
        for message in found.warnings:
            self.warn(message)
        mean = self.board.mean(self.baseline, "validation")
        self.pool.add(self.baseline, mean)
        plan = make_plan(self.sizes, self.ledger)
        self._emit_baseline(found, mean, plan)
        for message in check_after(plan, self.ledger):
            self.warn(message)
        return plan

    def _emit_baseline(self, found: Baseline, mean: float, plan: Plan) -> None:
        rows = self.board.rows(self.baseline, "validation")
        self._setup.emit(
            BaselineDone(
                candidate=self.baseline.hash,
                mean=mean,
                rows=len(rows),
                errors=sum(row.error is not None for row in rows),
                tunable=list(found.tunable),
                never_read=found.never_read,
                tools=found.tools,
                plan=plan.to_dict(),
            )
        )

    # --- rounds ---

    async def _rounds(self) -> str:
        while True:
            reason = self._stop()
            if reason is not None:
                return reason
            step = self._setup.driver.next(self._state())
            if isinstance(step, str):
                return step
            ended: str | None = None
            try:
                await self._round(step)
            except OutOfBudget as error:
                ended = str(error)
            left = self.ledger.left()
            self._setup.emit(Spend(iteration=self._iteration, left=left, totals=self.ledger.to_dict()))
            if ended is not None:
                return ended
            self._iteration += 1

    def _stop(self) -> str | None:
        if self.pool.best.score >= self._options.perfect_score:
            return "every validation row is solved"
        if self._since_gain >= self._options.patience:
            return f"no gain in {self._since_gain} iterations"
        if self._barren >= 3:
            return "the optimizer has nothing new to propose"
        if self.ledger.out_of_proposals():
            return "budget: proposals used up"
        return self.ledger.exhausted()

    def _state(self) -> SearchState:
        budget = self._setup.budget
        return SearchState(
            iteration=self._iteration,
            seed=self._setup.seed,
            pool=self.pool,
            left=self.ledger.left(),
            proposals_left=None if budget.proposals is None else budget.proposals - self.ledger.proposals,
            sizes=self.sizes,
            options=self._options,
            history=tuple(self.history),
        )

    async def _round(self, step: Step) -> None:
        spent_before = self.ledger.rollouts
        self._since_gain += 1
        batch = self._batch(step)
        proposals: list[Proposal] = []
        problems: list[ProposalMade] = []
        skipped = True
        for parent, count in step.parents:
            result = await self._parent_rows(parent, batch)
            if min(self.board.scores(parent, "train")[i] for i in batch) >= self._options.perfect_score:
                self._setup.emit(MinibatchSkipped(iteration=self._iteration, parent=parent.hash, rows=len(batch)))
                continue
            skipped = False
            good, problem = await self._ask(parent, count, result.rollouts if result is not None else ())
            proposals += good
            if problem is not None:
                problems.append(problem)
        self._skips = self._skips + 1 if skipped else 0
        if not proposals:
            await self._nothing(problems, skipped=skipped)
            return
        self._barren = 0
        more = self._second_rows(step, batch, len(proposals), spent_before)
        screened = await screen(self.board, proposals, batch, more)
        self._setup.emit(
            ScreenDone(
                iteration=self._iteration,
                rows=len(batch),
                scores=screened.scores,
                passed=[proposal.candidate.hash for proposal in screened.passed],
            )
        )
        allotment = (step.allotment - (self.ledger.rollouts - spent_before)) / self._options.repeats
        gate = await self._gate(screened, allotment)
        self._settle(proposals, screened, gate)
        self._count_errors(proposals)

    def _batch(self, step: Step) -> list[str]:
        if self._skips < 3:
            return self._minibatches.batch(self._iteration)
        known = self.board.scores(step.parents[0][0], "train")
        failing = [row_id for row_id, score in known.items() if score < self._options.perfect_score]
        return self._minibatches.batch(self._iteration, first=failing)

    def _second_rows(self, step: Step, batch: Sequence[str], proposals: int, spent_before: int) -> Sequence[str]:
        """Rows for a second look of the screen, where the round can afford them beside one full validation."""
        following = self._minibatches.batch(self._iteration + 1)
        fresh = [row_id for row_id in following if row_id not in batch]
        each = screen_cost(len(batch)) if proposals > 4 else len(batch)
        cost = (proposals * each + (SECOND_LOOK + len(step.parents)) * len(fresh)) * self._options.repeats
        spent = self.ledger.rollouts - spent_before
        full = self.sizes.validation * self._options.repeats
        return fresh if proposals > 1 and spent + cost + full <= step.allotment else ()

    async def _parent_rows(self, parent: Candidate, batch: Sequence[str]) -> EvaluationResult | None:
        stored = self._setup.replay.proposal(self._iteration, parent.hash) is not None
        return await self.board.run(parent, "train", batch, traces="never" if stored else "all")

    async def _ask(
        self, parent: Candidate, count: int, rollouts: Sequence[Rollout]
    ) -> tuple[list[Proposal], ProposalMade | None]:
        """Proposals of one parent, and the answer when it gave none."""
        made = self._setup.replay.proposal(self._iteration, parent.hash)
        replayed = made is not None
        if made is None:
            context = ProposeContext(
                program_name=self._setup.program_name,
                parent=parent,
                specs=self._specs,
                train=self._setup.splits["train"],
                rollouts=rollouts,
                history=tuple(self.history),
                seed=int(draw(self._setup.seed, "propose", self._iteration, parent.hash).integers(2**31)),
                iteration=self._iteration,
                count=count,
                lm=self._setup.lm,
                optimizer_model=self._setup.optimizer_model,
                program_summary=self._setup.program_summary,
                metric_name=self._setup.metric_name,
                budget_left=self.ledger.left(),
            )
            made = await ask(self._setup.optimizer, context, self.ledger)
        self.ledger.charge_optimizer(made.usd, made.tokens)
        self.ledger.proposals += len(made.updates)
        self._setup.emit(made)
        good, refused = self._checker.candidates(made, parent)
        if good:
            return good, None
        if refused and made.outcome == "ok":
            detail = f"all {refused} proposed updates were refused (illegal edits or leaks)"
            made = ProposalMade(made.iteration, made.parent, "garbage", detail, [], None, 0)
        self._failures.replayed = replayed
        return [], made

    async def _nothing(self, problems: Sequence[ProposalMade], *, skipped: bool) -> None:
        failed = [made for made in problems if made.outcome in FAILURES]
        if failed:
            pause = self._failures.failed(failed[-1].detail, transient=all(made.transient for made in failed))
            if pause and not self._failures.replayed:
                await self._setup.sleep(pause)
            if all(made.transient for made in failed):
                self._since_gain -= 1  # waiting for a model is no failed attempt at a gain
        elif not skipped:
            self._barren += 1

    def _count_errors(self, proposals: Sequence[Proposal]) -> None:
        splits: tuple[Split, ...] = ("train", "validation")
        rows = [row for p in proposals for split in splits for row in self.board.rows(p.candidate, split)]
        errors = Counter(row.error.splitlines()[0] if row.error else "" for row in rows)
        if rows and "" not in errors:
            self._failures.failed(f"every rollout of every proposal failed: {errors.most_common(1)[0][0]}")
        else:
            self._failures.clear()

    # --- gate ---

    async def _gate(self, screened: ScreenResult, allotment: float) -> GateResult:
        if not screened.passed:
            return GateResult()
        places = max(1, int(allotment / gate_cost(self.sizes.validation)))
        for late in screened.passed[places:]:
            screened.reasons[late.candidate.hash] = f"passed the screen, but the gate had only {places} places"
        challengers = [proposal.candidate for proposal in screened.passed[:places]]
        gate = Gate(self.board, self._order, self._options.block_size, self._options.drop_alpha, allotment)
        return await gate.race(self.pool.best.candidate, challengers, self._look)

    def _look(self, rows: int, live: list[Candidate], leader: Candidate) -> None:
        self._setup.emit(
            GateProgress(
                iteration=self._iteration,
                rows=rows,
                total=len(self._order),
                live=[candidate.hash for candidate in live],
                leader=leader.hash,
                leader_mean=self.board.mean(leader, "validation", self._order[:rows]),
            )
        )

    def _settle(self, proposals: Sequence[Proposal], screened: ScreenResult, gate: GateResult) -> None:
        finished = {candidate.hash: self.board.mean(candidate, "validation") for candidate in gate.finished}
        self._setup.emit(GateDone(iteration=self._iteration, means=finished))
        best_before = self.pool.best.score
        for proposal in proposals:
            key = proposal.candidate.hash
            accepted, stage, reason = False, "screen", screened.reasons.get(key, "")
            if key in finished:
                before = self.board.mean(proposal.parent, "validation")
                accepted = finished[key] > before
                stage, reason = "gate", f"validation {finished[key]:.3f}, its parent {before:.3f}"
            elif key in gate.dropped:
                stage, reason = "gate", gate.dropped[key][1]
            if accepted:
                self.pool.add(proposal.candidate, finished[key])
            self._report(proposal, finished.get(key), best_before, accepted=accepted, stage=stage, reason=reason)
            self._remember(proposal, screened.scores.get(key), accepted=accepted, reason=reason)
        if self.pool.best.score > best_before:
            self._since_gain = 0

    def _report(
        self, proposal: Proposal, mean: float | None, best: float, *, accepted: bool, stage: str, reason: str
    ) -> None:
        key, parent, source = proposal.candidate.hash, proposal.parent.hash, proposal.update.source
        if accepted and mean is not None:
            event: Event = CandidateAccepted(self._iteration, key, parent, source, mean, best)
        else:
            event = CandidateRejected(self._iteration, key, parent, source, stage, reason)
        self._setup.emit(event)

    def _remember(self, proposal: Proposal, difference: float | None, *, accepted: bool, reason: str) -> None:
        seen = self.board.scores(proposal.candidate, "validation")
        batch = list(self.board.scores(proposal.candidate, "train"))
        screened = self.board.mean(proposal.candidate, "train", batch) if difference is not None else None
        self.history.append(
            PastProposal(
                candidate_hash=proposal.candidate.hash,
                parent_hash=proposal.parent.hash,
                update=proposal.update,
                screen=screened,
                validation=self.board.mean(proposal.candidate, "validation") if seen else None,
                accepted=accepted,
                reason=reason,
                screen_parent=self.board.mean(proposal.parent, "train", batch) if difference is not None else None,
            )
        )

    # --- the end ---

    async def _choose(self) -> Candidate:
        ties = near_ties(self.board, self.pool, self.baseline)
        if len(ties) == 1:
            return ties[0]
        known = self.board.scores(ties[0], "train")
        # Rows the leader already has come first: they cost the others less.
        rows = [*known, *self._minibatches.rest(known)]
        return await playoff(self.board, ties, rows, self._options.block_size)

    async def _claim(self, best: Candidate) -> Claim:
        claim = await self._test(best)
        self._setup.emit(TestDone(claim=claim.to_dict()))
        return claim

    async def _test(self, best: Candidate) -> Claim:
        test = self._setup.splits.get("test")
        if test is None or len(test) == 0:
            return no_claim("no test set was given") if best != self.baseline else baseline_claim([])
        self.ledger.reserved = 0
        ids = test.ids
        try:
            await self.board.run(self.baseline, "test", ids)
            if best != self.baseline:
                await self.board.run(best, "test", ids)
        except OutOfBudget as error:
            return no_claim(f"{error} before the test set was through", len(ids))
        before = self.board.scores(self.baseline, "test")
        if best == self.baseline:
            return baseline_claim([before[i] for i in ids])
        after = self.board.scores(best, "test")
        return make_claim([before[i] for i in ids], [after[i] for i in ids], seed=self._setup.seed)
