"""The evaluator: a candidate on a dataset, many rollouts at a time, each on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from agentopt.evaluation._data import Dataset
from agentopt.evaluation._metrics import Metric
from agentopt.evaluation._program import Program
from agentopt.evaluation._rows import EvaluationOptions, EvaluationResult, EvaluationRow, KeepTraces
from agentopt.graph import Candidate

if TYPE_CHECKING:
    from agentopt.store import Store


class Evaluator:
    """Runs candidates of one program under one metric."""

    def __init__(
        self,
        program: Program,
        metric: Metric,
        options: EvaluationOptions | None = None,
        *,
        store: Store | None = None,
        run_id: str | None = None,
    ) -> None:
        self.program = program
        self.metric = metric
        self.options = options or EvaluationOptions()
        self.store = store
        self.run_id = run_id

    async def evaluate(
        self,
        candidate: Candidate,
        examples: Dataset,
        *,
        ids: Sequence[str] | None = None,
        keep_traces: KeepTraces | None = None,
        on_row: Callable[[EvaluationRow], None] | None = None,
    ) -> EvaluationResult:
        """Rows for each example and repeat, in example order."""
        raise NotImplementedError
