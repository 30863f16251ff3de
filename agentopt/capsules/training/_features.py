"""What a policy over units sees of each unit: a row of numbers, from the text alone."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from typing import get_args

import numpy as np
import numpy.typing as npt

from agentopt.capsules._types import Document, UnitKind
from agentopt.capsules.counting._tokens import Meter

Floats = npt.NDArray[np.float64]
KINDS: tuple[str, ...] = get_args(UnitKind)
_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"\d+")
_CAPITAL = re.compile(r"\b[A-Z]\w+")
_NEGATION = re.compile(r"\b(?:not|never|no|none|without|unless|except|only)\b|n't\b", re.IGNORECASE)
_PLAIN = (
    "keep",
    "position",
    "first",
    "last",
    "length",
    "numbers",
    "capitals",
    "negation",
    "novelty",
    "centrality",
    "query",
    "query neighbour",
    "under a heading",
)


def names(buckets: int) -> list[str]:
    """What the columns are, in order."""
    return [*(f"kind {kind}" for kind in KINDS), *_PLAIN, *(f"words {number}" for number in range(buckets))]


def features(document: Document, meter: Meter, query: str | None, buckets: int) -> Floats:
    """One row per unit.

    Besides kind, place, length and what a unit contains: how new its words are, how many other units share them, how
    many of the query's words it has, and how many it shares with the unit that has most of them. `buckets` columns hold
    its words by hash, so that a word which matters in a task can be learned.
    """
    texts = [document.text[unit.start : unit.end] for unit in document.units]
    if not texts:
        return np.zeros((0, len(names(buckets))))
    words = [_WORD.findall(text.casefold()) for text in texts]
    spread = Counter(word for unit in words for word in set(unit))
    asked = set(_WORD.findall((query or "").casefold()))
    rarity = {word: math.log(1 + len(texts) / count) for word, count in spread.items()}

    def weight(some: set[str]) -> float:
        # fsum: the order of a set differs between processes, and the sum must not.
        return math.fsum(rarity.get(word, 0.0) for word in some)

    best = set(max(words, key=lambda unit: weight(set(unit) & asked))) if asked else set[str]()
    counts, seen = meter.units(texts), set[str]()
    result = np.zeros((len(texts), len(names(buckets))))
    for row, (unit, text) in enumerate(zip(document.units, texts, strict=True)):
        own = set(words[row])
        total = weight(own) or 1.0
        result[row, KINDS.index(unit.kind)] = 1.0
        result[row, len(KINDS) : len(KINDS) + len(_PLAIN)] = (
            unit.keep,
            row / max(1, len(texts) - 1),
            row == 0,
            row == len(texts) - 1,
            math.log1p(counts[row]),
            math.log1p(len(_NUMBER.findall(text))),
            math.log1p(len(_CAPITAL.findall(text))),
            bool(_NEGATION.search(text)),
            len(own - seen) / max(1, len(own)),
            sum(spread[word] for word in own) / max(1, len(own)) / len(texts),
            weight(own & asked) / max(1.0, weight(asked)),
            weight(own & best) / total if asked else 0.0,
            unit.heading >= 0,
        )
        for word in own if buckets else ():
            result[row, len(KINDS) + len(_PLAIN) + bucket(word, buckets)] = 1.0
        seen |= own
    return result


def bucket(word: str, buckets: int) -> int:
    """The same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=4).digest()) % buckets
