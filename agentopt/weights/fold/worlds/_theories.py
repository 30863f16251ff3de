"""Draws rule theories: a chain of rules of the wanted depth, then further facts and rules around it.

Without the chain most drawn theories would be too shallow. Whether the whole has the wanted depth, and whether anything
in it is contradicted, is for the chainer to say: what fails is drawn again.
"""

from __future__ import annotations

import random

from agentopt.errors import UserError
from agentopt.weights.fold.worlds._chaining import NotStratified, Solution, solve
from agentopt.weights.fold.worlds._logic import ANY, IS, Clause, Literal, Theory
from agentopt.weights.fold.worlds._options import Range, RuleOptions, Words

_TRIES = 2000
_ATTRIBUTE_SHARE = 0.3  # of literals in theories about relations
_NEGATIVE_SHARE = 0.2
_CONSTANT_SHARE = 0.2  # of subjects in rules


class Sampler:
    """Draws the parts of one theory."""

    def __init__(self, draw: random.Random, words: Words, options: RuleOptions) -> None:
        self.draw, self.options = draw, options
        low, high = options.people
        count = min(draw.randint(low, high), len(words.names))
        self.names = draw.sample(words.names, max(count, min(2, len(words.names))) if words.verbs else count)
        # Few attributes, or rules would rarely meet.
        self.rule_count = draw.randint(max(options.rules[0], options.depth), options.rules[1])
        wanted = max(4, self.rule_count + 2) if not words.verbs else 3
        self.attributes = draw.sample(words.attributes, min(len(words.attributes), wanted))
        self.verbs = draw.sample(words.verbs, min(len(words.verbs), 3))
        self._strong = options.negation and options.world == "open"
        self._failure = options.negation and options.world == "closed"

    def literal(self, subject: str, *, sign: bool = False) -> Literal:
        """A random statement about a subject; `sign` allows a negative one."""
        draw = self.draw
        positive = not (sign and draw.random() < _NEGATIVE_SHARE)
        if self.verbs and draw.random() >= _ATTRIBUTE_SHARE:
            return Literal(subject, draw.choice(self.verbs), draw.choice(self.names), positive)
        return Literal(subject, IS, draw.choice(self.attributes), positive)

    def fact(self) -> Literal:
        """A random fact."""
        return self.literal(self.draw.choice(self.names), sign=self._strong)

    def rule(self) -> Clause:
        """A random rule: every subject after the first has been named in it before."""
        draw = self.draw
        first = ANY if draw.random() >= _CONSTANT_SHARE else draw.choice(self.names)
        body = [self.literal(first, sign=self._strong)]
        for _ in range(draw.randint(*self.options.body) - 1):
            body.append(self.literal(self._subject(body), sign=self._strong or self._failure))
        return Clause(self.literal(self._subject(body), sign=self._strong), tuple(body))

    def _subject(self, body: list[Literal]) -> str:
        """The variable when there is one, or an object that was named."""
        subjects = [literal.subject for literal in body]
        objects = [literal.object for literal in body if literal.verb != IS]
        if objects and self.draw.random() < 0.3:
            return self.draw.choice(objects)
        return subjects[0]

    def backbone(self, most: int) -> tuple[list[Literal], list[Clause]]:
        """Facts (at most so many) and rules that lead from them to a literal of the wanted depth."""
        draw = self.draw
        current = self.fact()
        known = {current[:3]: current}
        facts, rules = [current], list[Clause]()
        for _ in range(self.options.depth):
            subject = current.subject
            variable = draw.random() >= _CONSTANT_SHARE
            body = [current]
            for _ in range(draw.randint(*self.options.body) - 1):
                extra = self._support(subject, known, facts, most)
                if extra is not None and extra not in body:
                    body.append(extra)
            draw.shuffle(body)
            target = subject
            if current.verb != IS and draw.random() < 0.3:
                target = current.object
            head = self._new(target, known)
            if head is None:
                break
            general = [Literal(ANY, *part[1:]) if variable and part.subject == subject else part for part in body]
            lifted = Literal(ANY, *head[1:]) if variable and target == subject else head
            rules.append(Clause(lifted, tuple(general)))
            current = known[head[:3]] = head
        return facts, rules

    def _support(
        self, subject: str, known: dict[tuple[str, str, str], Literal], facts: list[Literal], most: int
    ) -> Literal | None:
        """A second condition: something absent, something known of the subject, or a new fact about it."""
        if self._failure and self.draw.random() < _NEGATIVE_SHARE:
            absent = self._new(subject, known)
            return None if absent is None else Literal(absent.subject, absent.verb, absent.object, False)
        about = [literal for literal in known.values() if literal.subject == subject]
        if len(facts) < most and self.draw.random() < 0.5:
            new = self._new(subject, known)
            if new is not None:
                known[new[:3]] = new
                facts.append(new)
                return new
        return self.draw.choice(about) if about else None

    def _new(self, subject: str, known: dict[tuple[str, str, str], Literal]) -> Literal | None:
        for _ in range(8):
            found = self.literal(subject, sign=self._strong)
            if found[:3] not in known:
                return found
        return None


def theory(draw: random.Random, words: Words, options: RuleOptions) -> tuple[Sampler, Solution]:
    """A theory of the wanted depth that does not contradict itself, and all that follows from it.

    Raises:
        UserError: none was found in many attempts.
    """
    for _ in range(_TRIES):
        sampler = Sampler(draw, words, options)
        found = _attempt(sampler, options)
        if found is not None:
            return sampler, found
    raise UserError(
        f"worlds.rules: found no theory of depth {options.depth} with {len(words.names)} names, "
        f"{len(words.attributes)} attributes, {_span(options.facts)} facts and {_span(options.rules)} rules; allow "
        "more words, facts or rules."
    )


def _span(given: Range) -> str:
    return f"{given[0]} to {given[1]}"


def _attempt(sampler: Sampler, options: RuleOptions) -> Solution | None:
    draw = sampler.draw
    count = draw.randint(*options.facts)
    facts, rules = sampler.backbone(count)
    if len(rules) < options.depth or (options.unique_heads and len({_goal(rule) for rule in rules}) < len(rules)):
        return None
    kept = dict.fromkeys(facts)
    for _ in range(4 * count):
        if len(kept) >= count:
            break
        fact = sampler.fact()
        if fact.opposite() not in kept:
            kept[fact] = None
    clauses = [Clause(fact) for fact in kept]
    if len(clauses) < options.facts[0]:
        return None
    solution = _accepted([*clauses, *rules], options, len(rules))
    while solution is not None and len(rules) < sampler.rule_count:
        for _ in range(8):
            rule = sampler.rule()
            if rule.head in rule.body or rule.head.opposite() in rule.body or len(set(rule.body)) < len(rule.body):
                continue
            if options.unique_heads and _goal(rule) in {_goal(other) for other in rules}:
                continue
            wider = None if rule in rules else _accepted([*clauses, *rules, rule], options, len(rules) + 1)
            if wider is not None:
                rules.append(rule)
                solution = wider
                break
        else:
            return None
    return solution


def _goal(rule: Clause) -> tuple[str, str]:
    return rule.head.verb, rule.head.object


def _accepted(clauses: list[Clause], options: RuleOptions, rules: int) -> Solution | None:
    try:
        solution = solve(Theory(tuple(clauses), options.world))
    except NotStratified:
        return None
    return None if solution.contradictory or solution.deepest != options.depth else solution
