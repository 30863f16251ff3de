"""Pool, screen, race and sampling: the small decisions."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopt.evaluation import Dataset, EvaluationRow, Example
from agentopt.graph import Candidate, SetDemos, SetText
from agentopt.optimizers import Update
from agentopt.search._board import Board, Split
from agentopt.search._budget import Budget, Ledger
from agentopt.search._choose import best_pooled, near_ties
from agentopt.search._gate import Gate
from agentopt.search._pool import Pool
from agentopt.search._propose import Proposal, update_from_dict, update_to_dict
from agentopt.search._racing import behind, gate_cost, keep_best, quota
from agentopt.search._sampling import Minibatches, balanced_order, draw
from agentopt.search._screen import screen
from agentopt.search._simulate import PARAMETER, SyntheticRows, rows, splits


def candidate(text: str, **more: object) -> Candidate:
    return Candidate({PARAMETER: text, **more})  # type: ignore[dict-item]


def test_pool_is_a_true_top_k_d11() -> None:
    pool = Pool(3)
    for score in (1, 5, 2, 9, 7, 8, 3):
        pool.add(candidate(str(score)), float(score))
    assert [entry.score for entry in pool] == [9.0, 8.0, 7.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(1, 8))
def test_pool_keeps_exactly_the_best_d11(scores: list[float], size: int) -> None:
    pool = Pool(size)
    for i, score in enumerate(scores):
        pool.add(candidate(str(i)), score)
    assert [entry.score for entry in pool] == sorted(scores, reverse=True)[:size]
    assert pool.best.score == max(scores)


def test_pool_prefers_the_earlier_on_a_tie_and_ignores_repeats() -> None:
    pool = Pool(2)
    pool.add(candidate("a"), 0.5)
    pool.add(candidate("b"), 0.5)
    assert not pool.add(candidate("b"), 0.9)
    assert pool.best.candidate == candidate("a")


def test_behind_needs_evidence_at_the_level() -> None:
    assert behind([-1.0] * 3, 0.2)  # p = .125
    assert not behind([-1.0] * 2, 0.2)  # p = .25
    assert not behind([0.0] * 50, 0.2)
    assert not behind([], 0.2)


@given(st.integers(1, 60), st.integers(0, 9), st.integers(0, 4000))
def test_quota_never_lets_more_go_on_and_never_drops_everybody(alive: int, blocks: int, allotment: int) -> None:
    keep = quota(alive, blocks * 10, 100, 10, float(allotment))
    assert 1 <= keep <= alive
    if alive * (100 - blocks * 10) <= allotment:
        assert keep == alive


def test_keep_best_breaks_ties_by_proposal_order() -> None:
    assert keep_best({"a": 0.1, "b": 0.3, "c": 0.1}, ["a", "b", "c"], 2) == ["b", "a"]
    assert 30 < gate_cost(100) < 60


def board(accuracy: dict[str, float], data: dict[Split, Dataset] | None = None, rollouts: int = 10_000) -> Board:
    source = SyntheticRows(lambda c: accuracy[str(c.get(PARAMETER))])
    return Board(source, data or splits(), Ledger(Budget(rollouts=rollouts)))


def test_gate_compares_on_the_same_prefix_and_accepts_only_complete_rows() -> None:
    accuracy = {"base": 0.5, "good": 0.85, "bad": 0.2}
    b = board(accuracy)
    base, good, bad = (candidate(name) for name in accuracy)
    order = balanced_order(b.splits["validation"], draw(0, "validation"))
    looks: list[tuple[int, int]] = []

    async def run() -> None:
        await b.run(base, "validation", order)
        gate = Gate(b, order, 10, 0.2, 10_000)
        result = await gate.race(base, [bad, good], lambda rows_, live, _leader: looks.append((rows_, len(live))))
        assert result.finished == [good]
        assert list(result.dropped) == [bad.hash]
        done = result.dropped[bad.hash][0]
        assert list(b.scores(bad, "validation")) == order[:done], "rows are a prefix of the fixed order"
        assert done < 100 and b.complete(good, "validation")

    asyncio.run(run())
    assert [rows_ for rows_, _ in looks] == list(range(10, 101, 10))


def test_gate_with_a_small_allotment_still_lets_one_finish() -> None:
    names = {"base": 0.1, **{f"c{i}": 0.7 for i in range(6)}}
    b = board(names)
    base, *others = (candidate(name) for name in names)
    order = b.splits["validation"].ids

    async def run() -> None:
        await b.run(base, "validation", order)
        spent = b.ledger.rollouts
        result = await Gate(b, order, 10, 0.2, 160).race(base, others, lambda *_: None)
        assert len(result.finished) == 1
        assert b.ledger.rollouts - spent <= 160

    asyncio.run(run())


def test_screen_needs_a_gain_over_the_parent_on_the_same_rows() -> None:
    accuracy = {"parent": 0.5, "better": 0.95, "same": 0.02}
    b = board(accuracy)
    parent = candidate("parent")
    batch = b.splits["train"].ids[:16]
    proposals = [Proposal(candidate(n), parent, Update((SetText(PARAMETER, n),))) for n in ("same", "better")]

    async def run() -> None:
        await b.run(parent, "train", batch)
        result = await screen(b, proposals, batch)
        assert [p.candidate for p in result.passed] == [candidate("better")]
        assert "no gain over its parent" in result.reasons[candidate("same").hash]
        assert set(b.scores(parent, "train")) == set(b.scores(candidate("better"), "train")) == set(batch)

    asyncio.run(run())


def test_a_large_pool_is_thinned_on_half_of_the_minibatch() -> None:
    names = {"parent": 0.3, **{f"n{i:02}": 0.3 + 0.02 * i for i in range(30)}}
    b = board(names)
    parent = candidate("parent")
    batch = b.splits["train"].ids[:16]
    proposals = [Proposal(candidate(n), parent, Update((SetText(PARAMETER, n),))) for n in names if n != "parent"]

    async def run() -> None:
        await b.run(parent, "train", batch)
        await screen(b, proposals, batch)

    asyncio.run(run())
    assert b.ledger.rollouts == 16 + 30 * 8 + 12 * 8


def test_rows_shown_as_demonstrations_are_left_out_of_comparisons() -> None:
    b = board({"parent": 0.5, "child": 0.5})
    batch = b.splits["train"].ids[:4]
    shown = [{"input": "i", "output": "o", "source": batch[0]}]
    parent, child = candidate("parent"), candidate("child", demos=shown)

    async def run() -> None:
        await b.run_many([parent, child], "train", batch)

    asyncio.run(run())
    assert b.shown(child) == {batch[0]}
    assert len(b.paired(parent, child, "train")) == 3


def test_final_pick_uses_training_rows_only_among_near_ties_on_validation() -> None:
    data = splits(train=40, validation=40)
    b = board({}, data)
    names = ("leader", "tied", "behind")

    def put(name: str, split: Split, score: list[float]) -> None:
        ids = data[split].ids
        made = [EvaluationRow(candidate(name).hash, "d", i, 0, 0, s) for i, s in zip(ids, score, strict=True)]
        b._keep(candidate(name), split, made)

    put("leader", "validation", [1.0] * 30 + [0.0] * 10)
    put("tied", "validation", [1.0] * 29 + [0.0] * 11)
    put("behind", "validation", [1.0] * 15 + [0.0] * 25)
    put("leader", "train", [1.0] * 20 + [0.0] * 20)
    put("tied", "train", [1.0] * 30 + [0.0] * 10)
    put("behind", "train", [1.0] * 40)
    pool = Pool(5)
    for name in names:
        pool.add(candidate(name), b.mean(candidate(name), "validation"))
    ties = near_ties(b, pool, candidate("baseline"))
    assert ties == [candidate("leader"), candidate("tied")]
    assert best_pooled(b, ties) == candidate("tied")


def test_minibatches_use_every_row_once_before_any_twice_and_are_reproducible() -> None:
    data = rows("train", 40)
    batches = Minibatches(data, 16, seed=3)
    seen = [row_id for i in range(5) for row_id in batches.batch(i)]
    assert len(set(seen[:40])) == 40
    assert Minibatches(data, 16, seed=3).batch(4) == batches.batch(4)
    assert Minibatches(data, 16, seed=4).batch(0) != batches.batch(0)
    assert batches.batch(0, first=["known"])[0] == "known"


def test_every_prefix_is_balanced_over_labels() -> None:
    data = Dataset("d", [Example(inputs={"i": i}, expected="a" if i < 30 else "b") for i in range(60)])
    order = balanced_order(data, draw(1))
    for size in (8, 16, 30):
        share = sum(data.get(i).expected == "a" for i in order[:size]) / size
        assert 0.3 < share < 0.7
    assert sorted(order) == sorted(data.ids)


@pytest.mark.parametrize("size", [3, 100])
def test_a_minibatch_is_never_larger_than_the_training_set(size: int) -> None:
    assert len(Minibatches(rows("t", 10), size, 0).batch(7)) == min(size, 10)


def test_updates_survive_json() -> None:
    update = Update((SetText("p", "x"), SetDemos("d", [{"input": "i", "output": "o", "source": ""}])), "why", "who")
    assert update_to_dict(update_from_dict(update_to_dict(update))) == update_to_dict(update)
