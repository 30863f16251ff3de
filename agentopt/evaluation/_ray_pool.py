"""The workers of one Ray cluster: started warm, given jobs, replaced when they die, their questions answered here.

Unit: one job on one worker (`once`), which either gives an answer or loses its worker. What a program on a worker asks
of a language model is answered in this process, in the context of whoever wants the job done.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
from collections.abc import Mapping
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any

import anyio

from agentopt.errors import AgentoptError, RunError, UserError
from agentopt.evaluation._ray_cluster import Cluster
from agentopt.evaluation._ray_worker import Worker
from agentopt.models import BudgetExhausted, serve

STARTS = 3
"""Times that starting one worker is tried."""
_START_SECONDS = 120.0
_log = logging.getLogger("agentopt.executor")


class WorkerLost(Exception):
    """The worker is gone; never leaves the executor."""


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


class Pool:
    """As many warm workers as were asked for; bound to the event loop that it is started in."""

    def __init__(self, cluster: Cluster, spec: str, workers: int) -> None:
        self.workers = workers
        self.lost = 0
        """Workers that died and were replaced."""
        self._ray = cluster.ray
        self._spec = spec
        self._actor = cluster.ray.remote(Worker)
        self._members: list[_Member] = []
        self._starting: set[asyncio.Task[None]] = set()
        self._broken: AgentoptError | None = None
        self._changed = asyncio.Event()
        self._numbers = itertools.count(1)

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

    async def once(
        self, method: str, data: Mapping[str, Any], *, alone: bool, patience: float | None
    ) -> dict[str, Any]:
        """One attempt on one worker; with `alone`, with nothing else on it.

        Raises:
            WorkerLost: it died, or gave no answer for `patience` seconds.
            UserError, RunError: what the job raised.
        """
        member = await self._take(alone=alone)
        name = f"{os.getpid()}-{next(self._numbers)}"
        flight = member.flights[name] = _Flight(copy_context())
        try:
            with anyio.fail_after(patience):
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
