"""How a unit that must stay may be cut when there is no room for it: to clauses, then to words, never inside a span.

Only prose is cut, and only prose without a negation, a quantifier, a condition or an exception. An *atom* is a word, or
several where an intact or a keep span reaches over them; text of a script without spaces has an atom per character.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Sequence

from agentopt.capsules._types import Document, Span
from agentopt.capsules.extraction._terms import UNSPACED
from agentopt.capsules.units._graphemes import boundaries
from agentopt.capsules.units._spans import find_intact, uncuttable

PROSE = frozenset({"instruction", "sentence", "item", "turn", "log", "heading"})
_WORD = re.compile(r"\S+")
_UNSPACED = re.compile(f"[{UNSPACED}]")
_LONGEST = 200
"""Characters of a word; what is longer is cut like a script without spaces."""
_CLAUSE_END = re.compile(r"[,;:.!?\u2014\u2013)\]\u3001\u3002\uff0c\uff1b\uff1a\uff01\uff1f][\"'\u201d\u2019]?$")
Atoms = list[tuple[int, int]]


class Pieces:
    """The ways in which the units of one document may be cut; worked out when asked for."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._atoms: dict[int, Atoms] = {}
        self._needed: dict[int, frozenset[int]] = {}

    def text(self, index: int) -> str:
        """The whole unit."""
        unit = self._document.units[index]
        return self._document.text[unit.start : unit.end]

    def atoms(self, index: int) -> Atoms:
        """Where the atoms of a unit are, within the unit; a single one when it is never cut."""
        found = self._atoms.get(index)
        if found is None:
            found = self._atoms[index] = self._find_atoms(index)
        return found

    def needed(self, index: int) -> frozenset[int]:
        """The atoms that hold a part of a keep span."""
        found = self._needed.get(index)
        if found is None:
            found = self._needed[index] = frozenset(_touching(self.atoms(index), self._keep(index)))
        return found

    def join(self, index: int, chosen: Sequence[int]) -> str:
        """The text of some atoms: neighbours keep what stood between them, a gap becomes a space."""
        text, atoms = self.text(index), self.atoms(index)
        out: list[str] = []
        for place, number in enumerate(chosen):
            start, end = atoms[number]
            if place:
                last = atoms[chosen[place - 1]][1]
                between = text[last:start]
                out.append(between if chosen[place - 1] == number - 1 else " " if between.strip() != between else "")
            out.append(text[start:end])
        return "".join(out)

    def left_out(self, index: int, chosen: Sequence[int]) -> list[str]:
        """The stretches of a unit that a cut drops."""
        stays = set(chosen)
        runs: list[list[int]] = []
        for number in range(len(self.atoms(index))):
            if number in stays:
                continue
            if runs and runs[-1][-1] == number - 1:
                runs[-1].append(number)
            else:
                runs.append([number])
        return [self.join(index, run) for run in runs]

    def shortest(self, index: int) -> list[int]:
        """The atoms that must stay; where none must, the shortest one."""
        needed = self.needed(index)
        if needed:
            return sorted(needed)
        atoms = self.atoms(index)
        return [min(range(len(atoms)), key=lambda number: (atoms[number][1] - atoms[number][0], number))]

    def clauses(self, index: int) -> list[list[int]]:
        """The atoms of a unit, clause by clause."""
        text = self.text(index)
        out: list[list[int]] = [[]]
        atoms = self.atoms(index)
        for number, (start, end) in enumerate(atoms):
            out[-1].append(number)
            if number < len(atoms) - 1 and _CLAUSE_END.search(text[start:end]):
                out.append([])
        return out

    def needed_clauses(self, index: int) -> list[int]:
        """The atoms of the clauses in which something must stay."""
        needed = self.needed(index)
        return [number for clause in self.clauses(index) if needed.intersection(clause) for number in clause]

    def _keep(self, index: int) -> list[tuple[int, int]]:
        unit = self._document.units[index]
        return [
            (max(span.start - unit.start, 0), min(span.end, unit.end) - unit.start)
            for span in _within(self._document.keep, unit.start, unit.end)
        ]

    def _find_atoms(self, index: int) -> Atoms:
        text = self.text(index)
        if self._document.whole or self._document.units[index].kind not in PROSE or uncuttable(text):
            return [(0, len(text))]
        spans = [(span.start, span.end) for span in find_intact(text)]
        return _merged(_words(text), [*spans, *self._keep(index)])


def _touching(atoms: Atoms, spans: Sequence[tuple[int, int]]) -> list[int]:
    """The atoms that overlap a span; both are sorted and do not overlap among themselves."""
    out: list[int] = []
    place = 0
    for number, (start, end) in enumerate(atoms):
        while place < len(spans) and spans[place][1] <= start:
            place += 1
        if place < len(spans) and spans[place][0] < end:
            out.append(number)
    return out


def _within(spans: Sequence[Span], start: int, end: int) -> list[Span]:
    """The spans that reach into a stretch; `spans` are sorted and do not overlap."""
    first = bisect.bisect_right(spans, start, key=lambda span: span.end)
    last = bisect.bisect_left(spans, end, key=lambda span: span.start)
    return list(spans[first:last])


def _words(text: str) -> Atoms:
    """Words; in a script without spaces, and in what is far too long for a word, characters as a reader sees them."""
    out: Atoms = []
    for match in _WORD.finditer(text):
        start, end = match.span()
        if _UNSPACED.search(match[0]) or end - start > _LONGEST:
            edges = [start + edge for edge in boundaries(match[0])]
            out += itertools.pairwise(edges)
        else:
            out.append((start, end))
    return out


def _merged(atoms: Atoms, spans: Sequence[tuple[int, int]]) -> Atoms:
    """Atoms and spans that overlap become one; a span of white space alone is an atom too."""
    out: Atoms = []
    for start, end in sorted([*atoms, *spans]):
        if out and start < out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out
