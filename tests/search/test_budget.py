"""Budgets: parsing, planning before, enforcement during."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from agentopt.errors import UserError
from agentopt.evaluation import Dataset, EvaluationResult, EvaluationRow, KeepTraces
from agentopt.graph import Candidate, Usage, meter_add
from agentopt.models import LMOptions, Request, spend_guard
from agentopt.search import Budget, Greedy, TuneOptions
from agentopt.search._budget import Ledger
from agentopt.search._events import Spend
from agentopt.search._loop import Search, Setup
from agentopt.search._plan import Sizes, check_before, default_budget
from agentopt.search._simulate import PARAMETER, SyntheticRows, TextPool, simulate, spec, splits, uniform

REQUEST = Request("double", ({"role": "user", "content": "x"},), options=LMOptions())


def test_budget_is_read_from_text() -> None:
    assert Budget.parse("rollouts=1_200, usd=2.5") == Budget(rollouts=1200, usd=2.5)
    assert Budget.parse("") == Budget()
    assert Budget.from_dict(Budget(tokens=5, minutes=1.5).to_dict()) == Budget(tokens=5, minutes=1.5)
    assert str(Budget(rollouts=3)) == "rollouts=3"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("dollars=3", "dollars"),
        ("usd", "usd"),
        ("usd=many", "many"),
        ("usd=-1", "positive"),
        ("rollouts=1.5", "whole"),
        ("usd=1,usd=2", "twice"),
        ("usd=nan", "positive"),
        ("rollouts=0", "positive"),
    ],
)
def test_bad_budgets_are_one_clear_sentence(text: str, word: str) -> None:
    with pytest.raises(UserError, match=word) as caught:
        Budget.parse(text)
    assert "\n" not in str(caught.value)


def test_a_budget_too_small_for_one_proposal_is_refused_before_anything_runs() -> None:
    sizes = Sizes(train=100, validation=100, test=300, screen=16)
    check_before(sizes, Budget(rollouts=100 + 132 + 600))
    with pytest.raises(UserError, match="rollouts=832 or more"):
        check_before(sizes, Budget(rollouts=831))
    check_before(sizes, default_budget(sizes))


@pytest.mark.parametrize("rollouts", [250, 333, 500, 901])
def test_rollouts_are_never_exceeded(rollouts: int) -> None:
    data = splits(train=30, validation=40, test=50)
    events: list[object] = []
    outcome = asyncio.run(
        simulate(
            lambda c: 0.4 + 0.4 * uniform(c.hash), data=data, budget=Budget(rollouts=rollouts), on_event=events.append
        )
    )
    spent = [event.totals["rollouts"] for event in events if isinstance(event, Spend)]
    assert spent and max(spent) + 100 <= rollouts, "the final test's share is kept back"
    assert outcome.claim.n == 50, "the reserve is enough for the whole test set"
    assert outcome.plan.proposals and f"about {outcome.plan.proposals} proposals" in outcome.plan.text


def test_proposals_are_never_exceeded() -> None:
    made: list[Spend] = []
    outcome = asyncio.run(
        simulate(
            lambda _c: 0.5,
            budget=Budget(proposals=7),
            options=TuneOptions(max_round=3),
            on_event=lambda e: made.append(e) if isinstance(e, Spend) else None,
        )
    )
    assert outcome.stop_reason == "budget: proposals used up"
    assert made[-1].totals["proposals"] == 7


class PaidRows(SyntheticRows):
    """Every rollout makes one paid call through the spend guard, as `models.LM` does."""

    def __init__(self, accuracy: Callable[[Candidate], float], price: float, tokens: int = 100) -> None:
        super().__init__(accuracy)
        self.price = price
        self.tokens = tokens
        self.paid = 0.0
        self.calls = 0

    async def evaluate(
        self,
        candidate: Candidate,
        examples: Dataset,
        *,
        ids: Sequence[str] | None = None,
        keep_traces: KeepTraces | None = None,
        on_row: Callable[[EvaluationRow], None] | None = None,
    ) -> EvaluationResult:
        rows: list[EvaluationRow] = []
        for row_id in examples.ids if ids is None else ids:
            guard = spend_guard.get()
            assert guard is not None, "paid work is never done without a guard"
            guard(REQUEST)
            usage = Usage(input_tokens=self.tokens, calls=1, tries=1)
            meter_add(usage, self.price)
            self.paid += self.price
            self.calls += 1
            row = EvaluationRow(
                candidate.hash, examples.id, row_id, 0, 0, self.score(candidate, row_id), usage=usage, cost=self.price
            )
            rows.append(row)
            if on_row is not None:
                on_row(row)
        return EvaluationResult(candidate, examples, tuple(rows))


def paid_search(source: PaidRows, budget: Budget) -> Search:
    return Search(
        Setup(
            run_id="paid",
            program_name="paid",
            specs={PARAMETER: spec()},
            source=source,
            optimizer=TextPool(),
            driver=Greedy(),
            splits=splits(train=30, validation=40, test=50),
            budget=budget,
            emit=lambda _event: None,
        )
    )


@pytest.mark.parametrize("usd", [2.6, 4.0, 7.77])
def test_usd_is_never_exceeded_by_more_than_the_call_in_flight(usd: float) -> None:
    source = PaidRows(lambda c: 0.4 + 0.4 * uniform(c.hash), price=0.01)
    search = paid_search(source, Budget(usd=usd))
    outcome = asyncio.run(search.run())
    assert source.paid <= usd + 0.01 + 1e-9
    assert search.ledger.usd == pytest.approx(source.paid)
    assert outcome.claim.n == 50


def test_tokens_are_never_exceeded_by_more_than_the_call_in_flight() -> None:
    source = PaidRows(lambda c: 0.4 + 0.4 * uniform(c.hash), price=0.0)
    search = paid_search(source, Budget(tokens=30_000))
    asyncio.run(search.run())
    assert source.calls * 100 <= 30_000 + 100


def test_price_that_rises_in_the_search_is_stopped_inside_the_block() -> None:
    """The plan cannot know that later candidates cost more: then the guard stops the block."""
    source = PaidRows(lambda c: 0.4 + 0.4 * uniform(c.hash), price=0.01)
    search = paid_search(source, Budget(usd=4.0))

    def dearer(event: object) -> None:
        if type(event).__name__ == "BaselineDone":
            source.price = 0.2

    object.__setattr__(search._setup, "emit", dearer)
    asyncio.run(search.run())
    assert source.paid <= 4.0 + 0.2 + 1e-9


def test_usd_budget_without_any_usage_is_bad_input() -> None:
    with pytest.raises(UserError, match="no language-model usage"):
        asyncio.run(simulate(lambda _c: 0.5, budget=Budget(usd=1.0)))


def test_usd_budget_without_a_known_price_is_bad_input() -> None:
    class Unpriced(PaidRows):
        async def evaluate(self, candidate: Candidate, examples: Dataset, **kw: object) -> EvaluationResult:
            from dataclasses import replace

            result = await super().evaluate(candidate, examples, **kw)  # type: ignore[arg-type]
            return replace(result, rows=tuple(replace(row, cost=None) for row in result.rows))

    with pytest.raises(UserError, match="no price is known"):
        asyncio.run(paid_search(Unpriced(lambda _c: 0.5, price=0.0), Budget(usd=1.0)).run())


def test_usd_budget_that_does_not_reach_through_the_baseline_is_bad_input() -> None:
    source = PaidRows(lambda _c: 0.5, price=0.01)
    with pytest.raises(UserError, match="before the baseline was through"):
        asyncio.run(paid_search(source, Budget(usd=0.2)).run())
    assert source.paid <= 0.21


def test_rows_seen_twice_count_once_and_replayed_rows_count() -> None:
    ledger = Ledger(Budget(rollouts=10))
    rows = [EvaluationRow("c", "d", str(i), 0, 0, 1.0, cost=0.5, cached=i % 2 == 0) for i in range(4)]
    ledger.charge_rows(rows)
    ledger.charge_rows(rows)
    assert ledger.rollouts == 4 and ledger.usd == 2.0 and ledger.left() == 6


def test_cached_calls_are_counted_and_not_charged() -> None:
    ledger = Ledger(Budget(tokens=100, usd=1.0))
    saved = Usage(cached_calls=2, cached_input_tokens=900, cached_output_tokens=90, cached_cost=5.0)
    ledger.charge_rows([EvaluationRow("c", "d", "0", 0, 0, 1.0, usage=saved)])
    assert (ledger.usd, ledger.tokens, ledger.calls, ledger.rollout_usd) == (0.0, 0, 2, 0.0)
    ledger.charge_optimizer(0.25, 40, 3)
    assert (ledger.usd, ledger.tokens, ledger.calls, ledger.optimizer_calls) == (0.25, 40, 5, 3)
    assert ledger.to_dict()["optimizer_calls"] == 3


def test_minutes_stop_the_run_at_a_block_boundary() -> None:
    now = [0.0]
    ledger = Ledger(Budget(minutes=1), clock=lambda: now[0])
    assert ledger.exhausted() is None
    now[0] = 61.0
    assert ledger.exhausted() == "budget: minutes used up"
