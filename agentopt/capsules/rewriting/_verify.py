"""Whether a shorter text still says what its source says: cheap checks first, each with its finding in words.

The unit is one document and one text that is to stand for it. A check that fails is hard: the text is not used. The
last one, the share of questions the text can still answer, is a figure and never fails.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from agentopt.capsules._types import Check, Document
from agentopt.capsules.counting._tokens import Meter
from agentopt.capsules.rewriting._clauses import (
    LOST_CONDITION,
    Clause,
    Index,
    differences,
    polarity,
    sentences,
    split,
    stems,
)
from agentopt.capsules.rewriting._facts import (
    Numbers,
    addresses,
    dates,
    implied,
    numbers,
    without_dates,
    without_list_marks,
)
from agentopt.capsules.rewriting._names import Known, invented
from agentopt.capsules.rewriting._probes import Probe, make_probes, recall
from agentopt.capsules.rewriting._replies import chatter, refused
from agentopt.capsules.units._spans import find_intact, find_keep

if TYPE_CHECKING:
    from agentopt.capsules.rewriting._facts import Number

_SHOWN = 4
_TELLING = 5
_NOVEL = 0.4


@dataclass(frozen=True)
class Source:
    """A document, read once for any number of texts that are to stand for it."""

    document: Document
    query: str | None = None
    seed: int = 0

    @property
    def text(self) -> str:
        """The characters."""
        return self.document.text

    @cached_property
    def keep(self) -> tuple[str, ...]:
        """The keep spans, in order."""
        return tuple(span.of(self.text) for span in self.document.keep)

    @cached_property
    def slots(self) -> Counter[str]:
        """The placeholders and how often each stands."""
        return slots(self.text)

    @cached_property
    def index(self) -> Index:
        """The clauses."""
        return Index(split(without_list_marks(self.text)))

    @cached_property
    def facts(self) -> Numbers:
        """The numbers."""
        return Numbers(self.text)

    @cached_property
    def stated(self) -> dict[str, list[frozenset[str]]]:
        """By number: the words of each clause that says it, or of its sentence where the clause says little else."""
        sentence: dict[int, frozenset[str]] = {}
        for clause in self.index.clauses:
            sentence[clause.sentence] = sentence.get(clause.sentence, frozenset[str]()) | clause.stems
        found: dict[str, list[frozenset[str]]] = {}
        for clause in self.index.clauses:
            words = clause.stems if len(clause.stems) >= _TELLING else sentence[clause.sentence]
            for number in (*numbers(clause.text), *implied(clause.text)):
                found.setdefault(number.value, []).append(words)
        return found

    @cached_property
    def names(self) -> Known:
        """The words that a name may be."""
        return Known(self.text)

    @cached_property
    def flat(self) -> str:
        """The text with every stretch of white space as one space."""
        return " ".join(self.text.split())

    @cached_property
    def lower(self) -> str:
        """`flat` in lower case."""
        return self.flat.lower()

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """JSON, XML and code in it."""
        return tuple(span.of(self.text) for span in find_intact(self.text) if span.kind in _BLOCKS)

    @cached_property
    def probes(self) -> tuple[Probe, ...]:
        """Questions with known answers."""
        return make_probes(self.document, query=self.query, seed=self.seed)


_BLOCKS = ("json", "xml", "code")


def verify(original: Document, text: str, *, meter: Meter | None) -> list[Check]:
    """Check `text` as a shorter form of `original`.

    Args:
        original: the source.
        text: what is to stand for it.
        meter: the budget; None where the length is checked elsewhere. With a meter of several messages the text alone
            is counted.

    Returns:
        One check each for length, reply, keep, placeholders, numbers, dates, names, addresses, negations, schemas,
        grounding and probes, in this order. All passed but the last one, which is a figure, means that the text may be
        used.
    """
    return verify_against(Source(original), text, meter=meter)


def verify_against(source: Source, text: str, *, meter: Meter | None) -> list[Check]:
    """`verify` for a source that is read once and compared with several texts."""
    clauses = split(without_list_marks(text))
    return [
        _length(text, meter),
        _reply(source, text),
        _keep(source, text),
        _slots(source, text),
        _numbers(source, text, clauses),
        _dates(source, text),
        _some("names", "not in the source", sorted(set(invented(without_dates(text), source.names)))),
        _some("addresses", "not in the source", _strange_addresses(source, text)),
        _negations(source, clauses),
        _schemas(source, text),
        _grounded(source, clauses),
        _recall(source, text),
    ]


def _length(text: str, meter: Meter | None) -> Check:
    if meter is None:
        return Check("length", True, "counted elsewhere")
    tokens = meter.total([text]) if meter.messages is None else meter.tokenizer.count(text)
    return Check("length", tokens <= meter.limit, f"{tokens:,} of {meter.limit:,} tokens")


def _reply(source: Source, text: str) -> Check:
    if source.text.strip() and not text.strip():
        return Check("reply", False, "nothing is left")
    if refused(text, source.text):
        return Check("reply", False, "it refuses instead of saying what the source says")
    said = chatter(text, source.text)
    if said:
        return Check("reply", False, f"it talks about itself: {said[:80]!r}")
    if text.count("```") % 2 and not source.text.count("```") % 2:
        return Check("reply", False, "a code block is not closed")
    return Check("reply", True)


def missing_spans(keep: Sequence[str], text: str) -> list[int]:
    """Which of the spans `text` lacks, by their place: each must follow the one before it."""
    place = 0
    missing: list[int] = []
    for number, span in enumerate(keep):
        found = text.find(span, place)
        if found < 0:
            missing.append(number)
        else:
            place = found + len(span)
    return missing


def _keep(source: Source, text: str) -> Check:
    missing = missing_spans(source.keep, text)
    if missing:
        return _some("keep", "missing or out of order", [source.keep[number] for number in missing])
    return Check("keep", True, f"{len(source.keep)} of {len(source.keep)}")


def slots(text: str) -> Counter[str]:
    """The placeholders of a text and how often each stands."""
    return Counter(span.of(text) for span in find_keep(text, ()) if span.kind == "placeholder")


def _slots(source: Source, text: str) -> Check:
    now = slots(text)
    problems = [f"{slot} added" for slot in now - source.slots]
    problems += [f"{slot} lost" for slot in source.slots - now]
    return _some("placeholders", "", sorted(problems))


def _numbers(source: Source, text: str, clauses: Sequence[Clause]) -> Check:
    strange = [
        number.written
        for line in sentences(without_list_marks(text))
        for number in numbers(line)
        if not source.facts.has(number, line)
    ]
    if strange:
        return _some("numbers", "not in the source", list(dict.fromkeys(strange)))
    moved = [
        f"{number.written} in {clause.text.strip()[:60]!r}"
        for clause in clauses
        for number in numbers(clause.text)
        if _moved(source, clause, number)
    ]
    return _some("numbers", "said of something else in the source", list(dict.fromkeys(moved)))


def _moved(source: Source, clause: Clause, number: Number) -> bool:
    """Whether the source says this number only of other things than the clause does."""
    if "|" in clause.text:
        return False  # a row of a table says several things
    words = clause.stems - frozenset(stems(number.written))
    shared = source.index.shared(words)
    if not shared or not words:
        return False
    near = max((len(words & said) for said in source.stated.get(number.value, ())), default=0)
    return near * 2 < max(shared.values())


def _dates(source: Source, text: str) -> Check:
    known = tuple(dates(source.text))
    strange = [
        date.written
        for date in dates(text)
        if not date.within(known) and " ".join(date.written.split()) not in source.flat
    ]
    return _some("dates", "not in the source", strange)


def _strange_addresses(source: Source, text: str) -> list[str]:
    return list(dict.fromkeys(found for found in addresses(text) if not _stands(source, found)))


def _stands(source: Source, found: str) -> bool:
    """Whether an address is in the source as it is; a word with a number ("top-5") may be joined or begin otherwise."""
    if found in source.text:
        return True
    if not found.replace("-", "").isalnum():
        return False
    return found.lower() in source.lower or found.lower().replace("-", " ") in source.lower


def _negations(source: Source, clauses: Sequence[Clause]) -> Check:
    problems: list[str] = []
    conditional: set[int] = set()
    whole: dict[int, str] = {}
    for clause in clauses:
        whole[clause.sentence] = f"{whole.get(clause.sentence, '')} {clause.text}"
    for clause in clauses:
        problem = differences(clause, source.index.expected(clause))
        if problem == LOST_CONDITION and (clause.sentence in conditional or _conditional(whole[clause.sentence])):
            conditional.add(clause.sentence)
        elif problem:
            problems.append(f"{problem} in {' '.join(clause.text.split())[:80]!r}")
    return _some("negations", "", problems)


def _conditional(text: str) -> bool:
    """Whether a sentence says a condition, perhaps in another of its clauses."""
    said = polarity(text)
    return said.condition or "cond" in said.marks


def _schemas(source: Source, text: str) -> Check:
    strange = [
        block[:60]
        for block in (span.of(text) for span in find_intact(text) if span.kind in _BLOCKS)
        if block not in source.text and not _same_block(block, source.blocks)
    ]
    return _some("schemas", "not as in the source", strange)


def _same_block(block: str, known: Sequence[str]) -> bool:
    flat = " ".join(block.split())
    value = _json(block)
    return any(flat == " ".join(other.split()) or (value is not _NOT_JSON and value == _json(other)) for other in known)


_NOT_JSON = object()


def _json(text: str) -> Any:
    try:
        return json.loads(text, parse_float=str, parse_int=str)
    except (ValueError, RecursionError):
        return _NOT_JSON


def _grounded(source: Source, clauses: Sequence[Clause]) -> Check:
    # Sorted: the detail is sent to the model in a repair, so it must be the same in every process.
    novel = [[word for word in sorted(clause.stems) if _novel(source, word)] for clause in clauses]
    flat = [word for words in novel for word in words]
    total = sum(len(clause.stems) for clause in clauses)
    if not total and source.index.ordered:
        return Check("grounding", False, "it says nothing")
    if len(flat) > _NOVEL * total and (len(flat) >= 3 or len(flat) == total):
        return Check("grounding", False, f"{len(flat) / total:.0%} of its words are not in the source: {_listed(flat)}")
    alone = [
        " ".join(clause.text.split())[:80]
        for clause, words in zip(clauses, novel, strict=True)
        if len(clause.stems) >= 4 and len(words) > 0.7 * len(clause.stems)
    ]
    return _some("grounding", "not said in the source", alone)


def _novel(source: Source, word: str) -> bool:
    """Whether the source has nothing like this word; numbers are another check's."""
    return not (any(map(str.isdigit, word)) or word in source.index or _prefix(word, source.index.ordered))


def _prefix(word: str, ordered: Sequence[str]) -> bool:
    """Whether it abbreviates a word of the source, or a word of the source begins it."""
    place = bisect_left(ordered, word)
    if len(word) > 2 and place < len(ordered) and ordered[place].startswith(word):
        return True
    return place > 0 and len(ordered[place - 1]) > 3 and word.startswith(ordered[place - 1])


def _recall(source: Source, text: str) -> Check:
    if not source.probes:
        return Check("probes", True, "nothing to ask")
    share = recall(source.probes, text)
    return Check("probes", True, f"{share:.2f} of {len(source.probes)} questions answered")


def _some(name: str, what: str, found: Sequence[str]) -> Check:
    if not found:
        return Check(name, True)
    return Check(name, False, f"{what}: {_listed(found)}".lstrip(": "))


def _listed(found: Sequence[str]) -> str:
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more
