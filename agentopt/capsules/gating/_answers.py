"""What the program answers when it reads one text or another: scores per example, failures, output tokens, cost.

Without labels the answers given to the original are the reference: its own score is how often its further runs agree
with the first (1 when there is one run), the capsule's how often it agrees with that first run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentopt.capsules.gating._task import OpenTask
from agentopt.errors import RunError, UserError
from agentopt.evaluation import Dataset, EvaluationRow, Evaluator, Example
from agentopt.evaluation._metrics import pick
from agentopt.evaluation._rows import Score

OnProgress = Callable[[str, int, int], None]
"""Called with the stage (`select` or `gate`), the rows that are done and all of them."""
FAILED_SHARE = 0.1
"""Of the rows on which the program may fail with the original before there is no gate."""
FEW = 3
"""Fewer failures than this say nothing of their share, unless every row failed."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What the program did with one text, by example id."""

    scores: dict[str, float]
    failed: frozenset[str]
    output_tokens: int
    usd: float | None


@dataclass
class Answered:
    """A metric that only wants an output."""

    name: str = "answered"
    needs_expected: bool = False
    needs_trace: bool = False

    async def __call__(self, output: Any, expected: Any, example: Example, trace: object) -> Score:
        return Score(1.0)


@dataclass
class Reader:
    """Runs the program with texts, each example once per text."""

    task: OpenTask
    original: str
    evaluator: Evaluator
    on_progress: OnProgress | None = None
    usd: float | None = 0.0
    _answers: dict[str, Any] = field(default_factory=dict[str, Any])
    _read: int = 0
    _failed: int = 0

    async def read(self, text: str, rows: Dataset, stage: str, done: int, total: int) -> Answers:
        """Scores of `text` on `rows`.

        Raises:
            RunError: the program fails with the original.
            UserError: the metric or the models cannot be used.
        """
        candidate, given = self.task.with_prompt(text, rows)
        seen = 0

        def on_row(_: EvaluationRow) -> None:
            nonlocal seen
            seen += 1
            if self.on_progress is not None:
                self.on_progress(stage, done + seen // self.task.options.repeats, total)

        result = await self.evaluator.evaluate(candidate, given, on_row=on_row)
        cost = result.cost
        self.usd = None if self.usd is None or cost is None else self.usd + cost
        failed = frozenset(row.example_id for row in result.rows if row.error is not None)
        if text == self.original:
            self._check(len(rows), len(failed), [row for row in result.rows if row.error is not None])
        scores = dict(result.scores)
        if self.task.kind == "agreement":
            scores = await self._agreement(text, rows, result.rows)
        usage = [row.usage for row in result.rows]
        tokens = sum(item.output_tokens + item.cached_output_tokens for item in usage)
        return Answers(scores, failed, tokens, cost)

    def _check(self, rows: int, failed: int, errors: Sequence[EvaluationRow]) -> None:
        """Stop where too many of the original's rows so far say nothing; a few are no matter."""
        self._read += rows
        self._failed += failed
        if self._failed > FAILED_SHARE * self._read and (self._failed >= FEW or self._failed == self._read):
            raise RunError(
                f"{self.task.program.name} fails with the original prompt on {self._failed} of {self._read} examples, "
                f"so no capsule can be gated; for instance example {errors[0].example_id}: {errors[0].error}."
            )

    async def _agreement(self, text: str, rows: Dataset, found: Sequence[EvaluationRow]) -> dict[str, float]:
        """Share of runs that answer as the original's first run did; of the original its other runs."""
        low, high = self.task.options.score_range
        first = {row.example_id: row for row in found if row.repeat == 0}
        if text == self.original:
            self._answers.update(
                {key: pick(row.output, self.task.options.output_field)[0] for key, row in first.items()}
            )
        grouped: dict[str, list[float]] = {key: [] for key in first}
        for row in found:
            if text == self.original and row.repeat == 0:
                continue  # the reference itself
            same = low if row.error is not None else await self._same(row, rows.get(row.example_id), low, high)
            grouped[row.example_id].append(same)
        return {key: sum(values) / len(values) if values else high for key, values in grouped.items()}

    async def _same(self, row: EvaluationRow, example: Example, low: float, high: float) -> float:
        reference = self._answers.get(row.example_id)
        if pick(row.output, self.task.options.output_field)[0] == reference:
            return high
        try:
            return (await self.task.metric(row.output, reference, example, None)).value
        except UserError:  # the answer to the original is nothing that this metric can be held against
            return low


def together(parts: Sequence[Answers]) -> Answers:
    """The answers of several blocks as one."""
    costs = [part.usd for part in parts]
    return Answers(
        scores={key: score for part in parts for key, score in part.scores.items()},
        failed=frozenset(key for part in parts for key in part.failed),
        output_tokens=sum(part.output_tokens for part in parts),
        usd=None if any(cost is None for cost in costs) else sum(cost or 0.0 for cost in costs),
    )
