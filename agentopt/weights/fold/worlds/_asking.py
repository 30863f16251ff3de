"""Chooses what is asked of a theory, so that the words of a question do not tell its answer.

A question has a sign (a negated statement or not) and an answer. Statements that are proved are asked as they are and
negated in equal numbers; statements that nothing settles are asked with both signs in equal numbers, and there are as
many as there are proved ones of the more frequent sign. So with either sign no answer is more frequent than the most
frequent answer of all. What nothing settles stands close to something proved: its name or its attribute is exchanged.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from agentopt.weights.fold.worlds._chaining import Solution
from agentopt.weights.fold.worlds._logic import IS, Literal
from agentopt.weights.fold.worlds._options import RuleOptions

_ROUNDS = 12  # of attempts to exchange a name or an attribute in everything proved
Kind = tuple[bool, bool | None]
"""The sign of a question, and whether it is True, False or (None) not settled; in a closed world absent."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A literal to be asked; `near` is the proved one that a question without a proof was made from."""

    literal: Literal
    near: Literal


def kinds(options: RuleOptions) -> list[Kind]:
    """Which questions there are, each as likely as the others."""
    signs = (True, False) if options.negated else (True,)
    found: list[Kind] = []
    for sign in signs:
        found.append((sign, sign))
        if options.world == "open" and options.negation:
            found.append((sign, not sign))
        if options.world == "closed" or options.unknown:
            found.append((sign, None))
    return found


def single(draw: random.Random, solution: Solution, options: RuleOptions, kind: Kind) -> Asked | None:
    """One question of a kind, of any depth that this theory has."""
    sign, truth = kind
    proved = _proved(solution, options)
    if truth is None:
        found = _unproved(draw, solution, [literal for literal, _ in proved], 1, (sign,))
        return found[0] if found else None
    fitting = [pair for pair in proved if pair[0].positive == (sign == truth)]
    if not fitting:
        return None
    literal = _spread(draw, fitting)[0]
    return Asked(literal if truth else literal.opposite(), literal)


def plan(draw: random.Random, solution: Solution, options: RuleOptions) -> list[Asked]:
    """What is asked of a whole theory, in random order; empty when that cannot be balanced."""
    proved = _proved(solution, options)
    positive = _spread(draw, [pair for pair in proved if pair[0].positive])
    negative = _spread(draw, [pair for pair in proved if not pair[0].positive])
    signs = (True, False) if options.negated else (True,)
    rest = options.world == "closed" or options.unknown
    groups = (1 if not negative else 2) + rest
    share = max(1, options.questions // groups + (draw.randrange(groups) < options.questions % groups))
    open_ = _unproved(draw, solution, [*positive, *negative], share, signs) if rest else []
    # Without open questions both answers must come from proved statements, negative ones for every positive one.
    share = min(share, len(open_) if rest else len(signs) * min(len(positive), len(negative)))
    first, second = _signed(draw, positive, share, signs), _signed(draw, negative, share, signs)
    found = [Asked(literal, literal) for literal in (*first, *second)]
    found += open_[: max(len(first), len(second))]
    draw.shuffle(found)
    return found[: options.questions]


def _proved(solution: Solution, options: RuleOptions) -> list[tuple[Literal, int]]:
    wanted = range(options.depth + 1) if options.depths is None else options.depths
    return [(literal, depth) for literal, depth in solution.derived().items() if depth in wanted]


def _spread(draw: random.Random, proved: list[tuple[Literal, int]]) -> list[Literal]:
    """The literals with the depths taking turns."""
    draw.shuffle(proved)
    by_depth: dict[int, list[Literal]] = {}
    for literal, depth in proved:
        by_depth.setdefault(depth, []).append(literal)
    lists = [by_depth[depth] for depth in sorted(by_depth)]
    draw.shuffle(lists)
    turns = itertools.zip_longest(*lists)
    return [literal for turn in turns for literal in turn if literal is not None]


def _signed(draw: random.Random, pool: Sequence[Literal], count: int, signs: tuple[bool, ...]) -> list[Literal]:
    """The first of a pool as they are or negated, in equal numbers; with both signs when there are too few."""
    if len(signs) == 1:
        return [literal if literal.positive else literal.opposite() for literal in pool[:count]]
    turn = draw.randrange(2)
    first = [
        literal.opposite() if (place + turn) % 2 else literal for place, literal in enumerate(pool[: max(count, 0)])
    ]
    return first + [literal.opposite() for literal in first[: count - len(first)]]


def _unproved(
    draw: random.Random, solution: Solution, near: Sequence[Literal], count: int, signs: tuple[bool, ...]
) -> list[Asked]:
    """Questions that nothing proves, as near to something proved as there are."""
    names = solution.theory.entities()
    said = {part[1:3] for clause in solution.theory.clauses for part in (clause.head, *clause.body)}
    forms = {form: sorted(pair for pair in said if (pair[0] == IS) == form) for form in (True, False)}
    found: dict[Literal, Asked] = {}
    turn = draw.randrange(2)
    sources = draw.sample(near, len(near))
    for _ in range(_ROUNDS):
        for source in sources:
            if len(found) >= count:
                return list(found.values())
            sign = signs[(len(found) + turn) % len(signs)]
            other = draw.choice(forms[source.verb == IS])
            one = Literal(draw.choice(names), source.verb, source.object, sign)
            if draw.random() < 0.5:
                one = Literal(source.subject, *other, sign)
            if solution.depth(one) is None and one not in found:
                found[one] = Asked(one, source)
    return list(found.values())
