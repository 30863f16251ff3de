"""Tasks of rule theories (RuleTaker arXiv 2002.05867, ProofWriter arXiv 2012.13048), from our own words and sampler.

Questions are balanced so that their words do not tell the answer: with either sign of the question every answer that
can occur is as frequent as with the other, and nothing is asked that does not stand close to something provable (an
unprovable question is a provable one with its name or its attribute exchanged).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from agentopt.errors import UserError
from agentopt.evaluation._draws import seeded
from agentopt.weights.fold._types import FoldTask, Question, options_from
from agentopt.weights.fold.worlds._asking import Asked, kinds, plan, single
from agentopt.weights.fold.worlds._chaining import NotStratified, Solution, solve
from agentopt.weights.fold.worlds._logic import Clause, Literal, Theory
from agentopt.weights.fold.worlds._options import RuleOptions, Words, both, checked_count
from agentopt.weights.fold.worlds._render import Writer
from agentopt.weights.fold.worlds._theories import Sampler, theory

_TRIES = 200


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
    solution, asked = _drawn(draw, words[relations], options)
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


def _drawn(draw: random.Random, words: Words, options: RuleOptions) -> tuple[Solution, list[Asked]]:
    """A theory and what is asked of it; with a number of distractors, what is left of it around one question."""
    number = draw.randint(*both(options.distractors)) if options.distractors != "all" else 0
    # The kind is drawn once: drawing it anew would favour what is easier to find.
    kind = draw.choice(kinds(options))
    for _ in range(_TRIES):
        sampler, solution = theory(draw, words, options)
        if options.distractors == "all":
            asked = plan(draw, solution, options)
            if asked:
                return solution, asked
        elif (one := single(draw, solution, options, kind)) is not None:
            cut = _cut(draw, sampler, solution, one, number)
            if cut is not None:
                return cut, [one]
    raise UserError(
        f"worlds.rules: found no question with {number} distractors in {_TRIES} theories; allow more words, facts or "
        "rules, or ask for fewer distractors."
    )


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


def _cut(draw: random.Random, sampler: Sampler, whole: Solution, asked: Asked, distractors: int) -> Solution | None:
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
