"""Which demonstrations to keep: far from one another, and as many of each label.

A k-center order by farthest-first traversal: the first is the one nearest to all, each next one is the farthest from
those taken, among the labels that were taken least often. Any beginning of the order is a good choice of that size.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from agentopt.capsules._terms import Floats, table

_LABEL_WORDS = 4
_CUE = re.compile(r"(?:\b(?:is|answer|label|output|sentiment|category|a)\b\s*[:=]?|[-=]>|[:=])\s*", re.IGNORECASE)


def label_of(text: str) -> str:
    """The answer a demonstration ends with, when it is a short one; empty otherwise."""
    last = text.rstrip().rsplit("\n", 1)[-1]
    ends = [match.end() for match in _CUE.finditer(last)]
    answer = last[ends[-1] if ends else 0 :].strip(" \t.\"'()*").lower()
    return answer if 0 < len(answer.split()) <= _LABEL_WORDS else ""


def spread(lists: Sequence[Sequence[int]], size: int, labels: Sequence[str]) -> list[int]:
    """All demonstrations in the order in which to take them.

    Args:
        lists: The terms of each.
        size: Terms in the vocabulary.
        labels: The label of each; empty where it has none of its own.
    """
    vectors = _vectors(lists, size)
    counts = Counter(labels)
    # Answers that never repeat are no labels: there is nothing to balance.
    groups = [label if counts[label] > 1 else "" for label in labels]
    taken: Counter[str] = Counter({group: 0 for group in groups})
    nearest = np.full(len(lists), -1.0)
    middle = vectors @ vectors.sum(axis=0) if len(lists) else np.zeros(0)
    order: list[int] = []
    left = set(range(len(lists)))
    while left:
        fewest = min(taken[groups[row]] for row in left)
        among = sorted(row for row in left if taken[groups[row]] == fewest)
        row = min(among, key=lambda one: (float(nearest[one]), -float(middle[one]), one))
        left.discard(row)
        order.append(row)
        taken[groups[row]] += 1
        nearest = np.maximum(nearest, vectors @ vectors[row])
    return order


def _vectors(lists: Sequence[Sequence[int]], size: int) -> Floats:
    """Unit vectors of term weights, hashed to a fixed width."""
    width = 512
    found = table(lists, size)
    idf = np.log1p(found.texts / np.maximum(found.document_frequency(), 1.0))
    out = np.zeros((found.texts, width))
    np.add.at(out, (found.rows, (found.columns * 2654435761 >> 7) % width), found.counts * idf[found.columns])
    norm = np.sqrt((out * out).sum(axis=1, keepdims=True))
    return out / np.where(norm > 0, norm, 1.0)
