"""Which rows are looked at, in which order: seeded, balanced over labels, the same after a resume."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np

MAX_LABELS = 12


class LabelledRow(Protocol):
    """The part of an example that sampling reads."""

    @property
    def id(self) -> str:
        """Identity inside its dataset."""
        ...

    @property
    def expected(self) -> Any:
        """The label, whatever its type."""
        ...


def draw(seed: int, *parts: object) -> np.random.Generator:
    """A generator that is a pure function of the run seed and `parts` (stable across processes)."""
    text = "/".join([str(seed), *map(str, parts)])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))


def balanced_order(rows: Sequence[LabelledRow], rng: np.random.Generator) -> list[str]:
    """All row ids, shuffled, labels taking turns, so that every prefix is nearly balanced.

    A prefix of eight rows of one label says nothing about a classifier that always answers that label. With more than
    12 distinct labels, or labels that are no plain values, the order is a plain shuffle.
    """
    shuffled = [rows[int(i)] for i in cast("list[int]", rng.permutation(len(rows)).tolist())]
    groups: dict[str, list[str]] = {}
    for row in shuffled:
        label = row.expected
        groups.setdefault(repr(label) if isinstance(label, str | int | float | bool) else "", []).append(row.id)
    if not 1 < len(groups) <= MAX_LABELS:
        return [row.id for row in shuffled]
    # Row k of a group of size m stands at (k + a random offset) / m: proportional, and not always the same label first.
    placed: list[tuple[float, str]] = []
    for label in sorted(groups):
        ids = groups[label]
        offset = float(rng.random())
        placed.extend(((k + offset) / len(ids), row_id) for k, row_id in enumerate(ids))
    placed.sort()
    return [row_id for _, row_id in placed]


class Minibatches:
    """Epoch-shuffled minibatches over the training rows: every row is used once before any is used twice."""

    def __init__(self, rows: Sequence[LabelledRow], size: int, seed: int) -> None:
        self._rows = rows
        self._size = min(size, len(rows))
        self._seed = seed
        self._epochs: list[list[str]] = []

    @property
    def size(self) -> int:
        """Rows of one minibatch."""
        return self._size

    def batch(self, index: int, first: Sequence[str] = ()) -> list[str]:
        """The ids of minibatch `index`; ids in `first` (known failures) go to the front."""
        start = index * self._size
        ids: list[str] = []
        for row_id in first:
            if row_id not in ids and len(ids) < self._size:
                ids.append(row_id)
        position = start
        while len(ids) < self._size:
            epoch, offset = divmod(position, len(self._rows))
            row_id = self._epoch(epoch)[offset]
            if row_id not in ids:
                ids.append(row_id)
            position += 1
        return ids

    def rest(self, used: Mapping[str, object]) -> list[str]:
        """Ids of the first epoch that are not in `used`."""
        return [row_id for row_id in self._epoch(0) if row_id not in used]

    def _epoch(self, number: int) -> list[str]:
        while len(self._epochs) <= number:
            self._epochs.append(balanced_order(self._rows, draw(self._seed, "minibatch", len(self._epochs))))
        return self._epochs[number]
