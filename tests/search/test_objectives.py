"""Several objectives: domination, the front, when a child is better, and the table of trade-offs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopt.errors import UserError
from agentopt.evaluation import Dataset, EvaluationResult, EvaluationRow
from agentopt.graph import Candidate, Usage
from agentopt.search import Budget, TuneOptions
from agentopt.search._board import Board
from agentopt.search._budget import Ledger
from agentopt.search._choose import cheapest, near_ties
from agentopt.search._objectives import better, check_objectives, dominates, front, means, trade_offs
from agentopt.search._pool import Pool
from agentopt.search._result import per_run
from agentopt.search._simulate import splits

POINTS = st.lists(
    st.fixed_dictionaries({"score": st.sampled_from([0.0, 0.5, 1.0]), "tokens": st.integers(-3, 0)}), max_size=8
)


@given(POINTS)
def test_domination_is_a_strict_order(points: list[dict[str, float]]) -> None:
    for one in points:
        assert not dominates(one, one)
        for other in points:
            assert not (dominates(one, other) and dominates(other, one))
            if dominates(one, other):
                assert all(dominates(one, third) for third in points if dominates(other, third))


@given(POINTS)
def test_the_front_is_what_nobody_dominates_and_covers_the_rest(points: list[dict[str, float]]) -> None:
    kept = front(points)
    on = [point for point, stays in zip(points, kept, strict=True) if stays]
    for point, stays in zip(points, kept, strict=True):
        assert stays != any(dominates(other, point) for other in on)
    for name in ("score", "tokens"):
        if points:
            assert max(point[name] for point in on) == max(point[name] for point in points)


def test_names_are_checked_and_the_score_always_counts() -> None:
    assert check_objectives(["tokens", "cost"]) == ("score", "tokens", "cost")
    assert check_objectives(["latency", "score"]) == ("score", "latency")
    with pytest.raises(UserError, match=r"unknown objective 'speed'; expected one of score, cost, tokens, latency"):
        check_objectives(["speed"])
    with pytest.raises(UserError, match="given twice"):
        check_objectives(["cost", "cost"])
    assert TuneOptions(objectives=("cost",)).objectives == ("score", "cost")


def row(**values: Any) -> EvaluationRow:
    return EvaluationRow("c", "d", str(values.pop("at", 0)), 0, 0, values.pop("score", 1.0), **values)


NAMES = ("score", "cost", "tokens", "latency")


def test_a_cached_reply_counts_with_what_it_took_and_its_time_does_not_count() -> None:
    paid = row(usage=Usage(input_tokens=100, output_tokens=10, calls=1), cost=0.2, latency=2.0)
    saved = Usage(cached_calls=1, cached_input_tokens=300, cached_output_tokens=20, cached_cost=0.4)
    cached, mixed = row(usage=saved), row(usage=saved + paid.usage, cost=0.2, latency=1.0)
    assert means([paid, cached, cached, mixed], NAMES) == pytest.approx(
        {"score": 1.0, "cost": -0.4, "tokens": -275.0, "latency": -2.0}
    )
    found = per_run([paid, cached, cached, mixed])
    assert found is not None and found["n"] == 4
    assert found["usd"] == pytest.approx(0.4)
    assert (found["tokens"], found["input_tokens"], found["calls"]) == (295.0, 275.0, 1.25)
    assert found["latency"] == 2.0
    cold = per_run([row(usage=Usage(input_tokens=300, output_tokens=20, calls=1), cost=0.4)] * 3)
    assert per_run([cached] * 3) == cold, "a warm store shows what a cold one shows"
    assert per_run([]) is None


def test_a_cached_reply_without_a_known_price_leaves_the_price_open() -> None:
    known = row(usage=Usage(input_tokens=10, calls=1), cost=0.2)
    unknown = row(usage=Usage(cached_calls=1, cached_input_tokens=30, cached_cost=None))
    assert means([known, unknown], NAMES)["cost"] == -0.2, "not taken for free"
    assert means([known, unknown], NAMES)["tokens"] == -20.0
    found = per_run([known, unknown])
    assert found is not None and found["usd"] is None and found["tokens"] == 20.0


def test_cached_replies_of_which_nothing_is_known_do_not_make_a_candidate_look_cheap() -> None:
    """Rows of a store that was written before cached calls kept what they took."""
    paid = row(usage=Usage(input_tokens=100, calls=1), cost=0.2, latency=2.0)
    cached = row(usage=Usage(input_tokens=0, cached_calls=1), cost=0.0, latency=0.0, score=0.0)
    assert means([paid, cached], NAMES) == {"score": 0.5, "cost": -0.2, "tokens": -100.0, "latency": -2.0}
    assert means([cached], NAMES)["tokens"] == 0.0, "nothing else is known"
    assert means([], NAMES) == dict.fromkeys(NAMES, 0.0)


class Known:
    """Scores and prompt tokens by the candidate's name."""

    def __init__(self, table: Mapping[str, tuple[Sequence[float], int]]) -> None:
        self.table = table

    async def evaluate(
        self, candidate: Candidate, examples: Dataset, *, ids: Sequence[str] | None = None, **_: Any
    ) -> EvaluationResult:
        values, tokens = self.table[str(candidate.get("n"))]
        place = {row_id: at for at, row_id in enumerate(examples.ids)}
        rows = [
            EvaluationRow(
                candidate.hash, examples.id, i, 0, 0, values[place[i] % len(values)], usage=Usage(input_tokens=tokens)
            )
            for i in (examples.ids if ids is None else ids)
        ]
        return EvaluationResult(candidate, examples, tuple(rows))


def board_of(table: Mapping[str, tuple[Sequence[float], int]], rows: int = 40) -> tuple[Board, dict[str, Candidate]]:
    data = splits(train=10, validation=rows, test=10)
    board = Board(Known(table), data, Ledger(Budget()))
    made = {name: Candidate({"n": name}) for name in table}
    asyncio.run(board.run_many(list(made.values()), "validation", data["validation"].ids))
    return board, made


TABLE: dict[str, tuple[Sequence[float], int]] = {
    "base": ((1, 0, 1, 0), 100),
    "cheap": ((1, 0, 1, 0), 60),
    "dear": ((1, 0, 1, 0), 130),
    "good": ((1, 0, 1, 1), 300),
    "poor": ((0, 0, 1, 0), 10),
}


def test_better_needs_the_score_or_with_more_objectives_a_saving_that_costs_no_score() -> None:
    board, of = board_of(TABLE)
    base, one, both = of["base"], ("score",), ("score", "tokens")
    assert [better(board, of[name], base, one) for name in TABLE] == [False, False, False, True, False]
    assert [better(board, of[name], base, both) for name in TABLE] == [False, True, False, True, False]
    few = board.splits["validation"].ids[1:2]
    assert better(board, of["poor"], base, both, validation=few), "on this row it is as good, and cheaper"


def test_the_table_has_every_complete_candidate_best_score_first() -> None:
    board, of = board_of(TABLE)
    unfinished = Candidate({"n": "base", "more": "x"})
    found = trade_offs(board, [*of.values(), unfinished], ("score", "tokens"))
    assert [str(item.candidate.get("n")) for item in found] == ["good", "base", "cheap", "dear", "poor"]
    assert [item.on_front for item in found] == [True, False, True, False, True]
    assert [item.prompt_tokens for item in found] == [300, 100, 60, 130, 10]
    assert found[0].to_dict()["score"] == 0.75


def test_the_pick_is_the_cheapest_of_those_that_the_score_does_not_tell_apart() -> None:
    board, of = board_of(TABLE)
    pool = Pool(2)
    for name in ("base", "dear", "cheap"):
        pool.add(of[name], board.mean(of[name], "validation"))
    ties = near_ties(board, pool, of["base"], [of["base"], of["dear"], of["cheap"], of["poor"]])
    assert ties == [of["base"], of["dear"], of["cheap"]], "the poor one is clearly behind"
    assert cheapest(board, ties, ("score", "tokens")) == of["cheap"]
    assert near_ties(board, pool, of["base"]) == [of["base"], of["dear"]], "the score alone: the pool's top"
