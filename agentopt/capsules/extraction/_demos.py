"""Which demonstrations to keep: far from one another, and as many of each label.

A k-center order by farthest-first traversal: the first is the one nearest to all, each next one is the farthest from
those taken, among the labels that were taken least often. Any beginning of the order is a good choice of that size.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from agentopt.capsules.extraction._terms import Floats, table

_LABEL_WORDS = 4
_MOST = 1000
"""Demonstrations that are compared with one another, evenly spread over more."""
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
    every = max(1, -(-len(lists) // _MOST))
    looked = list(range(0, len(lists), every))
    vectors = _vectors([lists[row] for row in looked], size)
    counts = Counter(labels)
    # Answers that never repeat are no labels: there is nothing to balance.
    numbers = {label: number for number, label in enumerate(sorted(set(labels)))}
    grouped = [numbers[labels[row]] if counts[labels[row]] > 1 else -1 for row in looked]
    groups = np.asarray(grouped, dtype=np.int64)
    taken = Counter[int]()
    # Nearest to all comes first, then what is farthest from everything taken; a taken one is out of reach.
    distance = -(vectors @ vectors.sum(axis=0)) / max(len(looked), 1)
    order: list[int] = []
    left = Counter(grouped)
    while len(order) < len(looked):
        fewest = min((taken[group], group) for group in left if left[group])[1]
        row = int(np.where(groups == fewest, distance, np.inf).argmin())
        order.append(row)
        taken[fewest] += 1
        left[fewest] -= 1
        near = vectors @ vectors[row]
        distance = near if len(order) == 1 else np.maximum(distance, near)
        distance[order] = np.inf
    first = [looked[place] for place in order]
    rest = set(range(len(lists))) - set(first)
    return first + sorted(rest)


def _vectors(lists: Sequence[Sequence[int]], size: int) -> Floats:
    """Unit vectors of term weights, hashed to a fixed width."""
    width = 512
    found = table(lists, size)
    idf = np.log1p(found.texts / np.maximum(found.document_frequency(), 1.0))
    out = np.zeros((found.texts, width))
    np.add.at(out, (found.rows, (found.columns * 2654435761 >> 7) % width), found.counts * idf[found.columns])
    norm = np.sqrt((out * out).sum(axis=1, keepdims=True))
    return out / np.where(norm > 0, norm, 1.0)
