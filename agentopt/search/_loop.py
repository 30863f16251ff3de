"""One run: baseline → the driver's search → final pick → the one claim on the test set.

Decisions read results in a fixed order at block boundaries, so equal rows give equal decisions, also after a resume.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import anyio

from agentopt.errors import UserError
from agentopt.evaluation import Dataset, EvaluationResult
from agentopt.graph import Candidate, ParameterSpec
from agentopt.models import LM
from agentopt.optimizers import Optimizer, PastProposal
from agentopt.search._baseline import Baseline, check_first_rows, discover
from agentopt.search._board import Board, RowSource, Split
from agentopt.search._budget import Budget, Ledger, OutOfBudget
from agentopt.search._choose import cheapest, near_ties, playoff
from agentopt.search._claim import Claim, baseline_claim, make_claim, no_claim
from agentopt.search._driver import Driver, Planner
from agentopt.search._events import BaselineDone, Event, RunStarted, TestDone, Warning_
from agentopt.search._failures import Failures
from agentopt.search._lab import Asking, Lab
from agentopt.search._leaks import LeakGuard
from agentopt.search._options import TuneOptions
from agentopt.search._plan import Plan, Sizes, check_after, check_before, make_plan
from agentopt.search._pool import Pool
from agentopt.search._propose import Checker
from agentopt.search._resume import Replay
from agentopt.search._round import Planned
from agentopt.search._sampling import Minibatches, balanced_order, draw


@dataclass(frozen=True)
class Setup:
    """Everything one search needs; `tune_program` makes it from a program, tests from synthetic rows."""

    run_id: str
    program_name: str
    specs: Mapping[str, ParameterSpec]
    source: RowSource
    optimizer: Optimizer
    driver: Driver | Planner
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
    files: str = ""
    """A folder in which optimizers may keep what they make."""
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
    kept: Sequence[Candidate] = ()
    """The baseline and every candidate that was accepted."""


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
        self.warnings: list[str] = []
        self._specs = setup.specs
        self._order = balanced_order(splits["validation"], draw(setup.seed, "validation"))
        self._minibatches = Minibatches(splits["train"], options.screen_size, setup.seed)

    def _make_lab(self) -> Lab:
        setup = self._setup
        checker = Checker(self._specs, LeakGuard(setup.splits, self.baseline, self._specs), setup.emit)
        checker.seen.add(self.baseline.hash)
        return Lab(
            asking=Asking(
                optimizer=setup.optimizer,
                program_name=setup.program_name,
                train=setup.splits["train"],
                lm=setup.lm,
                optimizer_model=setup.optimizer_model,
                program_summary=setup.program_summary,
                metric_name=setup.metric_name,
                files=setup.files,
            ),
            specs=self._specs,
            baseline=self.baseline,
            board=self.board,
            pool=self.pool,
            checker=checker,
            order=self._order,
            minibatches=self._minibatches,
            sizes=self.sizes,
            budget=setup.budget,
            options=setup.options,
            seed=setup.seed,
            replay=setup.replay,
            failures=Failures(setup.options.max_failures, setup.options.max_wait, setup.run_id),
            emit=setup.emit,
            sleep=setup.sleep,
        )

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
        lab = self._make_lab()
        reason = await self._search(lab)
        best = await self._choose(lab.kept)
        claim = await self._claim(best)
        return Outcome(self.baseline, best, claim, reason, plan, lab.history, self.warnings, tuple(lab.kept))

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

    async def _search(self, lab: Lab) -> str:
        driver = self._setup.driver
        steering = driver if isinstance(driver, Driver) else Planned(driver)
        try:
            return await steering.run(lab)
        except OutOfBudget as error:
            return str(error)

    # --- the end ---

    async def _choose(self, kept: Sequence[Candidate]) -> Candidate:
        several = len(self._options.objectives) > 1
        # A cheap candidate need not be among the few with the best scores.
        ties = near_ties(self.board, self.pool, self.baseline, kept if several else None)
        if len(ties) == 1:
            return ties[0]
        if several:
            return cheapest(self.board, ties, self._options.objectives)
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
