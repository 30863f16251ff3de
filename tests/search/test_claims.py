"""What is claimed when the truth is known, through the real screen, gate, pick and claim."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from agentopt.evaluation import binomial_lower_bound
from agentopt.graph import Candidate
from agentopt.search import Budget, TuneOptions
from agentopt.search._claim import Claim, baseline_claim, make_claim, no_claim
from agentopt.search._events import TestDone
from agentopt.search._simulate import PARAMETER, simulate, splits, uniform


def test_random_labels_false_claim_rate_f6() -> None:
    """500 runs in which no candidate is better than any other: `improved` must stay within its 5 %."""
    runs = 500
    claims: Counter[str] = Counter()

    async def all_runs() -> None:
        for seed in range(runs):
            outcome = await simulate(
                lambda _candidate: 0.5,
                seed=seed,
                data=splits(train=24, validation=24, test=60, seed=seed),
                budget=Budget(rollouts=500),
                options=TuneOptions(screen_size=8, block_size=8),
            )
            claims[outcome.claim.status] += 1

    asyncio.run(all_runs())
    assert sum(claims.values()) == runs
    assert claims["not_improved"] > runs / 2, "most runs must get past the gate, else nothing is tested"
    assert binomial_lower_bound(claims["improved"], runs, confidence=0.99) <= 0.05


def test_a_large_true_gain_is_found_and_claimed() -> None:
    def accuracy(candidate: Candidate) -> float:
        text = str(candidate.get(PARAMETER))
        return 0.3 if text == "start" else 0.5 + 0.4 * uniform(text)

    outcome = asyncio.run(simulate(accuracy, seed=3))
    assert outcome.claim.status == "improved"
    assert accuracy(outcome.best) > 0.7
    assert outcome.claim.interval is not None and outcome.claim.interval[0] > 0


def test_nothing_better_keeps_the_baseline_and_says_so() -> None:
    def accuracy(candidate: Candidate) -> float:
        return 0.9 if str(candidate.get(PARAMETER)) == "start" else 0.05

    outcome = asyncio.run(simulate(accuracy, seed=1))
    assert outcome.best == outcome.baseline
    assert outcome.claim.status == "kept_baseline"
    assert "baseline is kept" in outcome.claim.text
    assert outcome.claim.baseline_mean is not None


def test_the_test_set_is_used_once_after_everything_else_and_for_two_candidates_only() -> None:
    from agentopt.search import _simulate

    sources: list[_simulate.SyntheticRows] = []
    original = _simulate.SyntheticRows.__init__

    def spy(self: _simulate.SyntheticRows, *args: object, **kw: object) -> None:
        original(self, *args, **kw)  # type: ignore[arg-type]
        sources.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_simulate.SyntheticRows, "__init__", spy)
        events: list[object] = []
        outcome = asyncio.run(simulate(lambda c: 0.4 + 0.4 * uniform(c.hash), seed=5, on_event=events.append))
    asked = sources[0].asked
    first = next(i for i, (_, name, _) in enumerate(asked) if name == "test")
    assert {name for _, name, _ in asked[first:]} == {"test"}
    assert {who for who, name, _ in asked if name == "test"} == {outcome.best.hash, outcome.baseline.hash}
    assert len(asked[first:]) == len({(who, row) for who, _, row in asked[first:]}) == 600
    assert sum(isinstance(event, TestDone) for event in events) == 1


def test_improved_needs_p_below_five_percent_and_an_interval_above_zero() -> None:
    base = [0.0] * 60 + [1.0] * 40
    better = [1.0] * 20 + [0.0] * 40 + [1.0] * 40
    assert make_claim(base, better).status == "improved"
    assert make_claim(better, base).status == "worse"
    assert make_claim(base, [1.0] * 3 + base[3:]).status == "not_improved"  # p = .25


def test_no_claim_below_thirty_rows_however_clear_the_numbers() -> None:
    claim = make_claim([0.0] * 29, [1.0] * 29)
    assert claim.status == "no_claim"
    assert "29 test rows are too few" in claim.text
    assert make_claim([0.0] * 30, [1.0] * 30).status == "improved"


def test_claims_survive_json() -> None:
    for claim in (make_claim([0.0] * 40, [1.0] * 40), baseline_claim([1.0, 0.0]), no_claim("why")):
        assert Claim.from_dict(claim.to_dict()) == claim
