"""What the scorers look at: every unit as a row of terms, with the passage it stands in and that passage's title."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agentopt.capsules._types import Document, UnitKind
from agentopt.capsules.extraction._terms import STOP, Floats, Ints, Table, Vocabulary, table

# Without a heading, a passage is taken to be about the name that its first sentence begins with.
_SUBJECT = re.compile(
    r"(?:(?:The|A|An) )?((?:[A-Z0-9][\w.'\u2019&-]*)(?: (?:of |the |de |la |and )?[A-Z0-9][\w.'\u2019&-]*){0,4})"
)
_PRONOUN = re.compile(r"(?:He|She|It|They|This|That|These|Those|His|Her|Its|Their|Such)\b")


@dataclass(frozen=True, slots=True)
class Field:
    """Rows are all units of all documents, in order."""

    texts: list[str]
    kinds: list[UnitKind]
    parts: list[int]
    """The document of each row."""
    vocabulary: Vocabulary
    lists: list[list[int]]
    """The content terms of each row itself."""
    own: Table
    """Counts of the row's own terms."""
    passage: Ints
    """The passage of each row: what one heading governs, or a block without a heading."""
    titles: list[list[int]]
    """The terms of each passage's title, each once; empty when it has none."""
    position: Ints
    """0 for the first row of its passage that is not a heading, then 1, 2, ..."""

    def with_titles(self) -> Table:
        """Counts of the row's terms and of its passage's title."""
        passages: list[int] = self.passage.tolist()
        lists = [own + self.titles[passage] for own, passage in zip(self.lists, passages, strict=True)]
        return table(lists, self.own.size)

    def passages(self) -> Table:
        """Counts of each passage's terms, its title's once more."""
        lists = [list(title) for title in self.titles]
        for own, passage in zip(self.lists, self.passage.tolist(), strict=True):
            lists[passage] += own
        return table(lists, self.own.size)

    def follows(self) -> list[int]:
        """Rows that begin with a pronoun and have a row of their passage before them."""
        return [
            row
            for row, text in enumerate(self.texts)
            if self.position[row] > 0 and self.parts[row - 1] == self.parts[row] and _PRONOUN.match(text)
        ]


def field_of(documents: Sequence[Document], texts: list[str]) -> Field:
    """Read the units of `documents`; `texts` are theirs, in order."""
    vocabulary = Vocabulary()
    lists = [vocabulary.read(text) for text in texts]
    passage, position, parts = [0] * len(texts), [0] * len(texts), [0] * len(texts)
    titles: list[list[int]] = []
    row = 0
    for part, document in enumerate(documents):
        numbers: dict[tuple[int, int], int] = {}
        seen: dict[int, int] = {}
        start = row
        for unit in document.units:
            governed = unit.kind == "heading" or unit.heading >= 0
            heading = row - start if unit.kind == "heading" else unit.heading
            key = (heading, -1) if governed else (-1, unit.block)
            number = numbers.get(key)
            if number is None:
                number = numbers[key] = len(titles)
                title = lists[start + heading] if governed else _subject(vocabulary, texts[row])
                titles.append(list(dict.fromkeys(title)))
            passage[row], parts[row] = number, part
            if unit.kind != "heading":
                position[row] = seen.get(number, 0)
                seen[number] = position[row] + 1
            row += 1
    return Field(
        texts=texts,
        kinds=[unit.kind for document in documents for unit in document.units],
        parts=parts,
        vocabulary=vocabulary,
        lists=lists,
        own=table(lists, len(vocabulary)),
        passage=np.asarray(passage, dtype=np.int64),
        titles=titles,
        position=np.asarray(position, dtype=np.int64),
    )


def _subject(vocabulary: Vocabulary, text: str) -> list[int]:
    found = _SUBJECT.match(text)
    if found is None or found[1].lower() in STOP:
        return []
    return vocabulary.read(found[1])


def jittered(values: Floats, seed: int) -> Floats:
    """Values with their ties broken by the seed."""
    return values + np.random.default_rng(seed).random(len(values)) * 1e-9
