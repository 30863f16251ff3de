"""Where rollouts run: in this process, or on the workers of a Ray cluster. The evaluator does not know which.

An executor makes one rollout and gives its row and trace back; the evaluator alone keeps, caches and stores them. The
local one is the `Runner` itself. Ray is imported only when an executor of it is opened.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from agentopt.errors import UserError
from agentopt.evaluation._loading import absolute_reference
from agentopt.evaluation._metrics import NAMES, MetricSpec

if TYPE_CHECKING:
    from agentopt.evaluation._program import Program
    from agentopt.evaluation._rollout import Job
    from agentopt.evaluation._rows import EvaluationOptions, EvaluationRow, KeepTraces
    from agentopt.graph import Trace

LOCAL = "local"
RAY = "ray"
_ADDRESS = "ray://"


class Executor(Protocol):
    """Makes rollouts somewhere."""

    @property
    def workers(self) -> int:
        """Processes that make rollouts; the evaluator keeps at least this many rollouts under way."""
        ...

    async def run(self, job: Job, keep: KeepTraces) -> tuple[EvaluationRow, Trace | None]:
        """The row of one rollout, and its trace where `keep` asks for it; raises what ends the whole evaluation."""
        ...


class RemoteExecutor(Executor, Protocol):
    """An executor whose workers also take other work."""

    async def call(self, function: str, payload: Any) -> Any:
        """Run `async def function(payload)` (a `module:name` of agentopt, JSON in and out) on some worker.

        The language models it asks are those of the caller's context, within the caller's budget.
        """
        ...


@dataclass(frozen=True)
class Work:
    """What a worker needs to know before its first job; everything in it can cross as JSON."""

    program: Program
    metric: MetricSpec
    options: EvaluationOptions
    output_field: str | None = None
    allow_effects: bool = False
    sandbox: str = ""
    """The tier in which workers run changed code; "auto" and empty mean the strongest that works on each of them."""

    def references(self) -> tuple[str, str]:
        """Program and metric by names that another process can load.

        Raises:
            UserError: one of them was given as an object.
        """
        if self.program.reference is None:
            raise UserError(
                f"executor: {self.program.name} was given as an object, which another process cannot load; give its "
                "path instead, for example ao.tune('agent.py:main', ...), or use the local executor."
            )
        if not isinstance(self.metric, str):
            name = getattr(self.metric, "__name__", type(self.metric).__name__)
            raise UserError(
                f"executor: the metric {name} was given as an object, which another process cannot load; give a name "
                "such as 'exact_match' or its path, for example metric='agent.py:score', or use the local executor."
            )
        named = self.metric.partition(":")[0] in NAMES
        return self.program.reference, self.metric if named else absolute_reference(self.metric)


def check_executor(executor: str, workers: int | None) -> None:
    """Refuse what no executor understands.

    Raises:
        UserError: another name than local, ray or ray://host:port; workers for the local one, or fewer than 1.
    """
    if executor not in (LOCAL, RAY) and not (executor.startswith(_ADDRESS) and len(executor) > len(_ADDRESS)):
        raise UserError(f"executor: found {executor!r}; expected local, ray, or ray://HOST:PORT of a running cluster")
    if workers is None:
        return
    if isinstance(workers, bool) or workers < 1:
        raise UserError(f"workers must be a whole number of at least 1; found {workers!r}")
    if executor == LOCAL:
        raise UserError(
            "workers are processes of the ray executor; give --executor ray too, or --concurrency for how many "
            "examples run at the same time in this process"
        )


@asynccontextmanager
async def open_executor(executor: str, workers: int | None, work: Work) -> AsyncGenerator[RemoteExecutor | None]:
    """The executor of that name, with its workers started, until the block ends; None for the local one.

    The models that the workers use are those of the context in which this is entered.

    Raises:
        UserError: an unknown executor, Ray not installed or not reachable, or work that no other process can load.
        RunError: the workers cannot be started.
    """
    check_executor(executor, workers)
    if executor == LOCAL:
        yield None
        return
    program, metric = work.references()
    from agentopt.evaluation._ray import ray_executor

    async with ray_executor(executor, workers, work, program, metric) as opened:
        yield opened
