"""One rollout: run the program on one example under one candidate, score it, and turn every failure into a row.

What stops the evaluation instead of being scored: mistakes that no candidate can repair (a lost context, a refused tool
effect, an unknown model, a metric that returns no score), an exhausted budget and a store that cannot write.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from agentopt import graph
from agentopt.errors import RunError, UserError
from agentopt.evaluation._data import Example
from agentopt.evaluation._loading import user_line
from agentopt.evaluation._metrics import Metric
from agentopt.evaluation._program import Program
from agentopt.evaluation._rows import EvaluationOptions, EvaluationRow, KeepTraces, Score
from agentopt.graph import Candidate, EffectsRefused, LostContextError, Meter, Recording, RolloutScope, Trace
from agentopt.models import BudgetExhausted, UnknownModel, capture_session
from agentopt.models._patience import patient
from agentopt.sandbox import SandboxUnavailable
from agentopt.store import StoreError

FATAL = (LostContextError, EffectsRefused, UnknownModel, BudgetExhausted, StoreError, SandboxUnavailable)
_MAX_OUTPUT = 20_000  # characters of an output's JSON kept in its row; the trace keeps the value


class MetricError(UserError):
    """A metric cannot be used: what it returned, for which example."""


class TooManyAbandoned(RunError):
    """So many sync rollouts hang that their threads would fill the machine."""


@dataclass(slots=True)
class _Outcome:
    score: Score
    output: Any = None
    error: str | None = None
    latency: float = 0.0
    trace: Trace | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """Which rollout to make."""

    candidate: Candidate
    dataset_id: str
    example: Example
    repeat: int


class Runner:
    """Makes rollouts of one program under one metric in this process: the local executor."""

    workers = 1

    def __init__(self, program: Program, metric: Metric, options: EvaluationOptions) -> None:
        self.program = program
        self.metric = metric
        self.options = options
        self._metric_needs_trace = bool(getattr(metric, "needs_trace", True))

    async def run(self, job: Job, keep: KeepTraces) -> tuple[EvaluationRow, Trace | None]:
        """The row of this rollout, and its trace where `keep` asks for it.

        Raises:
            UserError, RunError: see the module's docstring.
        """
        options = self.options
        scope = RolloutScope(options.seed, job.candidate.hash, job.example.id, job.repeat)
        with graph.metered() as meter, graph.rollout(scope), job.candidate.active():
            recording = graph.record(self.program.name)
            outcome = await self._scored(recording, job.example)
        lost = graph.lost_reads(scope)
        if lost:  # also when the thread swallowed the error: its result came from the wrong candidate
            raise lost[0].error
        failed = outcome.error is not None or outcome.score.value < options.perfect_score
        if outcome.trace is None and (keep == "all" or (keep == "failures" and failed)):
            outcome.trace = recording.trace
        kept = outcome.trace if keep == "all" or (keep == "failures" and failed) else None
        return self._row(job, outcome, meter), kept

    def _row(self, job: Job, outcome: _Outcome, meter: Meter) -> EvaluationRow:
        return EvaluationRow(
            candidate_hash=job.candidate.hash,
            dataset_id=job.dataset_id,
            example_id=job.example.id,
            repeat=job.repeat,
            seed=self.options.seed,
            score=outcome.score.value,
            feedback=outcome.score.feedback,
            objectives=outcome.score.objectives,
            output=json_form(outcome.output),
            error=outcome.error,
            usage=meter.usage,
            cost=None if meter.unpriced_calls else meter.cost,
            latency=outcome.latency,
        )

    async def _scored(self, recording: Recording, example: Example) -> _Outcome:
        options, program = self.options, self.program
        started = time.perf_counter()
        outcome = _Outcome(Score(options.min_score))
        with patient(options.timeout) as limit:
            try:
                with recording, capture_session():
                    outcome.output = await program.run(example)
                    recording.set_output(outcome.output)
            except asyncio.CancelledError as error:
                if _being_cancelled():
                    raise
                _failed(outcome, error, recording, options)  # the program cancelled itself
            except (Exception, SystemExit) as error:  # noqa: BLE001 - recorded as the rollout's outcome
                _raise_fatal(error)
                _failed(outcome, error, recording, options)
            outcome.latency = time.perf_counter() - started
            if outcome.error is None:
                await self._measure(outcome, recording, example)
        if limit.cancelled_caught:
            self._timed_out(outcome, recording)
        return outcome

    async def _measure(self, outcome: _Outcome, recording: Recording, example: Example) -> None:
        metric = self.metric
        if self._metric_needs_trace:
            outcome.trace = recording.trace
        try:
            outcome.score = await metric(outcome.output, example.expected, example, outcome.trace)
            if not math.isfinite(outcome.score.value):
                raise UserError(f"metric {metric.name!r} returned {outcome.score.value}; scores are finite numbers.")
        except UserError as error:
            raise MetricError(f"example {example.id}: {error}") from error
        except (Exception, SystemExit) as error:  # noqa: BLE001 - recorded as the rollout's outcome
            _raise_fatal(error)
            place = user_line(error)
            outcome.error = f"metric {metric.name} failed: {_described(error)}{f' at {place}' if place else ''}"
            outcome.score = Score(self.options.min_score, outcome.error)

    def _timed_out(self, outcome: _Outcome, recording: Recording) -> None:
        limit = self.options.timeout
        outcome.latency = limit or 0.0
        outcome.error = f"timed out after {limit:g} s"
        seen = recording.trace.error
        where = f" It was in {seen.op}." if seen is not None and seen.op not in ("", "root") else ""
        text = f"The program did not finish within {limit:g} s.{where}"
        outcome.score = Score(self.options.min_score, text)
        abandoned = self.program.threads.abandoned
        if abandoned > self.options.max_abandoned:
            raise TooManyAbandoned(
                f"{abandoned} rollouts of {self.program.name} hang in threads that Python cannot stop (each had "
                f"{limit:g} s); give the program timeouts of its own, make it async, or raise the timeout."
            )


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _raise_fatal(error: BaseException) -> None:
    """Raise the error that ends the evaluation, when `error` is one or was caused by one."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        if isinstance(current, FATAL):
            raise current
        seen.add(id(current))
        current = current.__cause__


def _failed(outcome: _Outcome, error: BaseException, recording: Recording, options: EvaluationOptions) -> None:
    outcome.error = _described(error)
    record = recording.trace.error
    if record is not None:
        text = record.text
    else:
        place = user_line(error)
        text = f"The program failed: {outcome.error}{f' at {place}' if place else ''}"
    outcome.score = Score(options.min_score, text)


def _described(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"the program called sys.exit({error.code!r})"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def json_form(value: Any) -> Any:
    """`value` as plain JSON data for a row: models and dataclasses as dicts, anything else as its text, cut to size."""
    if isinstance(value, (bool, int, float, type(None))):
        return value
    if isinstance(value, str):
        return value if len(value) <= _MAX_OUTPUT else value[:_MAX_OUTPUT] + "…"
    dump = getattr(value, "model_dump", None)
    if callable(dump):
        value = dump(mode="json")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    try:
        text = json.dumps(value, default=_text)
    except (TypeError, ValueError, RecursionError):
        text = json.dumps(_text(value))
    if len(text) > _MAX_OUTPUT:
        return text[:_MAX_OUTPUT] + "…"
    return json.loads(text)


def _text(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(cast("Mapping[object, object]", value))
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, cast("set[object]", value)))
    try:
        return str(value)
    except Exception as error:  # noqa: BLE001 - a broken __str__ becomes the text itself
        return f"<{type(value).__name__}: its text raises {type(error).__name__}>"
