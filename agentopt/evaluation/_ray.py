"""Rollouts on a Ray cluster: warm actors make them, this process keeps the store, the models and the budget.

Jobs go out and rows come back as JSON. What a program asks of a language model comes back too and is answered here, in
the context of the evaluation that wants the row: through the reply cache, within the budget, with its meters running.

Worker loss: the jobs of an actor that dies are made again, once beside others, then each alone on an actor, so that
a job which takes its worker down is found out; after the last of them its row is a failure that says so.
What a lost attempt paid for is in the reply cache, so it is not paid twice; its price is added to the row that is made
in the end. Only what it would have told by `report_usage` at its end is not known, and the log says so.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from contextvars import Context, copy_context
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import anyio

from agentopt import graph
from agentopt.errors import AgentoptError, RunError, UserError
from agentopt.evaluation._data import content_hash
from agentopt.evaluation._ray_cluster import Cluster, join
from agentopt.evaluation._ray_worker import Worker
from agentopt.evaluation._rows import EvaluationRow
from agentopt.graph import Meter, Trace, Usage
from agentopt.models import BudgetExhausted, environment_outside, roles_here, serve

if TYPE_CHECKING:
    from agentopt.evaluation._executors import Work
    from agentopt.evaluation._rollout import Job
    from agentopt.evaluation._rows import KeepTraces

SHARED, ALONE = 2, 2
"""Attempts beside other jobs, then attempts with nothing else on the worker."""
STARTS = 3
"""Times that starting one worker is tried."""
_START_SECONDS = 120.0
_log = logging.getLogger("agentopt.executor")


class WorkerLost(Exception):
    """The actor is gone; never leaves this file."""


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
        executor = RayExecutor(cluster, work, json.dumps(spec), count)
        try:
            await executor.start()
            yield executor
        finally:
            executor.close()
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


@dataclass(eq=False)
class _Member:
    """One actor."""

    actor: Any
    pid: int
    host: str
    load: int = 0
    alone: bool = False
    """Kept for one job."""
    alive: bool = True
    flights: dict[str, _Flight] = field(default_factory=dict[str, "_Flight"])
    answers: list[tuple[int, dict[str, Any]]] = field(default_factory=list[tuple[int, dict[str, Any]]])
    pump: asyncio.Task[None] | None = None


@dataclass(eq=False)
class _Flight:
    """One job on one worker, and the questions it has asked."""

    context: Context
    questions: dict[int, asyncio.Task[None]] = field(default_factory=dict[int, "asyncio.Task[None]"])


class RayExecutor:
    """Makes rollouts on the actors of one cluster; bound to the event loop that it is started in."""

    def __init__(self, cluster: Cluster, work: Work, spec: str, workers: int) -> None:
        self.workers = workers
        self.lost = 0
        """Workers that died and were replaced."""
        self._ray = cluster.ray
        self._spec = spec
        # A worker whose loop is blocked cannot cut its own jobs off; after this it is killed.
        timeout = work.options.timeout
        self._patience = None if timeout is None else timeout + max(15.0, 0.5 * timeout)
        self._program = work.program
        self._options = work.options
        self._actor = cluster.ray.remote(Worker)
        self._members: list[_Member] = []
        self._starting: set[asyncio.Task[None]] = set()
        self._broken: AgentoptError | None = None
        self._changed = asyncio.Event()
        self._numbers = itertools.count(1)
        self._crossed: set[tuple[str, str]] = set()

    @property
    def processes(self) -> list[int]:
        """The process ids of the live workers."""
        return [member.pid for member in self._members]

    async def start(self) -> None:
        """Start all workers; they load the program at the same time."""
        for _ in range(self.workers):
            self._launch()
        while self._starting and self._broken is None:
            await self._change()
        if self._broken is not None:
            raise self._broken

    def close(self) -> None:
        """End all workers."""
        for task in self._starting:
            task.cancel()
        for member in self._members:
            self._end(member)
        self._members.clear()

    # ---- work

    async def run(self, job: Job, keep: KeepTraces) -> tuple[EvaluationRow, Trace | None]:
        """One rollout on some worker; see the module's text for what happens when the worker dies.

        Raises:
            UserError, RunError: what the rollout raised that ends the evaluation, or a cluster that is gone.
        """
        self._check(job)
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
                    answer = await self._once("run", data, alone=attempt >= SHARED)
                except WorkerLost:
                    earlier.append(meter)
                    continue
            row = EvaluationRow.from_dict(answer["row"])
            if row.candidate_hash != job.candidate.hash:
                raise RunError(f"executor: a worker computed another hash for candidate {job.candidate.hash}")
            _count_unseen(row, meter)
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
        for attempt in range(SHARED + ALONE):
            try:
                answer = await self._once("call", {"function": function, "payload": payload}, alone=attempt >= SHARED)
            except WorkerLost:
                continue
            return answer["result"]
        raise RunError(f"executor: {SHARED + ALONE} workers died while they ran {function}")

    async def _once(self, method: str, data: Mapping[str, Any], *, alone: bool) -> dict[str, Any]:
        """One attempt on one worker.

        Raises:
            WorkerLost: it died, or blocked for longer than any job may take.
        """
        member = await self._take(alone=alone)
        name = f"{os.getpid()}-{next(self._numbers)}"
        flight = member.flights[name] = _Flight(copy_context())
        try:
            with anyio.fail_after(self._patience if method == "run" else None):
                text = await self._result(getattr(member.actor, method).remote(json.dumps({"id": name, **data})))
            answer = json.loads(text)
        except (WorkerLost, TimeoutError):
            self._lose(member)
            raise WorkerLost from None
        except asyncio.CancelledError:
            for question in flight.questions.values():
                question.cancel()
            if member.alive:
                member.actor.cancel.remote(name)
            raise
        finally:
            member.flights.pop(name, None)
            member.load -= 1
            member.alone = member.alone and not alone
            self._notify()
        if "fatal" in answer:
            raise _error(answer["fatal"])
        if "cancelled" in answer:
            raise RunError("executor: a worker's job was cancelled from outside")
        return answer

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

    # ---- workers

    async def _take(self, *, alone: bool) -> _Member:
        """The least busy worker; with `alone`, one with nothing else on it until the job is over."""
        while True:
            free = [member for member in self._members if not member.alone]
            if free:
                member = min(free, key=lambda one: one.load)
                member.load += 1
                member.alone = alone
                break
            if self._broken is not None:
                raise self._broken
            await self._change()
        try:
            while alone and member.alive and member.load > 1:
                await self._change()
        except BaseException:
            member.load -= 1
            member.alone = False
            self._notify()
            raise
        return member

    def _launch(self) -> None:
        task = asyncio.get_running_loop().create_task(self._start(), context=Context())
        self._starting.add(task)

        def done(ended: asyncio.Task[None]) -> None:
            self._starting.discard(ended)
            self._notify()

        task.add_done_callback(done)

    async def _start(self) -> None:
        """Add one worker to the members, or say in `_broken` why there is none."""
        problem: AgentoptError = RunError("executor: no worker could be started")
        for _ in range(STARTS):
            actor = self._actor.options(num_cpus=1, max_restarts=0, max_task_retries=0).remote()
            try:
                with anyio.fail_after(_START_SECONDS):
                    answer = json.loads(await self._result(actor.load.remote(self._spec)))
            except (WorkerLost, TimeoutError, AgentoptError) as error:
                why = str(error) or "it died while it loaded the program, or the cluster has no free CPU"
                problem = RunError(f"executor: a Ray worker cannot be started within {_START_SECONDS:.0f} s: {why}")
                self._ray.kill(actor)
                continue
            if "fatal" in answer:
                self._broken = _error(answer["fatal"])
                self._ray.kill(actor)
                return
            member = _Member(actor, int(answer["pid"]), str(answer["host"]))
            self._members.append(member)
            member.pump = asyncio.create_task(self._pump(member))
            return
        self._broken = problem

    def _lose(self, member: _Member) -> None:
        """Forget a worker that died and start another one in its place."""
        if not member.alive:
            return
        self.lost += 1
        _log.warning(
            "executor: the Ray worker %d on %s was lost; its %d jobs are made again and another worker is started "
            "(replies already paid for come from the cache; usage that the lost jobs had not reported yet is unknown)",
            member.pid, member.host, len(member.flights),
        )  # fmt: skip
        self._members.remove(member)
        self._end(member)
        self._launch()
        self._notify()

    def _end(self, member: _Member) -> None:
        member.alive = False
        if member.pump is not None:
            member.pump.cancel()
        self._ray.kill(member.actor)

    async def _change(self) -> None:
        await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # ---- questions

    async def _pump(self, member: _Member) -> None:
        """Take the worker's questions as they come up."""
        while member.alive:
            try:
                questions = json.loads(await self._result(member.actor.poll.remote()))
            except (WorkerLost, AgentoptError):
                self._lose(member)
                return
            for question in questions:
                self._heard(member, question)

    def _heard(self, member: _Member, question: Mapping[str, Any]) -> None:
        number, flight = int(question["number"]), member.flights.get(question["job"])
        if question.get("forget"):
            asked = flight.questions.get(number) if flight is not None else None
            if asked is not None:
                asked.cancel()
        elif flight is None:
            self._reply(member, number, {"failed": "the job that asked has ended"})
        else:
            work = self._serve(member, flight, number, question)
            # In the context of whoever wants the row: its models, its meters, its budget's guard.
            task = asyncio.get_running_loop().create_task(work, context=flight.context.copy())
            flight.questions[number] = task

    async def _serve(self, member: _Member, flight: _Flight, number: int, question: Mapping[str, Any]) -> None:
        try:
            self._reply(member, number, await serve(question))
        finally:
            flight.questions.pop(number, None)

    def _reply(self, member: _Member, number: int, answer: dict[str, Any]) -> None:
        """Answers of one round of the loop go out together."""
        member.answers.append((number, answer))
        if len(member.answers) == 1:
            asyncio.get_running_loop().call_soon(self._send, member)

    def _send(self, member: _Member) -> None:
        answers, member.answers = member.answers, []
        if member.alive:
            member.actor.answer.remote(json.dumps(answers))

    async def _result(self, reference: Any) -> str:
        """What a remote call gave.

        Raises:
            WorkerLost: its process, node or connection is gone.
            RunError: the worker's own code failed.
        """
        loop = asyncio.get_running_loop()
        mine: asyncio.Future[str] = loop.create_future()

        def settle(text: str | None, error: BaseException | None) -> None:
            if mine.done():
                return
            if error is None:
                mine.set_result(text or "")
            elif isinstance(error, self._ray.exceptions.RayTaskError):
                last = str(error).strip().splitlines()[-1]
                mine.set_exception(RunError(f"executor: a worker's own code failed: {last}"))
            else:
                mine.set_exception(WorkerLost(" ".join(str(error).split())[:300]))

        def done(theirs: Any) -> None:
            try:
                error = theirs.exception()
                loop.call_soon_threadsafe(settle, None if error is not None else theirs.result(), error)
            except RuntimeError:
                return  # the loop is closed: nobody waits any more

        reference.future().add_done_callback(done)
        return await mine


def _error(data: Mapping[str, Any]) -> AgentoptError:
    if data["type"] == "BudgetExhausted":
        return BudgetExhausted(str(data["text"]))
    return (UserError if data["exit_code"] == 2 else RunError)(str(data["text"]))


def _count_unseen(row: EvaluationRow, served: Meter) -> None:
    """Tell the meters here what the rollout spent without asking here (report_usage, clients of its own)."""
    mine, theirs = served.usage, row.usage
    rest = Usage(
        input_tokens=max(0, theirs.input_tokens - mine.input_tokens),
        output_tokens=max(0, theirs.output_tokens - mine.output_tokens),
        calls=max(0, theirs.calls - mine.calls),
    )
    cost = None if row.cost is None else max(0.0, row.cost - served.cost)
    if rest or (cost is not None and cost > 1e-12):
        graph.meter_add(rest, cost)


def _with_lost(row: EvaluationRow, earlier: list[Meter]) -> EvaluationRow:
    """The row as if its first attempt had lived: what the lost ones paid for was found again in the cache."""
    for meter in earlier:
        cost = None if row.cost is None or meter.unpriced_calls else row.cost + meter.cost
        usage = row.usage + meter.usage
        again = min(row.usage.cached_calls, meter.usage.calls)
        row = replace(row, usage=replace(usage, cached_calls=usage.cached_calls - again), cost=cost)
    return row
