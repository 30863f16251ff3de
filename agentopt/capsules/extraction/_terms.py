"""Words as the scorers see them: lower case, without a plural's s, the frequent function words left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# One character of a script that is written without spaces is a term; elsewhere a term is a run of letters and digits.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
_FUNCTION_WORDS = (
    "a about after all also am an and any are as at be been before being both but by can could did do does doing down "
    "during each few for from further had has have having he her here hers him his how i if in into is it its itself "
    "just me more most my no nor not of off on once only or other our out over own same she should so some such than "
    "that the their them then there these they this those through to too under until up very was we were what when "
    "where which while who whom why will with would you your s t re ve ll d m"
)
STOP = frozenset(_FUNCTION_WORDS.split())


def words(text: str) -> list[str]:
    """Every term of `text`, function words included, in order."""
    return _WORD.findall(text.lower())


def terms(text: str) -> list[str]:
    """The content terms of `text`, in order."""
    return [stem(word) for word in words(text) if word not in STOP]


def stem(word: str) -> str:
    """`word` without the ending of a plural."""
    if len(word) < 4 or word[-1] != "s" or word[-2] in "sui":
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-1]


class Vocabulary:
    """Numbers for terms; a term is lower-cased, stemmed and looked up once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._stems: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._stems)

    def number(self, term: str) -> int | None:
        """Of a term (a stem) that was seen."""
        return self._stems.get(term)

    def of(self, word: str) -> int:
        """The number of a lower-case word; -1 for a function word."""
        known = self._numbers.get(word)
        if known is None:
            known = -1 if word in STOP else self._stems.setdefault(stem(word), len(self._stems))
            self._numbers[word] = known
        return known

    def read(self, text: str) -> list[int]:
        """The numbers of the content terms of `text`."""
        numbers, of = self._numbers, self.of
        found = [numbers[word] if word in numbers else of(word) for word in _WORD.findall(text.lower())]
        return [number for number in found if number >= 0]


@dataclass(frozen=True, slots=True)
class Table:
    """Which term occurs how often in which text: one entry per (text, term), sorted by text."""

    texts: int
    size: int
    """Terms in the vocabulary."""
    rows: Ints
    columns: Ints
    counts: Floats
    lengths: Floats
    """Content terms of each text."""
    starts: Ints
    """Where each text's entries begin; one more for the end."""

    def of(self, row: int) -> Ints:
        """The distinct terms of a text."""
        return self.columns[self.starts[row] : self.starts[row + 1]]

    def document_frequency(self) -> Floats:
        """In how many texts each term occurs."""
        return np.bincount(self.columns, minlength=self.size).astype(np.float64)


def table(lists: Sequence[Sequence[int]] | Iterable[Sequence[int]], size: int) -> Table:
    """Count the terms of each text."""
    lists = list(lists)
    lengths = np.fromiter((len(numbers) for numbers in lists), dtype=np.int64, count=len(lists))
    flat = np.fromiter((number for numbers in lists for number in numbers), dtype=np.int64, count=int(lengths.sum()))
    width = max(size, 1)
    keys, counts = np.unique(np.repeat(np.arange(len(lists)), lengths) * width + flat, return_counts=True)
    rows = keys // width
    starts = np.searchsorted(rows, np.arange(len(lists) + 1))
    return Table(
        texts=len(lists),
        size=size,
        rows=rows,
        columns=keys % width,
        counts=counts.astype(np.float64),
        lengths=lengths.astype(np.float64),
        starts=starts.astype(np.int64),
    )
