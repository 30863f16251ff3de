"""Questions with known answers, made from a source and asked of the text that is to stand for it.

The unit is one cloze: a unit of the source with one span left out. Without a model a text answers it when the span
stands in it beside words of the question; with a model the text is shown and the model fills the gaps. The share of
right answers, weighted by what a query asks about, says how much of the source a text still carries.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from agentopt.capsules._types import Document, SpanKind, Unit
from agentopt.capsules.rewriting._clauses import sentences, stem, stems
from agentopt.capsules.rewriting._facts import Numbers, dates, numbers
from agentopt.capsules.units._spans import find_intact
from agentopt.evaluation import seeded

if TYPE_CHECKING:
    from agentopt.models import LM, LMOptions

LIMIT = 64
"""Questions per document: enough to tell two texts apart, few enough to be asked of a model."""

_ASKED: frozenset[SpanKind] = frozenset({"number", "date", "money", "name", "quote", "url", "path", "identifier"})
_PER_UNIT = 3
_LONGEST = 120
_NUMBERED = re.compile(r"^\W*(\d{1,3})\s*[.):\]-]\s*(.*)$", re.M)
_WORDS = re.compile(r"[^\W\d_]{4,}")


@dataclass(frozen=True)
class Probe:
    """One question."""

    question: str
    """The unit with `____` in place of the answer."""
    answer: str
    kind: SpanKind | str
    """The kind of span the answer is; "word" for the rarest word of a unit that has no span."""
    context: frozenset[str]
    """Stems of the rest of the unit."""
    weight: float = 1.0

    @cached_property
    def values(self) -> frozenset[str]:
        """The numbers in the answer."""
        return frozenset(number.value for number in numbers(self.answer))

    def answered_by(self, said: str) -> bool:
        """Whether the answer stands in `said`: numbers by value, dates by their parts, the rest as written."""
        return _Window(said).has(self)


def make_probes(
    document: Document, *, query: str | None = None, seed: int = 0, limit: int = LIMIT
) -> tuple[Probe, ...]:
    """At most `limit` questions from all over the document; those of a query's subject count up to four times."""
    text = document.text
    units = [unit for unit in document.units if unit.kind != "heading"] or list(document.units)
    rng = seeded("capsule-probes", seed, len(text), limit)
    if len(units) > 4 * limit:
        chosen = sorted(rng.sample(range(len(units)), 4 * limit))
        units = [units[place] for place in chosen]
    frequency = Counter(stem(word.lower()) for unit in units for word in set(_WORDS.findall(unit_text(text, unit))))
    asked = frozenset(stems(query or ""))
    found = [probe for unit in units for probe in _of_unit(unit_text(text, unit), frequency, asked)]
    if len(found) > limit:
        found = [found[place] for place in sorted(rng.sample(range(len(found)), limit))]
    return tuple(found)


def unit_text(text: str, unit: Unit) -> str:
    """The characters of a unit; of a very long one the beginning."""
    return text[unit.start : min(unit.end, unit.start + 4_000)]


def _of_unit(text: str, frequency: Mapping[str, int], asked: frozenset[str]) -> list[Probe]:
    spans = [span for span in find_intact(text) if span.kind in _ASKED and span.end - span.start <= _LONGEST]
    words = frozenset(stems(text))
    weight = 1.0 + 3.0 * len(words & asked) / len(asked) if asked else 1.0
    probes = [
        _probe(text, span.start, span.end, span.kind, weight / min(len(spans), _PER_UNIT)) for span in spans[:_PER_UNIT]
    ]
    if not probes:
        rare = min(
            (match for match in _WORDS.finditer(text) if stems(match[0])),
            key=lambda match: (frequency.get(stem(match[0].lower()), 0), -len(match[0]), match.start()),
            default=None,
        )
        if rare is not None:
            probes.append(_probe(text, rare.start(), rare.end(), "word", weight))
    return probes


def _probe(text: str, start: int, end: int, kind: str, weight: float) -> Probe:
    answer = text[start:end]
    before, after = text[max(0, start - 160) : start], text[end : end + 160]
    context = frozenset(stems(before)) | frozenset(stems(after))
    return Probe(f"{before}____{after}", answer, kind, context - frozenset(stems(answer)), weight)


class _Window:
    """A few neighbouring sentences of a text that answers."""

    def __init__(self, text: str) -> None:
        self.flat = " ".join(text.split()).lower()
        self.stems = frozenset(stems(text))
        self.text = text

    @cached_property
    def _numbers(self) -> Numbers:
        return Numbers(self.text)

    @cached_property
    def _dates(self) -> tuple[object, ...]:
        return tuple((date.year, date.month, date.day) for date in dates(self.text))

    def has(self, probe: Probe) -> bool:
        """Whether the answer stands here."""
        if probe.kind in ("number", "money") and probe.values:
            return all(self._numbers.has(number) for number in numbers(probe.answer))
        flat = " ".join(probe.answer.split()).lower()
        if _stands_in(flat, self.flat):
            return True
        if probe.kind == "date":
            return any((date.year, date.month, date.day) in self._dates for date in dates(probe.answer))
        return probe.kind == "word" and stem(flat) in self.stems

    def about(self, probe: Probe) -> bool:
        """Whether it speaks of what the question speaks of."""
        shared = len(probe.context & self.stems)
        return shared >= max(1, min(len(probe.context), 8) // 4) or not probe.context


def _stands_in(part: str, text: str) -> bool:
    """Whether `part` stands in `text` and is not a piece of longer words there."""
    place = text.find(part)
    while place >= 0:
        end = place + len(part)
        joined_before = place > 0 and text[place - 1].isalnum() and part[:1].isalnum()
        joined_after = text[end : end + 1].isalnum() and part[-1:].isalnum()
        if not joined_before and not joined_after:
            return True
        place = text.find(part, place + 1)
    return False


def answered(probes: Sequence[Probe], text: str) -> list[bool]:
    """Which questions `text` answers: the answer beside words of the question."""
    lines = sentences(text)
    # A bullet or a cell leaves its subject to the line above, so a window is a sentence with the one before it.
    windows = [_Window("\n".join(lines[max(0, place - 1) : place + 1])) for place in range(len(lines))]
    return [any(window.about(probe) and window.has(probe) for window in windows) for probe in probes]


def recall(probes: Sequence[Probe], text: str) -> float:
    """The weighted share of questions that `text` answers; 0 when there are none."""
    return _share(probes, answered(probes, text))


def _share(probes: Sequence[Probe], right: Iterable[bool]) -> float:
    total = sum(probe.weight for probe in probes)
    return sum(probe.weight for probe, good in zip(probes, right, strict=True) if good) / total if total else 0.0


async def ask_probes(
    probes: Sequence[Probe], text: str, lm: LM, *, options: LMOptions, templates: Mapping[str, str] | None = None
) -> float:
    """The weighted share of questions that a model answers rightly when it sees only `text`; one call.

    Raises:
        LMError: the call could not be completed.
        BudgetExhausted: the budget does not cover the call.
    """
    from agentopt.capsules.rewriting._wording import fenced, fill, load_wording

    templates = load_wording() if templates is None else templates
    if not probes:
        return 0.0
    questions = "\n".join(f"{number}. {' '.join(probe.question.split())}" for number, probe in enumerate(probes, 1))
    fence = fenced(f"{text}\n{questions}", "capsule-probes", options.seed or 0)
    values = {"fence": fence, "document": text, "questions": questions}
    reply = await lm.complete(fill(templates["probes.ask"], values), options=options)
    said = {int(match[1]): match[2] for match in _NUMBERED.finditer(reply.text)}
    return _share(probes, (probe.answered_by(said.get(number, "")) for number, probe in enumerate(probes, 1)))
