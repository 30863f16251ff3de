"""A deterministic reader for ProofWriter: the sentences are parsed, the rules applied forward, open world.

It is a solver, not a language model: a sentence that is not of the grammar says nothing to it, and every sentence that
is counts in full. What it measures is therefore whether a compressed theory still holds the facts and rules of the
proof and holds no new ones ("If something is quiet then it is smart", with "and cold" deleted, is a rule that nobody
wrote).

A literal is (subject, predicate, object, sign); negation is a sign (open world: "not" must itself be known). A
statement is true when its literal follows, false when the opposite one does, else unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ANY = "?"
"""The subject of a rule about everyone."""
_ENTITY = r"(?:the (?:bald )?[a-z]+|[A-Z][a-z]+)"
"""A name, or an animal; the data set has one animal of two words."""
_COPULA = re.compile(r"(?:is|are) (not )?([a-z]+)")
_VERB = re.compile(rf"(?:(?:does|do) (not) )?([a-z]+?)s? ({_ENTITY})")
_SUBJECT = re.compile(rf"(someone|something|they|it|{_ENTITY}) (.+)")
_RULE = re.compile(r"If (.+?) then (.+)")
_GENERAL = re.compile(r"(?:all )?([a-z]+(?:, [a-z]+)*) (?:people|things) are (not )?([a-z]+)", re.IGNORECASE)
_SENTENCE = re.compile(r"[^.]+\.")

Literal = tuple[str, str, str, bool]


@dataclass(frozen=True)
class Theory:
    """Facts and rules; `unread` sentences were not of the grammar."""

    facts: frozenset[Literal]
    rules: tuple[tuple[tuple[Literal, ...], Literal], ...]
    unread: int


def sentences(text: str) -> list[str]:
    """The sentences, with their full stop."""
    return [found.strip() for found in _SENTENCE.findall(text)]


def _lowered(text: str) -> str:
    """The sentence with its first word in lower case where that is an article."""
    return "the " + text[4:] if text.startswith("The ") else text


def _literal(text: str, pronoun: str = "") -> Literal | None:
    """One statement; `pronoun` is what "it", "they", "someone" and "something" stand for."""
    found = _SUBJECT.fullmatch(_lowered(text))
    if found is None:
        return None
    subject, rest = found[1], found[2]
    if subject in ("someone", "something", "they", "it"):
        if not pronoun:
            return None
        subject = pronoun
    if copula := _COPULA.fullmatch(rest):
        return subject, "is", copula[2], copula[1] is None
    if verb := _VERB.fullmatch(rest):
        return subject, verb[2], verb[3], verb[1] is None
    return None


def _conditions(text: str) -> tuple[Literal, ...] | None:
    """The conditions of a rule; "is quiet and not cold" shares its subject."""
    found: list[Literal] = []
    for part in text.split(" and "):
        literal = _literal(part, ANY)
        if literal is None and found and (short := re.fullmatch(r"(not )?([a-z]+)", part)):
            literal = found[-1][0], "is", short[2], short[1] is None
        if literal is None:
            return None
        found.append(literal)
    return tuple(found)


def _rule(text: str) -> tuple[tuple[Literal, ...], Literal] | None:
    if found := _RULE.fullmatch(text):
        conditions = _conditions(found[1])
        conclusion = _literal(found[2], ANY)
        return None if conditions is None or conclusion is None else (conditions, conclusion)
    if found := _GENERAL.fullmatch(text):
        words = found[1].lower().split(", ")
        return tuple((ANY, "is", word, True) for word in words), (ANY, "is", found[3], found[2] is None)
    return None


def read(text: str) -> Theory:
    """Parse a context; never raises."""
    facts: set[Literal] = set()
    rules: list[tuple[tuple[Literal, ...], Literal]] = []
    unread = 0
    for sentence in sentences(text):
        body = sentence[:-1].strip()
        if rule := _rule(body):
            rules.append(rule)
        elif fact := _literal(body):
            facts.add(fact)
        else:
            unread += 1
    return Theory(frozenset(facts), tuple(rules), unread)


def _bound(literal: Literal, subject: str) -> Literal:
    return (subject, *literal[1:]) if literal[0] == ANY else literal


def closure(theory: Theory) -> frozenset[Literal]:
    """All that follows."""
    known = set(theory.facts)
    while True:
        subjects = {literal[0] for literal in known} | {
            literal[2] for literal in known if literal[2].startswith("the ") or literal[2][:1].isupper()
        }
        new = {
            _bound(conclusion, subject)
            for conditions, conclusion in theory.rules
            for subject in subjects
            if all(_bound(condition, subject) in known for condition in conditions)
        }
        if new <= known:
            return frozenset(known)
        known |= new


def answer(context: str, statement: str) -> str:
    """A when the statement follows, B when its opposite does, else C."""
    asked = _literal(statement.strip().rstrip("."))
    if asked is None:
        raise ValueError(f"the statement is not of the grammar: {statement!r}")
    known = closure(read(context))
    if asked in known:
        return "A"
    return "B" if (*asked[:3], not asked[3]) in known else "C"


def statement_of(item: Mapping[str, str]) -> str:
    """The statement in question, without the question around it."""
    return item["question"].split("? ", 1)[1]


def accuracy(items: Sequence[Mapping[str, str]], contexts: Sequence[str]) -> list[float]:
    """1.0 for each item that is answered with its label from the given context."""
    return [
        float(answer(context, statement_of(item)) == item["answer"])
        for item, context in zip(items, contexts, strict=True)
    ]
