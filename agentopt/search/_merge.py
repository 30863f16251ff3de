"""System-aware merge of two candidates with a common ancestor (GEPA, arXiv 2507.19457, algorithm 4), as pure functions.

Two children of one ancestor that each improved another parameter are joined: per parameter the changed value when one
changed it, the better child's when both did.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ATTEMPTS = 10
SUBSAMPLE = 5
"""Validation rows on which a merge is tested before it gets all of them; also the least overlap of its parents."""


@dataclass(frozen=True, slots=True)
class Merge:
    """Parents (`first` < `second`), the common ancestor, and the joined values."""

    first: int
    second: int
    ancestor: int
    values: Mapping[str, Any]


@dataclass(slots=True)
class Merges:
    """What was merged before: triplets, and pairs with the origin of each value."""

    triplets: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])
    origins: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list[tuple[int, int, tuple[int, ...]]])


def ancestors(number: int, parents: Sequence[Sequence[int]]) -> set[int]:
    """All candidates that `number` descends from."""
    found: set[int] = set()
    waiting = list(parents[number])
    while waiting:
        parent = waiting.pop()
        if parent not in found:
            found.add(parent)
            waiting.extend(parents[parent])
    return found


def find_merge(
    candidates: Sequence[Mapping[str, Any]],
    parents: Sequence[Sequence[int]],
    means: Sequence[float],
    eligible: Sequence[int],
    done: Merges,
    rng: random.Random,
    *,
    overlap: int = SUBSAMPLE,
) -> Merge | None:
    """A pair of `eligible` candidates worth joining, or None after ten tries of ten pairs each.

    Neither descends from the other, a common ancestor is better than neither, and at least one value was changed by
    exactly one of them. A merge that was found is entered in `done`. `overlap` is how many validation rows any two have
    in common; with fewer than five nothing is merged (the draws are made all the same, as in the reference).
    """
    if len(eligible) < 2 or len(parents) < 3:
        return None
    for _ in range(ATTEMPTS):
        found = _triplet(candidates, parents, means, eligible, done, rng)
        if found is None or found in done.triplets:
            continue
        first, second, ancestor = found
        values, origin = _join(candidates, means, found, rng)
        if (first, second, origin) in done.origins or overlap < SUBSAMPLE:
            continue
        done.origins.append((first, second, origin))
        done.triplets.append(found)
        return Merge(first, second, ancestor, values)
    return None


def _triplet(
    candidates: Sequence[Mapping[str, Any]],
    parents: Sequence[Sequence[int]],
    means: Sequence[float],
    eligible: Sequence[int],
    done: Merges,
    rng: random.Random,
) -> tuple[int, int, int] | None:
    for _ in range(ATTEMPTS):
        first, second = sorted(rng.sample(list(eligible), 2))
        above_first, above_second = ancestors(first, parents), ancestors(second, parents)
        if second in above_first or first in above_second:
            continue
        common = [
            ancestor
            for ancestor in sorted(above_first & above_second)
            if (first, second, ancestor) not in done.triplets
            and means[ancestor] <= min(means[first], means[second])
            and _one_sided(candidates[ancestor], candidates[first], candidates[second])
        ]
        if common:
            weights = [means[ancestor] for ancestor in common]
            # Weights are scores; where all are zero (or a metric goes below), every ancestor is as good as another.
            usable = min(weights) >= 0 and sum(weights) > 0
            return first, second, rng.choices(common, weights=weights if usable else None, k=1)[0]
    return None


def _one_sided(ancestor: Mapping[str, Any], first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return any(first[name] != second[name] and ancestor[name] in (first[name], second[name]) for name in ancestor)


def _join(
    candidates: Sequence[Mapping[str, Any]], means: Sequence[float], found: tuple[int, int, int], rng: random.Random
) -> tuple[dict[str, Any], tuple[int, ...]]:
    first, second, ancestor = found
    values: dict[str, Any] = {}
    origin: list[int] = []
    for name, old in candidates[ancestor].items():
        one, other = candidates[first][name], candidates[second][name]
        if one == other or other == old:
            chosen = first
        elif one == old:
            chosen = second
        elif means[first] != means[second]:
            chosen = first if means[first] > means[second] else second
        else:
            chosen = rng.choice([first, second])
        origin.append(chosen)
        values[name] = candidates[chosen][name]
    return values, tuple(origin)


def subsample(first: Mapping[str, float], second: Mapping[str, float], rng: random.Random) -> list[str]:
    """Five validation rows that both have: where the first is better, where the second is, and ties, evenly."""
    common = [row_id for row_id in first if row_id in second]
    better = [row_id for row_id in common if first[row_id] > second[row_id]]
    worse = [row_id for row_id in common if second[row_id] > first[row_id]]
    ties = [row_id for row_id in common if first[row_id] == second[row_id]]
    each = max(1, math.ceil(SUBSAMPLE / 3))
    chosen: list[str] = []
    for bucket in (better, worse, ties):
        take = min(len(bucket), each, SUBSAMPLE - len(chosen))
        if take > 0:
            chosen += rng.sample(bucket, k=take)
    missing = SUBSAMPLE - len(chosen)
    unused = [row_id for row_id in common if row_id not in chosen]
    return chosen + rng.sample(unused, k=min(missing, len(unused))) if missing > 0 else chosen
