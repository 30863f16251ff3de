"""The worker's side of a remote executor: a warm process that loads the program once and takes jobs as JSON.

It knows nothing of Ray: its methods are coroutines that take and give JSON text, called by whoever started it. What the
program asks of a language model goes into an outbox that the driver empties (`poll`) and comes back by `answer`; the
driver owns the models, the reply cache and the budget. The store is never opened here.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import os
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any, cast

from agentopt.errors import AgentoptError, UserError
from agentopt.evaluation._data import Example, content_hash
from agentopt.evaluation._metrics import resolve_metric
from agentopt.evaluation._program import load_program
from agentopt.evaluation._rollout import Job, Runner
from agentopt.evaluation._rows import EvaluationOptions
from agentopt.graph import Candidate, allow_effects, use_code_runner
from agentopt.models import Capture, ModelsConfig, remote_models, use
from agentopt.sandbox import RunnerPool

POLL_SECONDS = 20.0
_job: ContextVar[str] = ContextVar("agentopt_remote_job", default="")


class Worker:
    """One process that makes rollouts; all methods run on its event loop."""

    def __init__(self) -> None:
        self._runner: Runner | None = None
        self._models = ModelsConfig()
        self._effects = False
        self._code: RunnerPool | None = None
        self._tasks: dict[str, asyncio.Task[str]] = {}
        self._outbox: list[dict[str, Any]] = []
        self._waiting: dict[int, Future[dict[str, Any]]] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._news: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._surroundings = ExitStack()

    async def load(self, spec: str) -> str:
        """Load program and metric; answers with this process's id and host, or with what is wrong."""
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        try:
            self._load(json.loads(spec))
        except AgentoptError as error:
            return json.dumps({"fatal": _fatal(error)})
        return json.dumps({"pid": os.getpid(), "host": socket.gethostname()})

    async def run(self, job: str) -> str:
        """One rollout: its row, and its trace where it is wanted; or the error that ends the evaluation."""
        data = json.loads(job)
        return await self._work(data["id"], self._rollout(data))

    async def call(self, job: str) -> str:
        """Another coroutine function of agentopt, JSON in and out."""
        data = json.loads(job)
        module, _, name = str(data["function"]).partition(":")
        if module.partition(".")[0] != "agentopt":
            raise ValueError(f"{module} is no module of agentopt")
        function = cast("Callable[[Any], Awaitable[Any]]", getattr(importlib.import_module(module), name))
        return await self._work(data["id"], self._called(function, data["payload"]))

    async def cancel(self, job: str) -> None:
        """Stop a job; whoever waits for it has gone."""
        task = self._tasks.get(job)
        if task is not None:
            task.cancel()

    async def poll(self) -> str:
        """The questions that have come up, at once when there are some; an empty list after a while."""
        if self._news is None:
            raise RuntimeError("the worker was not loaded")
        if not self._outbox:
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), POLL_SECONDS)
            except TimeoutError:
                return "[]"
        with self._lock:
            questions, self._outbox = self._outbox, []
        return json.dumps(questions)

    async def answer(self, answers: str) -> None:
        """Answers to questions, by number."""
        for number, answer in json.loads(answers):
            waiting = self._waiting.pop(number, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(answer)

    # ---- inside

    def _load(self, spec: Mapping[str, Any]) -> None:
        _enter(spec)
        program = load_program(str(spec["program"]))
        if content_hash(program.defaults) != spec["defaults"]:
            raise UserError(
                f"{spec['program']} on {socket.gethostname()} declares other parameters than where the run was "
                "started; put the same files on every machine of the cluster."
            )
        metric = resolve_metric(str(spec["metric"]), spec["output_field"])
        self._effects = bool(spec["allow_effects"])
        self._code = RunnerPool(tier=spec["sandbox"] or None)
        self._models = remote_models(spec["roles"], self._forward)
        self._runner = Runner(program, metric, EvaluationOptions(**spec["options"]))
        if spec["capture"]:
            self._surroundings.enter_context(Capture())

    async def _work(self, name: str, work: Awaitable[dict[str, Any]]) -> str:
        code = self._code
        if code is None:
            raise RuntimeError("the worker was not loaded")

        async def whole() -> str:
            _job.set(name)
            try:
                with use(self._models), allow_effects(self._effects), use_code_runner(code):
                    return json.dumps(await work)
            except AgentoptError as error:
                return json.dumps({"fatal": _fatal(error)})

        task = self._tasks[name] = asyncio.create_task(whole())
        try:
            return await task
        except asyncio.CancelledError:
            return json.dumps({"cancelled": True})
        finally:
            self._tasks.pop(name, None)

    async def _rollout(self, data: Mapping[str, Any]) -> dict[str, Any]:
        if self._runner is None:
            raise RuntimeError("the worker was not loaded")
        example = Example.from_dict(data["example"])
        job = Job(Candidate(data["values"]), data["dataset_id"], example, data["repeat"])
        row, trace = await self._runner.run(job, data["keep"])
        formatted = [name for name, spec in self._runner.program.parameters.items() if spec.formatted]
        return {"row": row.to_dict(), "trace": None if trace is None else trace.to_dict(), "formatted": formatted}

    @staticmethod
    async def _called(function: Callable[[Any], Awaitable[Any]], payload: Any) -> dict[str, Any]:
        return {"result": await function(payload)}

    async def _forward(self, question: dict[str, Any]) -> dict[str, Any]:
        """Ask the driver; may be awaited in any loop and thread of this process that carries the job's context."""
        number = next(self._numbers)
        waiting: Future[dict[str, Any]] = Future()
        self._waiting[number] = waiting
        self._say({"number": number, "job": _job.get(), **question})
        try:
            return await asyncio.shield(asyncio.wrap_future(waiting))
        except asyncio.CancelledError:
            if self._waiting.pop(number, None) is not None:
                self._say({"number": number, "job": _job.get(), "forget": True})
            raise

    def _say(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._outbox.append(message)
        if self._loop is not None and self._news is not None:
            self._loop.call_soon_threadsafe(self._news.set)


def _enter(spec: Mapping[str, Any]) -> None:
    """Folder, import path and environment as where the run was started, as far as they exist here."""
    if os.path.isdir(spec["folder"]):
        os.chdir(spec["folder"])
    for entry in reversed(spec["path"]):
        if entry not in sys.path and os.path.isdir(entry):
            sys.path.insert(0, entry)
    if os.environ.get("OPENAI_BASE_URL") == spec["endpoint"]:  # inherited from the driver, whose endpoint is not ours
        for name, value in spec["environment"].items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _fatal(error: AgentoptError) -> dict[str, Any]:
    return {"type": type(error).__name__, "exit_code": error.exit_code, "text": str(error)}
