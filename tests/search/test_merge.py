"""System-aware merge against an oracle written from the text of the method."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.search._merge import Merges, ancestors, find_merge, subsample

Pool = tuple[list[dict[str, str]], list[tuple[int, ...]], list[float]]


@st.composite
def pools(draw: st.DrawFn) -> Pool:
    """Candidates with a lineage: each changes some parts of one parent (or joins two); means of a coarse scale."""
    names = ["a", "b", "c"][: draw(st.integers(1, 3))]
    values: list[dict[str, str]] = [dict.fromkeys(names, "0")]
    parents: list[tuple[int, ...]] = [()]
    for number in range(1, draw(st.integers(1, 8))):
        parent = draw(st.integers(0, number - 1))
        changed = draw(st.sets(st.sampled_from(names), min_size=1))
        child = {**values[parent], **{name: draw(st.sampled_from("123456")) for name in sorted(changed)}}
        values.append(child)
        other = draw(st.one_of(st.none(), st.integers(0, number - 1)))
        parents.append((parent,) if other is None or draw(st.booleans()) else (parent, other))
    means = [draw(st.sampled_from([0.1, 0.25, 0.5, 0.75])) for _ in values]
    return values, parents, means


# --- the oracle ---


def above(number: int, parents: list[tuple[int, ...]]) -> set[int]:
    direct = set(parents[number])
    return direct.union(*(above(parent, parents) for parent in direct)) if direct else set()


def oracle_joined(
    pool: Pool, found: tuple[int, int, int], rng: random.Random
) -> tuple[dict[str, str], tuple[int, ...]]:
    """Per part: the changed text if one changed, the better child's if both did, a coin on a tie."""
    values, _, means = pool
    i, j, k = found
    joined: dict[str, str] = {}
    origin: list[int] = []
    for name in values[k]:
        mine, yours, old = values[i][name], values[j][name], values[k][name]
        if mine == yours:
            take = i
        elif mine == old:
            take = j
        elif yours == old or means[i] > means[j]:
            take = i
        elif means[j] > means[i]:
            take = j
        else:
            take = rng.choice([i, j])
        joined[name] = values[take][name]
        origin.append(take)
    return joined, tuple(origin)


def oracle(pool: Pool, eligible: list[int], done: Merges, rng: random.Random) -> Any:
    """Up to ten rounds of up to ten pairs; (first, second, ancestor, values) or None."""
    values, parents, means = pool
    if len(eligible) < 2 or len(values) < 3:
        return None
    for _ in range(10):
        found = None
        for _ in range(10):
            i, j = sorted(rng.sample(eligible, 2))
            if i in above(j, parents) or j in above(i, parents):
                continue
            useful = [
                k
                for k in sorted(above(i, parents) & above(j, parents))
                if (i, j, k) not in done.triplets
                and not means[k] > means[i]
                and not means[k] > means[j]
                and any(
                    (values[i][name] == values[k][name]) != (values[j][name] == values[k][name]) for name in values[k]
                )
            ]
            if useful:
                (k,) = rng.choices(useful, weights=[means[k] for k in useful])
                found = i, j, k
                break
        if found is None:
            continue
        i, j, k = found
        joined, origin = oracle_joined(pool, found, rng)
        if (i, j, origin) in done.origins:
            continue
        done.origins.append((i, j, origin))
        done.triplets.append((i, j, k))
        return i, j, k, joined
    return None


@given(pools(), st.integers(0, 9999), st.data())
@settings(max_examples=200)
def test_the_same_merges_as_the_oracle_until_there_are_none(pool: Pool, seed: int, data: st.DataObject) -> None:
    values, parents, means = pool
    eligible = sorted(data.draw(st.sets(st.sampled_from(range(len(values))), min_size=1)))
    ours, theirs = random.Random(seed), random.Random(seed)
    done, other = Merges(), Merges()
    for _ in range(4):
        found = find_merge(values, parents, means, eligible, done, ours)
        expected = oracle(pool, eligible, other, theirs)
        assert (found and (found.first, found.second, found.ancestor, dict(found.values))) == expected
        assert (done.triplets, done.origins) == (other.triplets, other.origins)
        assert ours.getstate() == theirs.getstate(), "as many draws"


@given(pools(), st.integers(0, 9999))
def test_what_a_merge_promises(pool: Pool, seed: int) -> None:
    values, parents, means = pool
    before = copy.deepcopy(values)
    found = find_merge(values, parents, means, range(len(values)), Merges(), random.Random(seed))
    assert values == before
    if found is None:
        return
    i, j, k = found.first, found.second, found.ancestor
    assert i < j and k in ancestors(i, parents) & ancestors(j, parents)
    assert i not in ancestors(j, parents) and j not in ancestors(i, parents)
    assert means[k] <= min(means[i], means[j])
    for name, value in found.values.items():
        assert value in (values[i][name], values[j][name])
        if values[i][name] == values[k][name]:
            assert value == values[j][name]
        if values[j][name] == values[k][name]:
            assert value == values[i][name]


def test_ancestors_are_all_of_them_once() -> None:
    assert ancestors(4, [(), (0,), (0,), (1, 2), (3, 0)]) == {0, 1, 2, 3}
    assert ancestors(0, [()]) == set()


def test_too_little_overlap_merges_nothing_but_draws_as_the_reference() -> None:
    values = [{"a": "0", "b": "0"}, {"a": "1", "b": "0"}, {"a": "0", "b": "1"}]
    rng, done = random.Random(0), Merges()
    assert find_merge(values, [(), (0,), (0,)], [0.1, 0.5, 0.5], [1, 2], done, rng, overlap=4) is None
    assert done == Merges()
    assert find_merge(values, [(), (0,), (0,)], [0.1, 0.5, 0.5], [1, 2], done, rng) is not None


@pytest.mark.parametrize("mean", [0.0, -1.0])
def test_scores_of_zero_or_below_weigh_every_ancestor_alike(mean: float) -> None:
    """The reference raises here: its weights are the scores."""
    values = [{"a": "0", "b": "0"}, {"a": "1", "b": "0"}, {"a": "0", "b": "1"}]
    found = find_merge(values, [(), (0,), (0,)], [mean, 0.5, 0.5], [1, 2], Merges(), random.Random(0))
    assert found is not None and found.values == {"a": "1", "b": "1"}


# --- the rows on which a merge is tested ---


def oracle_rows(first: dict[str, float], second: dict[str, float], rng: random.Random) -> list[str]:
    groups = [
        [row for row in first if first[row] > second[row]],
        [row for row in first if first[row] < second[row]],
        [row for row in first if first[row] == second[row]],
    ]
    chosen: list[str] = []
    for group in groups:
        room = min(2, len(group), 5 - len(chosen))  # a third of five, rounded up
        chosen += rng.sample(group, room) if room else []
    rest = [row for row in first if row not in chosen]
    return chosen + (rng.sample(rest, 5 - len(chosen)) if len(chosen) < 5 else [])


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])), min_size=5), st.integers()
)
def test_the_test_rows_are_the_oracles_five_and_stratified(pairs: list[tuple[float, float]], seed: int) -> None:
    first = {f"r{number}": pair[0] for number, pair in enumerate(pairs)}
    second = {f"r{number}": pair[1] for number, pair in enumerate(pairs)}
    rows = subsample(first, second, random.Random(seed))
    assert rows == oracle_rows(first, second, random.Random(seed))
    assert len(set(rows)) == 5
    for sign in (1, -1):
        wins = sum((a - b) * sign > 0 for a, b in pairs)
        assert sum((first[row] - second[row]) * sign > 0 for row in rows) >= min(2, wins, 1 if wins else 0)


def test_rows_that_only_one_has_are_left_out() -> None:
    first = dict.fromkeys((f"r{number}" for number in itertools.chain(range(8))), 1.0)
    second = dict.fromkeys((f"r{number}" for number in range(2, 10)), 0.0)
    assert set(subsample(first, second, random.Random(0))) <= set(first) & set(second)
