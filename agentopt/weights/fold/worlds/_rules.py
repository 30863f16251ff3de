"""Tasks of rule theories (RuleTaker arXiv 2002.05867, ProofWriter arXiv 2012.13048), from our own words and sampler.

Questions are balanced so that their words do not tell the answer: with either sign of the question every answer that
can occur is as frequent as with the other, and nothing is asked that does not stand close to something provable (an
unprovable question is a provable one with its name or its attribute exchanged).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentopt.evaluation._draws import seeded
from agentopt.weights.fold._types import FoldTask, Question, options_from
from agentopt.weights.fold.worlds._chaining import NotStratified, Solution, solve
from agentopt.weights.fold.worlds._logic import IS, Clause, Literal, Theory
from agentopt.weights.fold.worlds._options import RuleOptions, Words, both, checked_count
from agentopt.weights.fold.worlds._render import Writer
from agentopt.weights.fold.worlds._theories import Sampler, theory


@dataclass(frozen=True, slots=True)
class _Asked:
    """A literal to be asked; `near` is the provable one that an unprovable question was made from."""

    literal: Literal
    near: Literal


def rules(count: int, *, seed: int, options: RuleOptions | None = None, **fields: Any) -> list[FoldTask]:
    """Knowledge bases of facts and rules with true, false and (open world) unknown questions.

    Args:
        count: how many tasks.
        seed: task i of a seed is the same however many are asked for.
        options: see `RuleOptions`.
        fields: its fields by name: depth, world, negation, kind, distractors, style, ...

    Raises:
        UserError: an unknown option or a value out of range.
    """
    given = {} if options is None else options.model_dump()
    chosen = options_from(RuleOptions, {**given, **fields}, "worlds.rules")
    words = {form: chosen.vocabulary(relations=form) for form in _forms(chosen)}
    return [_task(index, seed, chosen, words) for index in range(checked_count(count, "worlds.rules"))]


def _forms(options: RuleOptions) -> tuple[bool, ...]:
    return {"attributes": (False,), "relations": (True,), "mixed": (False, True)}[options.kind]


def _task(index: int, seed: int, options: RuleOptions, words: dict[bool, Words]) -> FoldTask:
    draw = seeded("worlds.rules", seed, index)
    relations = draw.choice(tuple(words))
    while True:
        sampler, solution = theory(draw, words[relations], options)
        asked = _plan(draw, solution, options)
        if not asked:
            continue
        if options.distractors == "all":
            break
        asked = [_one(draw, solution, asked)]
        cut = _cut(draw, sampler, solution, asked[0], draw.randint(*both(options.distractors)))
        if cut is not None:
            solution = cut
            break
    writer = Writer(options.style, options.templates, people=not relations)
    order = list(range(len(solution.theory.clauses)))
    if options.shuffle:
        draw.shuffle(order)
    elif options.distractors != "all":
        first = solution.proof(asked[0].literal)
        order = [*first, *(place for place in order if place not in first)]
    facts = tuple(writer.statement(solution.theory.clauses[place], draw) for place in order)
    where = {place: position for position, place in enumerate(order)}
    questions = tuple(_question(item.literal, solution, where, writer, draw, options) for item in asked)
    meta = {
        "generator": "rules",
        "world": options.world,
        "depth": options.depth,
        "kind": "relations" if relations else "attributes",
        "style": options.style,
        "words": list(options.words),
        "logic": [solution.theory.clauses[place].record() for place in order],
    }
    return FoldTask(f"rules-{seed}-{index}", facts, questions, meta)


def _question(
    literal: Literal,
    solution: Solution,
    where: dict[int, int],
    writer: Writer,
    draw: random.Random,
    options: RuleOptions,
) -> Question:
    proof = tuple(where[place] for place in solution.proof(literal))
    if options.proof == "goal-first":
        proof = proof[::-1]
    answer = options.words[{True: 0, False: 1, None: 2}[solution.truth(literal)]]
    return Question(writer.question(literal, draw), answer, proof, solution.depth(literal), choices(options))


def choices(options: RuleOptions) -> tuple[str, ...]:
    """The answers that questions of these options may have."""
    yes, no, unknown = options.words
    if options.world == "closed":
        return yes, no
    settled = (yes, no) if options.negated or options.negation else (yes,)
    return (*settled, unknown) if options.unknown or len(settled) == 1 else settled


def _plan(draw: random.Random, solution: Solution, options: RuleOptions) -> list[_Asked]:
    """What is asked of a theory, in random order; empty when nothing provable has a wanted depth."""
    wanted = range(options.depth + 1) if options.depths is None else options.depths
    proved = [(literal, depth) for literal, depth in solution.derived().items() if depth in wanted]
    positive = _spread(draw, [pair for pair in proved if pair[0].positive])
    negative = _spread(draw, [pair for pair in proved if not pair[0].positive])
    groups = 2 if not negative or options.world == "closed" or not options.unknown else 3
    share = options.questions // groups + (draw.randrange(groups) < options.questions % groups)
    if options.questions < groups:
        share = 1
    if options.world == "closed":
        negative = []
    signs = (True, False) if options.negated else (True,)
    asked = _signed(draw, positive, share, signs) + _signed(draw, negative, share, signs)
    if not asked:
        return []
    most = max(_count(asked, positive), _count(asked, negative))
    found = [_Asked(literal, literal) for literal in asked]
    if options.unknown or options.world == "closed":
        found += _unproved(draw, solution, [*positive, *negative], most, signs)
    draw.shuffle(found)
    return found[: options.questions]


def _one(draw: random.Random, solution: Solution, asked: list[_Asked]) -> _Asked:
    """One of the questions: its sign and answer as frequent as among all, its depth any that they have."""
    first = draw.choice(asked)
    sign, truth = first.literal.positive, solution.truth(first.literal)
    alike: dict[int | None, list[_Asked]] = {}
    for item in asked:
        if item.literal.positive == sign and solution.truth(item.literal) == truth:
            alike.setdefault(solution.depth(item.literal), []).append(item)
    depth = solution.depth(first.literal)
    # Absent and provable literals may have the same answer in a closed world: keep their shares.
    depths = [other for other in alike if (other is None) == (depth is None)]
    return draw.choice(alike[draw.choice(depths)])


def _count(asked: Sequence[Literal], pool: Sequence[Literal]) -> int:
    atoms = {literal[:3] for literal in pool}
    return sum(literal[:3] in atoms for literal in asked)


def _spread(draw: random.Random, proved: list[tuple[Literal, int]]) -> list[Literal]:
    """The literals with the depths taking turns."""
    draw.shuffle(proved)
    by_depth: dict[int, list[Literal]] = {}
    for literal, depth in proved:
        by_depth.setdefault(depth, []).append(literal)
    lists = list(by_depth.values())
    draw.shuffle(lists)
    turns = itertools.zip_longest(*lists)
    return [literal for turn in turns for literal in turn if literal is not None]


def _signed(draw: random.Random, pool: list[Literal], count: int, signs: tuple[bool, ...]) -> list[Literal]:
    """The first of a pool as they are or negated, in equal numbers; each in both signs when there are too few."""
    flips = [bool(place % 2) for place in range(min(count, len(pool)))]
    if count % 2 and draw.random() < 0.5:
        flips = [not flip for flip in flips]
    first = [literal.opposite() if flip else literal for literal, flip in zip(pool, flips, strict=False)]
    if len(signs) == 1:
        return [literal if literal.positive else literal.opposite() for literal in first]
    return first + [literal.opposite() for literal in first[: count - len(first)]]


def _unproved(
    draw: random.Random, solution: Solution, near: list[Literal], count: int, signs: tuple[bool, ...]
) -> list[_Asked]:
    """Questions nothing proves: provable literals with the name or the attribute exchanged."""
    names = list(dict.fromkeys(solution.theory.entities()))
    literals = [part for clause in solution.theory.clauses for part in (clause.head, *clause.body)]
    same = {verb == IS: [part for part in literals if (part.verb == IS) == (verb == IS)] for verb in (IS, "")}
    found: dict[Literal, _Asked] = {}
    offset = draw.randrange(2)
    for _ in range(12 * count):
        if len(found) >= count:
            break
        source = draw.choice(near)
        sign = signs[(len(found) + offset) % len(signs)]
        other = draw.choice(same[source.verb == IS])
        if draw.random() < 0.5:
            literal = Literal(draw.choice(names), source.verb, source.object, sign)
        else:
            literal = Literal(source.subject, other.verb, other.object, sign)
        if solution.depth(literal) is None and literal not in found:
            found[literal] = _Asked(literal, source)
    return list(found.values())


def _cut(draw: random.Random, sampler: Sampler, whole: Solution, asked: _Asked, distractors: int) -> Solution | None:
    """The proof (of the near literal, when nothing proves what is asked) and exactly so many other statements."""
    clauses = whole.theory.clauses
    keep = whole.proof(asked.near)
    others = [place for place in range(len(clauses)) if place not in keep]
    draw.shuffle(others)
    chosen = [clauses[place] for place in (*keep, *others[:distractors])]
    tries = 0
    while len(chosen) < len(keep) + distractors:
        tries += 1
        if tries > 20 * distractors + 20:
            return None
        more = Clause(sampler.fact()) if draw.random() < 0.5 else sampler.rule()
        if more not in chosen and _same(whole, [*chosen, more], asked.literal) is not None:
            chosen.append(more)
    return _same(whole, chosen, asked.literal)


def _same(whole: Solution, clauses: Sequence[Clause], asked: Literal) -> Solution | None:
    """The smaller (or other) theory solved; None when the question has another answer or depth in it."""
    try:
        solution = solve(Theory(tuple(clauses), whole.theory.world))
    except NotStratified:
        return None
    unchanged = solution.truth(asked) == whole.truth(asked) and solution.depth(asked) == whole.depth(asked)
    if not unchanged or solution.contradictory or solution.deepest > whole.deepest:
        return None
    # The proof must stay as long as it was, or the number of distractors would be another.
    return solution if len(solution.proof(asked)) == len(whole.proof(asked)) else None
