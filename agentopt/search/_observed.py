"""Rows as they finish, for whoever watches: transient events that are shown and never stored.

Decisions are made at block boundaries only, so these events have no influence on a run and no place in its replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from agentopt.evaluation import Dataset, EvaluationResult, EvaluationRow, KeepTraces
from agentopt.graph import Candidate
from agentopt.search._board import RowSource
from agentopt.search._events import Event


@dataclass(frozen=True, slots=True)
class RowDone(Event):
    """One rollout has its score. `cached`: it was in the store already and cost nothing now."""

    kind: ClassVar[str] = "row_done"
    candidate: str
    dataset: str
    example: str
    score: float
    cost: float | None
    failed: bool
    cached: bool


class Observed:
    """A row source that tells about every row."""

    def __init__(self, source: RowSource, tell: Callable[[Event], None]) -> None:
        self._source = source
        self._tell = tell

    async def evaluate(
        self,
        candidate: Candidate,
        examples: Dataset,
        *,
        ids: Sequence[str] | None = None,
        keep_traces: KeepTraces | None = None,
        on_row: Callable[[EvaluationRow], None] | None = None,
    ) -> EvaluationResult:
        """As the source's, with one `RowDone` per row."""

        def told(row: EvaluationRow) -> None:
            if on_row is not None:
                on_row(row)
            failed = row.error is not None
            self._tell(
                RowDone(candidate.hash, examples.name, row.example_id, row.score, row.cost, failed, cached=row.cached)
            )

        return await self._source.evaluate(candidate, examples, ids=ids, keep_traces=keep_traces, on_row=told)
