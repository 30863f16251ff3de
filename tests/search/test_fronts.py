"""Per-example fronts, pruning, draws and minibatches against an oracle written from the text of the method."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopt.search._fronts import EpochBatches, dominators, fronts, pick_parent, undominated

TABLES = st.integers(1, 7).flatmap(
    lambda rows: st.lists(
        st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=rows, max_size=rows), min_size=1, max_size=7
    )
)
"""Scores by candidate and row."""


# --- the oracle: one candidate number at a time, plain lists, no sets ---


def oracle_fronts(table: list[list[float]]) -> list[list[int]]:
    columns = range(len(table[0]))
    tops = [max(scores[column] for scores in table) for column in columns]
    return [[number for number, scores in enumerate(table) if scores[column] == tops[column]] for column in columns]


def oracle_pruned(front: list[list[int]], means: list[float]) -> list[list[int]]:
    """Drop one if every front with it also has another kept one; lowest mean first, until nobody is dropped."""
    seen: list[int] = []
    for members in front:
        seen.extend(number for number in members if number not in seen)
    alive = sorted(seen, key=means.__getitem__)
    dropped = True
    while dropped:
        dropped = False
        for number in list(alive):
            holding = [members for members in front if number in members]
            if all(any(other in alive and other != number for other in members) for members in holding):
                alive.remove(number)
                dropped = True
                break
    return [[number for number in members if number in alive] for members in front]


def oracle_draw(front: list[list[int]], means: list[float], seed: int) -> int:
    tickets: list[int] = []
    pruned = oracle_pruned(front, means)
    order: list[int] = []
    for members in pruned:
        order.extend(number for number in members if number not in order)
    for number in order:
        tickets.extend([number] * sum(number in members for members in pruned))
    return random.Random(seed).choice(tickets)


def oracle_batches(ids: list[str], size: int, count: int, rng: random.Random) -> list[list[str]]:
    """Chunks of shuffled epochs; an epoch that does not divide evenly is filled with rows that were used least."""
    found: list[list[str]] = []
    while len(found) < count:
        epoch = ids.copy()
        rng.shuffle(epoch)
        used = {row: 1 for row in epoch}
        while len(epoch) % size:
            least = min(used.values())
            pad = [row for row in used if used[row] == least].pop()
            used[pad] += 1
            epoch.append(pad)
        found.extend(epoch[at : at + size] for at in range(0, len(epoch), size))
    return found[:count]


def means_of(table: list[list[float]]) -> list[float]:
    return [sum(scores) / len(scores) for scores in table]


def as_maps(table: list[list[float]]) -> list[dict[str, float]]:
    return [{f"row {column}": score for column, score in enumerate(scores)} for scores in table]


@given(TABLES)
def test_fronts_and_pruning_are_the_oracles(table: list[list[float]]) -> None:
    found = fronts(as_maps(table))
    expected = oracle_fronts(table)
    assert [sorted(members) for members in found.values()] == expected
    means = means_of(table)
    pruned = undominated(found, means)
    assert [sorted(members) for members in pruned.values()] == oracle_pruned(expected, means)
    assert dominators(found, means) == sorted({number for members in pruned.values() for number in members})


@given(TABLES)
def test_pruning_keeps_every_front_and_the_best_score_of_every_row(table: list[list[float]]) -> None:
    pruned = undominated(fronts(as_maps(table)), means_of(table))
    assert all(pruned.values())
    kept = {number for members in pruned.values() for number in members}
    for column in range(len(table[0])):
        assert max(table[number][column] for number in kept) == max(scores[column] for scores in table)
    # Nobody who is left could go as well.
    for number in kept:
        assert any(members == {number} for members in pruned.values())


@given(TABLES, st.integers(0, 10_000))
def test_the_parent_drawn_is_the_oracles(table: list[list[float]], seed: int) -> None:
    drawn = pick_parent(fronts(as_maps(table)), means_of(table), random.Random(seed))
    assert drawn == oracle_draw(oracle_fronts(table), means_of(table), seed)


def test_parents_are_drawn_by_their_share_of_fronts() -> None:
    table = [[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]]
    rng = random.Random(4)
    drawn = Counter(pick_parent(fronts(as_maps(table)), means_of(table), rng) for _ in range(4000))
    assert set(drawn) == {0, 1}, "the even one stands in no front"
    assert drawn[0] / 4000 == pytest.approx(0.75, abs=0.03)


@given(st.integers(1, 17), st.integers(1, 6), st.integers(1, 25), st.integers(0, 999))
def test_minibatches_are_the_oracles(rows: int, size: int, count: int, seed: int) -> None:
    ids = [f"r{number}" for number in range(rows)]
    batches = EpochBatches(ids, size, random.Random(seed))
    found = [batches.batch(index) for index in range(count)]
    assert found == oracle_batches(ids, min(size, rows), count, random.Random(seed))


@given(st.integers(2, 12), st.integers(1, 5), st.integers(0, 99))
def test_every_row_comes_once_an_epoch_and_padding_uses_none_three_times(rows: int, size: int, seed: int) -> None:
    ids = [f"r{number}" for number in range(rows)]
    batches = EpochBatches(ids, size, random.Random(seed))
    size = min(size, rows)
    each = -(-rows // size)
    for epoch in range(3):
        used = Counter(row for index in range(each) for row in batches.batch(epoch * each + index))
        assert set(used) == set(ids)
        assert max(used.values()) <= 2


def test_turns_without_a_minibatch_skip_their_place() -> None:
    """A merge takes a turn but no minibatch: the next one is the one at its own index, as in the reference."""
    ids = [f"r{number}" for number in range(9)]
    whole: Any = EpochBatches(ids, 3, random.Random(7))
    every = [whole.batch(index) for index in range(3)]
    some = EpochBatches(ids, 3, random.Random(7))
    assert [some.batch(0), some.batch(2)] == [every[0], every[2]]
