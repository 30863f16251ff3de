"""Rollouts on a Ray cluster: warm actors make them, this process keeps the store, the models and the budget.

Jobs go out and rows come back as JSON. What a program asks of a language model comes back too and is answered here, in
the context of the evaluation that wants the row: through the reply cache, within the budget, with its meters running.

Worker loss: the jobs of an actor that dies are made again, once beside others, then each alone on an actor, so that
a job which takes its worker down is found out; after the last of them its row is a failure that says so.
What a lost attempt paid for is in the reply cache, so it is not paid twice; its price is added to the row that is made
in the end. Only what it would have told by `report_usage` at its end is not known, and the log says so.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import anyio

from agentopt import graph
from agentopt.errors import RunError, UserError
from agentopt.evaluation._data import content_hash
from agentopt.evaluation._ray_cluster import join
from agentopt.evaluation._ray_pool import Pool, WorkerLost
from agentopt.evaluation._rows import EvaluationRow
from agentopt.graph import Meter, Trace, Usage
from agentopt.models import Request, environment_outside, roles_here, spend_guard

if TYPE_CHECKING:
    from agentopt.evaluation._executors import Work
    from agentopt.evaluation._rollout import Job
    from agentopt.evaluation._rows import KeepTraces

SHARED, ALONE = 2, 2
"""Attempts beside other jobs, then attempts with nothing else on the worker."""


@asynccontextmanager
async def ray_executor(
    address: str, workers: int | None, work: Work, program: str, metric: str
) -> AsyncGenerator[RayExecutor]:
    """A cluster with warm workers for the length of the block.

    Raises:
        UserError: Ray is not installed or not reachable, too few CPUs, or the workers cannot load the program.
        RunError: the cluster or the workers cannot be started.
    """
    spec = _spec(work, program, metric)
    cluster = await join(address, workers)
    try:
        count = workers or cluster.cpus
        if count > cluster.cpus:
            raise UserError(
                f"executor: {count} workers were asked for and the Ray cluster has {cluster.cpus} CPUs, one per "
                f"worker; give --workers {cluster.cpus} or fewer."
            )
        pool = Pool(cluster, json.dumps(spec), count)
        try:
            await pool.start()
            yield RayExecutor(pool, work)
        finally:
            pool.close()
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(cluster.close)


def _spec(work: Work, program: str, metric: str) -> dict[str, Any]:
    """What every worker is told before its first job."""
    outside = environment_outside()
    asked = getattr(graph.chosen_code_runner(), "_wanted", None)  # a `sandboxed` block around this
    sandbox = work.sandbox or (asked if isinstance(asked, str) else "")
    key = (outside or {}).get("OPENAI_API_KEY")
    upstream = outside is not None and bool(key or outside.get("OPENAI_BASE_URL"))
    return {
        "program": program,
        "defaults": content_hash(work.program.defaults),
        "metric": metric,
        "output_field": work.output_field,
        "options": asdict(work.options),
        "allow_effects": work.allow_effects,
        "sandbox": "" if sandbox == "auto" else sandbox,
        # With an endpoint and no configured agent, captured calls go where the user's own client would have gone.
        "roles": roles_here(default_agent=not upstream),
        "capture": outside is not None,
        "endpoint": os.environ.get("OPENAI_BASE_URL") if outside is not None else "",
        "environment": outside or {},
        "folder": os.getcwd(),
        "path": [entry for entry in sys.path if entry and "site-packages" not in entry],
    }


class RayExecutor:
    """Makes rollouts on the workers of a pool."""

    def __init__(self, pool: Pool, work: Work) -> None:
        self.workers = pool.workers
        self._pool = pool
        self._program = work.program
        self._options = work.options
        timeout = work.options.timeout
        # A worker whose loop is blocked cannot cut its own jobs off; after this it counts as lost.
        self._patience = None if timeout is None else timeout + max(15.0, 0.5 * timeout)
        self._crossed: set[tuple[str, str]] = set()
        self._unseen = False

    async def run(self, job: Job, keep: KeepTraces) -> tuple[EvaluationRow, Trace | None]:
        """One rollout on some worker; see the module's text for what happens when the worker dies.

        Raises:
            BudgetExhausted: what rollouts spent without asking here has used up the budget.
            UserError, RunError: what the rollout raised that ends the evaluation, or a cluster that is gone.
        """
        self._check(job)
        guard = spend_guard.get()
        if self._unseen and guard is not None:  # spend that passes no gate here is looked at before each rollout
            guard(Request("", ()))
        data = {
            "values": dict(job.candidate.values),
            "dataset_id": job.dataset_id,
            "example": job.example.to_dict(),
            "repeat": job.repeat,
            "keep": keep,
        }
        earlier: list[Meter] = []
        for attempt in range(SHARED + ALONE):
            with graph.metered() as meter:
                try:
                    answer = await self._pool.once("run", data, alone=attempt >= SHARED, patience=self._patience)
                except WorkerLost:
                    earlier.append(meter)
                    continue
            row = EvaluationRow.from_dict(answer["row"])
            if row.candidate_hash != job.candidate.hash:
                raise RunError(f"executor: a worker computed another hash for candidate {job.candidate.hash}")
            self._unseen |= _count_unseen(row, meter)
            for name in answer["formatted"]:  # how the program uses a prompt decides which edits of it are legal
                self._program.parameters[name].formatted = True
            trace = answer["trace"]
            return _with_lost(row, earlier), None if trace is None else Trace.from_dict(trace)
        return _with_lost(self._failure(job), earlier), None

    async def call(self, function: str, payload: Any) -> Any:
        """Run `module:name` of agentopt on some worker, with JSON in and out.

        Raises:
            UserError, RunError: what the function raised, or workers that die again and again.
        """
        data = {"function": function, "payload": payload}
        for attempt in range(SHARED + ALONE):
            try:
                answer = await self._pool.once("call", data, alone=attempt >= SHARED, patience=None)
            except WorkerLost:
                continue
            return answer["result"]
        raise RunError(f"executor: {SHARED + ALONE} workers died while they ran {function}")

    def _failure(self, job: Job) -> EvaluationRow:
        text = (
            f"the worker process died or blocked {SHARED + ALONE} times while it ran this example, the last {ALONE} "
            "times with nothing else on it (out of memory, a crash in native code, os._exit, or a blocked event loop)"
        )
        key = (job.candidate.hash, job.dataset_id, job.example.id, job.repeat, self._options.seed)
        return EvaluationRow(*key, score=self._options.min_score, feedback=f"The program failed: {text}.", error=text)

    def _check(self, job: Job) -> None:
        """Refuse an example that would arrive as another one.

        Raises:
            UserError: it holds something that JSON does not keep.
        """
        place = (job.dataset_id, job.example.id)
        if place in self._crossed:
            return
        data = job.example.to_dict()
        try:
            same = json.loads(json.dumps(data)) == data
        except (TypeError, ValueError):
            same = False
        if not same:
            raise UserError(
                f"executor: example {job.example.id} holds a value that JSON does not keep (a date, a tuple, bytes, a "
                "key that is no text, ...); use text, numbers, lists and maps, or the local executor."
            )
        self._crossed.add(place)


def _count_unseen(row: EvaluationRow, served: Meter) -> bool:
    """Tell the meters here what the rollout spent without asking here (report_usage, clients of its own), if it did."""
    mine, theirs = served.usage, row.usage
    rest = Usage(
        input_tokens=max(0, theirs.input_tokens - mine.input_tokens),
        output_tokens=max(0, theirs.output_tokens - mine.output_tokens),
        calls=max(0, theirs.calls - mine.calls),
    )
    cost = None if row.cost is None else max(0.0, row.cost - served.cost)
    if not rest and (cost is None or cost <= 1e-12):
        return False
    graph.meter_add(rest, cost)
    return True


def _with_lost(row: EvaluationRow, earlier: list[Meter]) -> EvaluationRow:
    """The row as if its first attempt had lived: what the lost ones paid for was found again in the cache."""
    for meter in reversed(earlier):  # each found again what those before it had paid for
        cost = None if row.cost is None or meter.unpriced_calls else row.cost + meter.cost
        row = replace(row, usage=_without_again(row.usage, meter), cost=cost)
    return row


def _without_again(usage: Usage, lost: Meter) -> Usage:
    """Both together; the lost attempt's calls, which the later one found in the cache, count once."""
    total, first = usage + lost.usage, lost.usage
    price = total.cached_cost
    if price is not None:
        price -= min(usage.cached_cost or 0.0, lost.cost + (first.cached_cost or 0.0))
    return replace(
        total,
        cached_calls=total.cached_calls - min(usage.cached_calls, first.calls + first.cached_calls),
        cached_input_tokens=total.cached_input_tokens
        - min(usage.cached_input_tokens, first.input_tokens + first.cached_input_tokens),
        cached_output_tokens=total.cached_output_tokens
        - min(usage.cached_output_tokens, first.output_tokens + first.cached_output_tokens),
        cached_cost=price,
    )
