"""All scores of a run in one place: what is known is never computed or counted twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import anyio

from agentopt.evaluation import Dataset, EvaluationResult, EvaluationRow, KeepTraces
from agentopt.graph import Candidate, metered
from agentopt.models import BudgetExhausted, Request, spend_guard
from agentopt.search._budget import Ledger, OutOfBudget, usage_tokens

Split = Literal["train", "validation", "test"]


class RowSource(Protocol):
    """The part of the evaluator that the search uses; tests put synthetic rows behind it."""

    async def evaluate(
        self,
        candidate: Candidate,
        examples: Dataset,
        *,
        ids: Sequence[str] | None = None,
        keep_traces: KeepTraces | None = None,
        on_row: Callable[[EvaluationRow], None] | None = None,
    ) -> EvaluationResult:
        """Rows for each id and repeat, in example order."""
        ...


@contextmanager
def guarded(ledger: Ledger) -> Any:
    """Ask before each paid call inside the block whether the budget still covers it; yields the block's meter."""
    with metered() as meter:

        def check(_request: Request) -> None:
            reason = ledger.over(meter.cost or 0.0, usage_tokens(meter.usage))
            if reason is not None:
                raise BudgetExhausted(reason)

        token = spend_guard.set(check)
        try:
            yield meter
        finally:
            spend_guard.reset(token)


class Board:
    """Runs candidates on rows within the budget and remembers the scores.

    Scores are means over repeats, by candidate hash, split and example id.
    """

    def __init__(
        self,
        source: RowSource,
        splits: Mapping[Split, Dataset],
        ledger: Ledger,
        *,
        repeats: int = 1,
        on_candidate: Callable[[Candidate], None] | None = None,
    ) -> None:
        self.splits = splits
        self.ledger = ledger
        self._source = source
        self._repeats = repeats
        self._on_candidate = on_candidate
        self._scores: dict[tuple[str, Split], dict[str, float]] = {}
        self._rows: dict[tuple[str, Split], dict[tuple[str, int], EvaluationRow]] = {}
        self._sources: dict[str, frozenset[str]] = {}

    # --- running ---

    def missing(self, candidate: Candidate, split: Split, ids: Iterable[str]) -> list[str]:
        """The ids that this candidate has no score for."""
        known = self.scores(candidate, split)
        return [row_id for row_id in ids if row_id not in known]

    async def run(
        self, candidate: Candidate, split: Split, ids: Sequence[str], *, traces: KeepTraces = "never"
    ) -> EvaluationResult | None:
        """Make sure that all `ids` have scores; with traces, also return the result over exactly these ids.

        Raises:
            OutOfBudget: the rows do not fit any more; rows that were finished before that are counted.
        """
        missing = self.missing(candidate, split, ids)
        if missing:
            self._afford(len(missing))
        elif traces == "never":
            return None
        return await self._evaluate(candidate, split, list(ids) if traces != "never" else missing, traces)

    async def run_many(self, candidates: Sequence[Candidate], split: Split, ids: Sequence[str]) -> None:
        """`run` for several candidates on the same ids, all at the same time.

        Raises:
            OutOfBudget: not all of it fits; then nothing is started.
        """
        work = [(candidate, missing) for candidate in candidates if (missing := self.missing(candidate, split, ids))]
        if not work:
            return
        self._afford(sum(len(missing) for _, missing in work))
        failed: dict[int, Exception] = {}
        done: dict[int, EvaluationResult] = {}
        partial: dict[int, list[EvaluationRow]] = {index: [] for index in range(len(work))}

        async def one(index: int, candidate: Candidate, missing: list[str]) -> None:
            try:
                done[index] = await self._source.evaluate(
                    candidate, self.splits[split], ids=missing, keep_traces="never", on_row=partial[index].append
                )
            except Exception as error:  # noqa: BLE001  (kept, and raised below in a fixed order)
                failed[index] = error
                group.cancel_scope.cancel()

        # One guard around all: it must see the spend of every candidate. The evaluator bounds how many rollouts run.
        with guarded(self.ledger):
            async with anyio.create_task_group() as group:
                for index, (candidate, missing) in enumerate(work):
                    self._announce(candidate)
                    group.start_soon(one, index, candidate, missing)
        for index in range(len(work)):
            if index in done:
                self._keep(work[index][0], split, done[index].rows)
            else:
                self.ledger.charge_rows(partial[index])
        if failed:
            error = failed[min(failed)]
            if isinstance(error, BudgetExhausted):
                raise OutOfBudget(str(error)) from error
            raise error

    def _announce(self, candidate: Candidate) -> None:
        if self._on_candidate is not None:
            self._on_candidate(candidate)

    def _afford(self, rows: int) -> None:
        reason = self.ledger.exhausted(rows * self._repeats)
        if reason is not None:
            raise OutOfBudget(reason)

    async def _evaluate(
        self, candidate: Candidate, split: Split, ids: list[str], traces: KeepTraces
    ) -> EvaluationResult:
        finished: list[EvaluationRow] = []
        self._announce(candidate)
        try:
            with guarded(self.ledger) as meter:
                result = await self._source.evaluate(
                    candidate, self.splits[split], ids=ids, keep_traces=traces, on_row=finished.append
                )
        except BudgetExhausted as error:
            self.ledger.charge_rows(finished)
            raise OutOfBudget(str(error)) from error
        before = self.ledger.usd, self.ledger.tokens
        self._keep(candidate, split, result.rows)
        # A known row that is run again for its trace keeps its score and its price; what the second run took is extra.
        self.ledger.charge_extra(
            (meter.cost or 0.0) - (self.ledger.usd - before[0]),
            usage_tokens(meter.usage) - (self.ledger.tokens - before[1]),
        )
        return result

    def _keep(self, candidate: Candidate, split: Split, rows: Sequence[EvaluationRow]) -> None:
        self.ledger.charge_rows(rows)
        kept = self._rows.setdefault((candidate.hash, split), {})
        grouped: dict[str, list[float]] = {}
        for row in rows:
            kept[row.example_id, row.repeat] = row
            grouped.setdefault(row.example_id, []).append(row.score if math.isfinite(row.score) else 0.0)
        known = self._scores.setdefault((candidate.hash, split), {})
        for row_id, values in grouped.items():
            known[row_id] = sum(values) / len(values)

    # --- reading ---

    def scores(self, candidate: Candidate, split: Split) -> Mapping[str, float]:
        """Example id → score, for what is known."""
        return self._scores.get((candidate.hash, split), {})

    def unmeasured(self, candidate_hash: str, split: Split, ids: Iterable[str]) -> bool:
        """Whether a candidate, given by its hash, has no score on some of these rows."""
        known = self._scores.get((candidate_hash, split), {})
        return any(row_id not in known for row_id in ids)

    def rows(self, candidate: Candidate, split: Split) -> list[EvaluationRow]:
        """The rows behind the scores."""
        return list(self._rows.get((candidate.hash, split), {}).values())

    def mean(self, candidate: Candidate, split: Split, ids: Sequence[str] | None = None) -> float:
        """Mean score over `ids` (or over all that is known); 0.0 for none."""
        known = self.scores(candidate, split)
        values = list(known.values()) if ids is None else [known[row_id] for row_id in ids if row_id in known]
        return sum(values) / len(values) if values else 0.0

    def complete(self, candidate: Candidate, split: Split) -> bool:
        """Whether every row of the split has a score."""
        return len(self.scores(candidate, split)) == len(self.splits[split])

    def shown(self, candidate: Candidate) -> frozenset[str]:
        """Ids of the training examples that the candidate shows as demonstrations: it has seen their answers."""
        found = self._sources.get(candidate.hash)
        if found is None:
            found = frozenset(_demo_sources(candidate))
            self._sources[candidate.hash] = found
        return found

    def paired(self, a: Candidate, b: Candidate, split: Split, ids: Iterable[str] | None = None) -> list[float]:
        """Differences `b - a` on rows both have, leaving out rows that either shows as a demonstration."""
        left, right = self.scores(a, split), self.scores(b, split)
        hidden = self.shown(a) | self.shown(b)
        wanted = left if ids is None else ids
        return [right[i] - left[i] for i in wanted if i in left and i in right and i not in hidden]

    def standing(self, candidates: Sequence[Candidate], split: Split, ids: Sequence[str]) -> dict[str, float]:
        """Each candidate's mean after subtracting every row's mean over the field.

        Fair although candidates miss different rows (those they show as demonstrations): an easy row counts little.
        """
        values: dict[str, dict[str, float]] = {}
        for candidate in candidates:
            known, hidden = self.scores(candidate, split), self.shown(candidate)
            values[candidate.hash] = {i: known[i] for i in ids if i in known and i not in hidden}
        level: dict[str, float] = {}
        for row_id in ids:
            column = [scores[row_id] for scores in values.values() if row_id in scores]
            level[row_id] = sum(column) / len(column) if column else 0.0
        return {
            key: (sum(score - level[i] for i, score in scores.items()) / len(scores) if scores else 0.0)
            for key, scores in values.items()
        }


def _demo_sources(candidate: Candidate) -> Iterable[str]:
    for value in candidate.values.values():
        if isinstance(value, list):
            for item in value:
                if isinstance(item, Mapping) and item.get("source"):
                    yield str(item["source"])
