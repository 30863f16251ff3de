"""Ways to shorten a text that a capsulator has to beat: truncation, random units and words, BM25, self-information.

All of them take the units (sentences or demonstrations) as given and fill the same budget, in any tokenizer: `Count`.
`Words` splits a text into words that carry their white space, so that what is left after a deletion keeps its lines.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

Count = Callable[[str], int]
_WORD = re.compile(r"\s*\S+")
_TERM = re.compile(r"[a-z0-9]+")


def words(text: str) -> list[str]:
    """The words of a text, each with the white space before it."""
    return _WORD.findall(text)


def fill(units: Sequence[str], order: Iterable[int], limit: int, count: Count, glue: str, head: str = "") -> str:
    """Units taken in `order` as long as they fit, written in their own order after `head`."""
    taken: set[int] = set()
    text = head
    for index in order:
        tried = glue.join([head] * bool(head) + [units[i] for i in sorted({*taken, index})])
        if count(tried) <= limit:
            taken.add(index)
            text = tried
    return text


def random_units(
    units: Sequence[str], limit: int, count: Count, rng: random.Random, glue: str = " ", head: str = ""
) -> str:
    """Whole units, drawn at random."""
    order = list(range(len(units)))
    rng.shuffle(order)
    return fill(units, order, limit, count, glue, head)


def largest(pieces: Sequence[str], order: Sequence[int], limit: int, count: Count) -> str:
    """The longest prefix of `order` whose pieces, in their own order, fit; the count need not be monotone."""

    def text(number: int) -> str:
        return "".join(pieces[i] for i in sorted(order[:number])).strip()

    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(text(middle)) <= limit else (low, middle - 1)
    while low and count(text(low)) > limit:
        low -= 1
    return text(low)


def truncate(text: str, limit: int, count: Count) -> str:
    """The beginning of the text, cut between words."""
    pieces = words(text)
    return largest(pieces, range(len(pieces)), limit, count)


def random_words(text: str, limit: int, count: Count, rng: random.Random, head: str = "") -> str:
    """Words deleted at random; `head` stays."""
    pieces = [head, *words(text)] if head else words(text)
    order = list(range(len(pieces)))
    rest = order[bool(head) :]
    rng.shuffle(rest)
    return largest(pieces, order[: bool(head)] + rest, limit, count)


def most_informative(
    pieces: Sequence[str], information: Sequence[float], limit: int, count: Count, head: str = ""
) -> str:
    """The pieces (with their white space) that carry most information; `head` stays."""
    first = [head] if head else []
    order = sorted(range(len(pieces)), key=lambda index: -information[index])
    shifted = [*range(len(first)), *(index + len(first) for index in order)]
    return largest([*first, *pieces], shifted, limit, count)


def terms(text: str) -> list[str]:
    """Lower-case words without their endings in s (the data sets here have "eat" and "eats")."""
    return [term[:-1] if len(term) > 3 and term.endswith("s") else term for term in _TERM.findall(text.lower())]


def bm25(units: Sequence[str], query: str, *, k1: float = 1.2, b: float = 0.75) -> list[float]:
    """Okapi BM25 of each unit for the query."""
    bags = [Counter(terms(unit)) for unit in units]
    mean = sum(bag.total() for bag in bags) / max(1, len(bags))
    seen = Counter(term for bag in bags for term in bag)
    scores: list[float] = []
    for bag in bags:
        score = 0.0
        for term in set(terms(query)):
            rarity = math.log(1 + (len(bags) - seen[term] + 0.5) / (seen[term] + 0.5))
            score += rarity * bag[term] * (k1 + 1) / (bag[term] + k1 * (1 - b + b * bag.total() / max(mean, 1e-9)))
        scores.append(score)
    return scores


def best_units(units: Sequence[str], query: str, limit: int, count: Count, glue: str = " ") -> str:
    """Whole units in the order of their BM25 score, as long as they fit."""
    scores = bm25(units, query)
    return fill(units, sorted(range(len(units)), key=lambda index: -scores[index]), limit, count, glue)


class Bigrams:
    """A bigram model of words with add-one back-off to words: self-information where no language model is at hand."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._pairs: Counter[tuple[str, str]] = Counter()
        self._words: Counter[str] = Counter()
        for text in texts:
            tokens = text.split()
            self._words.update(tokens)
            self._pairs.update(zip(["", *tokens], tokens, strict=False))
        self._total = self._words.total()

    def information(self, text: str) -> list[float]:
        """Bits of every word of the text, given the word before."""
        tokens = text.split()
        return [self._bits(before, word) for before, word in zip(["", *tokens], tokens, strict=False)]

    def _bits(self, before: str, word: str) -> float:
        alone = (self._words[word] + 1) / (self._total + len(self._words) + 1)
        return -math.log2((self._pairs[before, word] + alone) / (self._words[before] + 1))


_OPENING = frozenset(
    re.findall(
        r"[a-z]+",
        "a an the this that these those and or but nor so yet if when while because although though as than of in on "
        "at by for with from to into about over under between through during is are was were be been being has have "
        "had do does did can could will would shall should may might must who whom which whose what where how why not "
        "no",
    )
)


def phrases(text: str) -> list[str]:
    """Short phrases that begin at a function word, after punctuation or on a new line; white space stays in front."""
    found: list[str] = []
    open_ = False
    for piece in _WORD.findall(text):
        word = piece.strip()
        fresh = "\n" in piece or (word.lower() in _OPENING and not (open_ and _short(found)))
        if open_ and not fresh:
            found[-1] += piece
        else:
            found.append(piece)
        open_ = word[-1] not in ",.;:!?"
    return found


def _short(found: Sequence[str]) -> bool:
    """Whether the open phrase holds nothing but function words yet ("of the")."""
    return bool(found) and all(word.lower() in _OPENING for word in found[-1].split())
