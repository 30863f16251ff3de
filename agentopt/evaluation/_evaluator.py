"""The evaluator: a candidate on a dataset, many rollouts at a time, each on its own, none made twice.

Invariants: results come in example order whatever finished first; a row is made once per key (candidate, dataset,
example, repeat, seed), also when two evaluations ask for it at the same time; a rollout that raises or hangs is a row.
With a store and a run id, rows and traces are written as they come and found again by a later process.

Limits: a sync program that hangs is left behind in its thread (see `_threads`); an async one that blocks the event loop
without awaiting cannot be interrupted at all and holds up every other rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio

from agentopt.errors import AgentoptError, UserError
from agentopt.evaluation._data import Dataset, content_hash
from agentopt.evaluation._executors import Executor
from agentopt.evaluation._metrics import Metric
from agentopt.evaluation._program import Program
from agentopt.evaluation._rollout import Job, Runner
from agentopt.evaluation._rows import (
    EvaluationOptions,
    EvaluationResult,
    EvaluationRow,
    KeepTraces,
    RowKey,
)
from agentopt.graph import Candidate, Trace

if TYPE_CHECKING:
    from agentopt.store import Store

OnRow = Callable[[EvaluationRow], None]


class _State:
    """One evaluation under way."""

    def __init__(self, jobs: Iterator[tuple[int, Job]], keep: KeepTraces, on_row: OnRow | None) -> None:
        self.jobs = jobs
        self.keep: KeepTraces = keep
        self.on_row = on_row
        self.rows: dict[int, EvaluationRow] = {}
        self.fatal: AgentoptError | None = None

    def done(self, index: int, row: EvaluationRow) -> None:
        self.rows[index] = row
        if self.on_row is not None:
            self.on_row(row)


async def _stay_awake() -> None:
    """Have the loop look around twice a second: a Ctrl-C that comes just before it goes to sleep is noticed then."""
    while True:
        await anyio.sleep(0.5)


class Evaluator:
    """Runs candidates of one program under one metric; one per run, so that its cache and its limits are shared."""

    def __init__(
        self,
        program: Program,
        metric: Metric,
        options: EvaluationOptions | None = None,
        *,
        store: Store | None = None,
        run_id: str | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.program = program
        self.metric = metric
        self.options = options or EvaluationOptions()
        self.store = store if run_id is not None else None
        self.run_id = run_id
        self._runner: Executor = executor or Runner(program, metric, self.options)
        self._concurrency = max(self.options.concurrency, self._runner.workers)
        self._rows: dict[RowKey, EvaluationRow] = {}
        self._loaded: set[tuple[str, str]] = set()
        self._flights: dict[RowKey, anyio.Event] = {}
        self._traces: dict[str, Trace] = {}  # only without a store
        self._limit: anyio.Semaphore | None = None
        self._active = 0

    async def evaluate(
        self,
        candidate: Candidate,
        examples: Dataset,
        *,
        ids: Sequence[str] | None = None,
        keep_traces: KeepTraces | None = None,
        on_row: OnRow | None = None,
    ) -> EvaluationResult:
        """Rows for each example and repeat, in example order.

        Args:
            candidate: the values to run with; the empty candidate means all declared defaults.
            examples: the dataset; rows are cached under its id.
            ids: only these examples, in this order.
            keep_traces: overrides the options. Where a cached row has no trace that is wanted, the example is run again
                for its trace; the row keeps its score, so that decisions made from it stand.
            on_row: called for every row as it is there, cached ones first.

        Raises:
            UserError: an example without the expected answer that the metric needs, a lost context, a metric that
                returns no score.
            RunError: an exhausted budget, a store that cannot write, too many hanging rollouts.
        """
        chosen = list(examples) if ids is None else [examples.get(example_id) for example_id in ids]
        self._check(examples, [example.id for example in chosen if example.expected is None])
        repeats = self.options.repeats
        jobs = [Job(candidate, examples.id, example, repeat) for example in chosen for repeat in range(repeats)]
        self._load(candidate.hash, examples.id)
        keep = keep_traces or self.options.keep_traces
        pending: list[tuple[int, Job]] = []
        state = _State(iter(()), keep, on_row)
        for index, job in enumerate(jobs):
            row = self._rows.get(self._key(job))
            if row is not None and not self._lacks_trace(row, keep):
                state.done(index, replace(row, cached=True))
            else:
                pending.append((index, job))
        state.jobs = iter(pending)
        await self._work(state, len(pending))
        return EvaluationResult(
            candidate=candidate,
            dataset=examples,
            rows=tuple(state.rows[index] for index in range(len(jobs))),
            options=self.options,
            load_trace=self._load_trace,
            abandoned=self.program.threads.abandoned,
        )

    def _check(self, dataset: Dataset, unlabelled: list[str]) -> None:
        if unlabelled and self.metric.needs_expected:
            raise UserError(
                f"metric {self.metric.name!r} needs an expected answer, but {len(unlabelled)} of the examples of "
                f"{dataset.name!r} have none (for example {unlabelled[0]}); name the column with --label, or use a "
                "metric that needs none."
            )

    async def _work(self, state: _State, count: int) -> None:
        if not count:
            return
        if self._active == 0:  # bound to the running loop, which may be another one than last time
            self._limit = anyio.Semaphore(self._concurrency)
        self._active += 1
        try:
            async with anyio.create_task_group() as outer:
                outer.start_soon(_stay_awake)
                async with anyio.create_task_group() as tasks:
                    for _ in range(min(count, self._concurrency)):
                        tasks.start_soon(self._worker, state, tasks.cancel_scope)
                outer.cancel_scope.cancel()
        finally:
            self._active -= 1
        if state.fatal is not None:
            raise state.fatal

    async def _worker(self, state: _State, scope: anyio.CancelScope) -> None:
        for index, job in state.jobs:
            try:
                state.done(index, await self._once(job, state.keep))
            except AgentoptError as error:
                # Not through the task group, which would wrap it: the caller catches it by its type.
                state.fatal = state.fatal or error
                scope.cancel()
                return

    async def _once(self, job: Job, keep: KeepTraces) -> EvaluationRow:
        """This row, made here or by whoever is already making it."""
        key = self._key(job)
        while (flight := self._flights.get(key)) is not None:
            await flight.wait()
        known = self._rows.get(key)
        if known is not None and not self._lacks_trace(known, keep):
            return replace(known, cached=True)
        flight = self._flights[key] = anyio.Event()
        try:
            return await self._make(job, key, known, keep)
        finally:
            del self._flights[key]
            flight.set()

    async def _make(self, job: Job, key: RowKey, known: EvaluationRow | None, keep: KeepTraces) -> EvaluationRow:
        limit = self._limit
        if limit is None:  # set before any worker starts
            raise RuntimeError("the evaluator has no limit")
        async with limit:
            # What is already known keeps its score; it is run again only for the trace.
            row, trace = await self._runner.run(job, keep if known is None else "all")
        if known is not None:
            row = replace(known, cached=True)
        if trace is not None:
            row = replace(row, trace_id=self._keep_trace(key, trace))
        self._rows[key] = row
        if self.store is not None and self.run_id is not None:
            self.store.put_evaluations(self.run_id, [row.to_dict()])
        return row

    # ---- cache and traces

    def _key(self, job: Job) -> RowKey:
        return (job.candidate.hash, job.dataset_id, job.example.id, job.repeat, self.options.seed)

    def _lacks_trace(self, row: EvaluationRow, keep: KeepTraces) -> bool:
        if row.trace_id is not None or keep == "never":
            return False
        return keep == "all" or row.error is not None or row.score < self.options.perfect_score

    def _load(self, candidate_hash: str, dataset_id: str) -> None:
        """Bring the rows of an earlier process into memory, once per candidate and dataset."""
        place = (candidate_hash, dataset_id)
        if self.store is None or self.run_id is None or place in self._loaded:
            return
        self._loaded.add(place)
        for data in self.store.evaluations(self.run_id, candidate_hash, dataset_id):
            row = EvaluationRow.from_dict(data)
            self._rows.setdefault(row.key, row)

    def _keep_trace(self, key: RowKey, trace: Trace) -> str:
        trace_id = content_hash([self.run_id, *key])
        if self.store is None or self.run_id is None:
            self._traces[trace_id] = trace
        else:
            self.store.put_trace(self.run_id, trace_id, trace.to_dict())
        return trace_id

    def _load_trace(self, trace_id: str) -> Trace | None:
        if self.store is None:
            return self._traces.get(trace_id)
        payload = self.store.trace(trace_id)
        return None if payload is None else Trace.from_dict(payload)
