"""The arithmetic of the UCB driver's bounds, and the grids of the islands driver."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopt.errors import UserError
from agentopt.graph import Candidate
from agentopt.search._islands import Islands, cell_of
from agentopt.search._islands import _Run as IslandsRun
from agentopt.search._ucb import UCB
from agentopt.search._ucb import _Run as UCBRun


class Scores:
    """A board of which only the scores are known."""

    def __init__(self, known: dict[str, dict[str, float]]) -> None:
        self.known = known

    def scores(self, candidate: Candidate, _split: str) -> dict[str, float]:
        return self.known[candidate.hash]

    def mean(self, candidate: Candidate, split: str, ids: Sequence[str] | None = None) -> float:
        values = [value for key, value in self.scores(candidate, split).items() if ids is None or key in ids]
        return sum(values) / len(values)

    def paired(self, *_: Any) -> list[float]:
        return []

    def rows(self, *_: Any) -> list[Any]:
        return []


def lab_of(table: Sequence[Sequence[float]]) -> tuple[Any, list[Candidate]]:
    arms = [Candidate({"n": str(number)}) for number in range(len(table))]
    known = {
        arm.hash: {f"r{at}": value for at, value in enumerate(values)} for arm, values in zip(arms, table, strict=True)
    }
    order = [f"r{at}" for at in range(max(map(len, table)))]
    options = SimpleNamespace(block_size=5, objectives=("score",))
    return SimpleNamespace(baseline=arms[0], board=Scores(known), options=options, order=order), arms


TABLES = st.lists(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=12), min_size=1, max_size=5)


@given(TABLES, st.sampled_from([0.0, 0.3, 0.5, 2.0]))
def test_the_bound_is_ucb1_scaled_by_the_range_and_clipped_to_the_scores_seen(
    table: list[list[float]], exploration: float
) -> None:
    lab, arms = lab_of(table)
    run = UCBRun(UCB(exploration=exploration), lab, arms[1:])  # the run puts the baseline in itself
    every = [value for values in table for value in values]
    for arm, values in zip(arms, table, strict=True):
        mean = sum(values) / len(values)
        bonus = exploration * math.sqrt(math.log(len(every) + 1) / len(values)) * (max(every) - min(every))
        bound = run._bound(arm)
        assert bound == pytest.approx(min(mean + bonus, max(every)))
        assert mean - 1e-12 <= bound <= max(every)


def test_rows_go_to_the_arm_that_may_still_be_the_best() -> None:
    lab, arms = lab_of([[1, 0, 1, 0] * 5, [0.0] * 8, [1.0, 0.0, 1.0], [1, 1, 0, 0] * 2])
    run = UCBRun(UCB(exploration=0.5), lab, arms[1:])
    ranked = run._ranked(run.arms)
    assert ranked[0] == arms[2], "little is known of it, and that is good"
    assert ranked[-1] == arms[1]
    calm = UCBRun(UCB(exploration=0.0), lab, arms[1:])
    assert calm._ranked(calm.arms)[0] == arms[2]


@pytest.mark.parametrize(
    ("values", "cell"),
    [
        ({"a": ""}, (0, 0)),
        ({"a": "x" * 49}, (0, 0)),
        ({"a": "x" * 50}, (1, 0)),
        ({"a": "x" * 149, "b": "y"}, (2, 0)),
        ({"a": "x" * 50, "d": [{"input": {}, "output": "z" * 500}] * 3}, (1, 3)),
        ({"p": [{"id": "p1", "text": "x" * 48}]}, (1, 0)),
        ({"a": "", "n": 5, "flag": True}, (0, 0)),
    ],
)
def test_cells_by_length_of_the_texts_and_number_of_demonstrations(
    values: dict[str, Any], cell: tuple[int, int]
) -> None:
    assert cell_of(Candidate(values)) == cell


def grids(count: int = 3) -> IslandsRun:
    lab, arms = lab_of([[1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1]])
    run = IslandsRun(Islands(count=count), lab)
    run.half = lab.order[:2]
    run.arms = arms  # type: ignore[attr-defined]
    return run


def test_a_cell_keeps_its_best_and_the_earlier_one_of_equals() -> None:
    run = grids()
    base, good, poor, best = run.arms  # type: ignore[attr-defined]
    grid = run.grids[0]
    assert list(grid.values()) == [base]
    assert not run._settle_in(grid, poor)
    assert run._settle_in(grid, good) and list(grid.values()) == [good]
    assert not run._settle_in(grid, best), "as good on the half that is looked at"
    assert list(run.grids[1].values()) == [base], "islands are apart"


def test_migration_hands_each_best_elite_to_the_next_island() -> None:
    run = grids()
    base, good, poor, _ = run.arms  # type: ignore[attr-defined]
    cell = cell_of(base)
    run.grids = [{cell: good}, {cell: poor}, {cell: base}]
    run._migrate()
    assert [grid[cell] for grid in run.grids] == [good, good, base]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UCB(children=0), "UCB: children must be at least 1; found 0"),
        (lambda: UCB(exploration=-1.0), "UCB: exploration must not be negative; found -1.0"),
        (lambda: UCB(exploration=math.nan), "UCB: exploration must not be negative"),
        (lambda: Islands(count=0), "Islands: count must be at least 1; found 0"),
        (lambda: Islands(best_share=1.5), "Islands: best_share must lie between 0 and 1; found 1.5"),
    ],
)
def test_settings_are_checked(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
