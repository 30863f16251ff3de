"""Units that say what another unit said: equal, or nearly equal by their shingles.

Nearly equal is not enough where it matters: two units with different numbers, or of which one denies, are never
duplicates. The first of several stays in the race; of the others nothing is worth a token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from agentopt.capsules.extraction._field import Field
from agentopt.capsules.extraction._terms import Ints

_NEAR = 0.85
"""Share of common terms (Jaccard) from which two units may be duplicates."""
_SHORTEST = 4
"""Terms below which only equal texts count."""
_SEEDS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)
_BUCKET = 8
"""Earlier units of a bucket that a unit is compared with."""
_TELLING = re.compile(
    r"\d[\d.,:/]*|\b(?:no|not|never|none|nor|neither|without|except|unless|only|cannot|all|some|any)\b|n['\u2019]t\b"
)


def duplicates(field: Field) -> dict[int, int]:
    """For each row that repeats an earlier one, that row."""
    found: dict[int, int] = {}
    exact: dict[str, int] = {}
    for row, text in enumerate(field.texts):
        if len(text) < 12:
            continue
        first = exact.setdefault(text if len(text) < 200 else " ".join(text.split()), row)
        if first != row:
            found[row] = first
    for row, first in _near(field, found):
        found[row] = first
    return found


def _near(field: Field, known: dict[int, int]) -> list[tuple[int, int]]:
    """Rows of which a min-hash of the three-term shingles is that of an earlier row, and that hold nearly its terms."""
    sketches = _sketches(field.lists)
    if sketches is None:
        return []
    rows, hashes = sketches
    out: list[tuple[int, int]] = []
    buckets: dict[tuple[int, int], list[int]] = {}
    for place, row in enumerate(rows.tolist()):
        if row in known:
            continue
        keys = [(which, int(hashes[which][place])) for which in range(len(_SEEDS))]
        earlier = dict.fromkeys(other for key in keys for other in buckets.get(key, ())[:_BUCKET])
        same = next((other for other in earlier if _same(field, other, row)), None)
        if same is not None:
            out.append((row, same))
            continue
        for key in keys:
            buckets.setdefault(key, []).append(row)
    return out


def _same(field: Field, first: int, second: int) -> bool:
    one, two = set(field.lists[first]), set(field.lists[second])
    if len(one & two) < _NEAR * len(one | two):
        return False
    return _TELLING.findall(field.texts[first].lower()) == _TELLING.findall(field.texts[second].lower())


def _sketches(lists: Sequence[Sequence[int]]) -> tuple[Ints, list[np.ndarray[tuple[int], np.dtype[np.uint64]]]] | None:
    """Rows with enough terms, and for each seed the smallest hash of their shingles."""
    long = [(row, numbers) for row, numbers in enumerate(lists) if len(numbers) >= _SHORTEST]
    if not long:
        return None
    rows = np.asarray([row for row, _ in long], dtype=np.int64)
    flat = np.asarray([number for _, numbers in long for number in numbers], dtype=np.uint64) + np.uint64(1)
    lengths = np.asarray([len(numbers) for _, numbers in long], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    # The last two shingles of a row reach into the next one: they are replaced by its first.
    shingles = flat * np.uint64(_SEEDS[0])
    shingles[:-1] ^= np.roll(flat, -1)[:-1] * np.uint64(_SEEDS[1])
    shingles[:-2] ^= np.roll(flat, -2)[:-2] * np.uint64(_SEEDS[2])
    for back in (1, 2):
        shingles[starts + lengths - back] = shingles[starts]
    hashes: list[np.ndarray[tuple[int], np.dtype[np.uint64]]] = []
    for seed in _SEEDS:
        mixed = (shingles ^ (shingles >> np.uint64(29))) * np.uint64(seed)
        mixed ^= mixed >> np.uint64(32)
        hashes.append(np.minimum.reduceat(mixed, starts))
    return rows, hashes
