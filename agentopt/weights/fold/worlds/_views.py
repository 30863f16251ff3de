"""Smaller and larger views of a task: one question with its relevant facts and a chosen number of others."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from typing import Literal as OneOf

from agentopt.errors import UserError
from agentopt.evaluation._draws import seeded
from agentopt.weights.fold._types import FoldTask, Question
from agentopt.weights.fold.worlds._chaining import NotStratified, Solution, solve
from agentopt.weights.fold.worlds._checking import END, asked_literal, whom
from agentopt.weights.fold.worlds._logic import Clause, Literal, Theory, clause_of
from agentopt.weights.fold.worlds._parsing import parse_theory
from agentopt.weights.fold.worlds._relations import closure

_Fits = Callable[[Sequence["_Fact"]], bool]
_Fact = tuple[str, Any]
"""A sentence and its record; None when it has none."""


def with_distractors(
    task: FoldTask,
    question: int,
    n: int | OneOf["all"],
    *,
    seed: int,
    pool: Sequence[FoldTask] = (),
    shuffle: bool = True,
) -> FoldTask:
    """The task with one of its questions, the facts that are relevant to it, and exactly `n` others.

    Distractors are the task's own other facts; when there are too few, facts of the tasks in `pool` are added. Rule
    theories and kinship are solved again: whatever would change the answer is left out. Facts of other tasks, which
    nothing here can solve, are added only when they share no longer word with the question. A question without
    relevant facts keeps as many facts as its neighbours need on average, and `n` more.

    Args:
        task: the whole knowledge base.
        question: which question, from 0.
        n: how many distractors; "all" for all of the task's own.
        seed: which distractors, and the order of the facts.
        pool: tasks to take more from; their world should be made of the same words.
        shuffle: all facts in random order; otherwise the relevant ones come first.

    Raises:
        UserError: there is no such question, or there are not so many facts that leave its answer as it is.
    """
    if not 0 <= question < len(task.questions):
        raise UserError(f"task {task.id}: question {question} of {len(task.questions)}, numbered from 0.")
    if n != "all" and n < 0:
        raise UserError(f"task {task.id}: n is {n}, expected 0 or more distractors.")
    draw = seeded("worlds.views", seed, task.id, question)
    asked = task.questions[question]
    facts = _facts(task)
    others = [place for place in range(len(facts)) if place not in asked.relevant]
    if n != "all":
        draw.shuffle(others)
    wanted = len(others) if n == "all" else n + (0 if asked.relevant else _typical(task))
    kept: list[_Fact] = [facts[place] for place in asked.relevant]
    fits = _judge(task, asked, facts)
    for fact in [facts[place] for place in others] + _strangers(draw, task, pool):
        if len(kept) == len(asked.relevant) + wanted:
            break
        if fact not in kept and (n == "all" or fits([*kept, fact])):
            kept.append(fact)
    if len(kept) < len(asked.relevant) + wanted:
        raise UserError(
            f"task {task.id}: {len(kept) - len(asked.relevant)} facts leave the answer to question {question} as it "
            f"is, {wanted} are asked for; give more tasks in pool."
        )
    order = list(range(len(kept)))
    if shuffle:
        draw.shuffle(order)
    relevant = tuple(order.index(place) for place in range(len(asked.relevant)))
    meta = {name: value for name, value in task.meta.items() if name != "logic"} | {"of": task.id, "distractors": n}
    if "logic" in task.meta:
        meta["logic"] = [kept[place][1] for place in order]
    return FoldTask(
        f"{task.id}/{question}+{n}",
        tuple(kept[place][0] for place in order),
        (replace(asked, relevant=relevant),),
        meta,
    )


def _facts(task: FoldTask) -> list[_Fact]:
    records = task.meta.get("logic") or [None] * len(task.facts)
    return list(zip(task.facts, records, strict=True))


def _typical(task: FoldTask) -> int:
    sizes = [len(one.relevant) for one in task.questions if one.relevant]
    return max(1, round(sum(sizes) / len(sizes))) if sizes else 1


def _strangers(draw: Any, task: FoldTask, pool: Sequence[FoldTask]) -> list[_Fact]:
    """Facts of other tasks of the same kind, in random order."""
    solvable = "logic" in task.meta
    found = [
        fact
        for other in pool
        if other.id != task.id and ("logic" in other.meta) == solvable
        for fact in _facts(other)
        if fact[0] not in task.facts
    ]
    draw.shuffle(found)
    return found


def _judge(task: FoldTask, asked: Question, facts: list[_Fact]) -> _Fits:
    """Whether a set of facts leaves the answer, its depth and its proof's length as they are."""
    if task.meta.get("generator") == "kinship":
        return _family_judge(asked)
    try:
        literal, theory = _read(task, asked, facts)
    except UserError:
        return _word_judge(asked, frozenset(task.facts))
    whole = solve(theory)
    # The last attribute of a chain stays the last one only while nothing more follows.
    about = _about(whole, literal.subject) if END.fullmatch(asked.text) else None

    def fits(kept: Sequence[_Fact]) -> bool:
        try:
            found = solve(Theory(_clauses(task, kept), theory.world))
        except (NotStratified, UserError):
            return False
        if found.contradictory or found.truth(literal) is not whole.truth(literal):
            return False
        if about is not None and _about(found, literal.subject) != about:
            return False
        depth = found.depth(literal)
        return depth == whole.depth(literal) and (
            not asked.relevant or len(found.proof(literal)) == len(asked.relevant)
        )

    return fits


def _about(solution: Solution, name: str) -> set[Literal]:
    return {literal for literal in solution.derived() if literal.subject == name}


def _read(task: FoldTask, asked: Question, facts: list[_Fact]) -> tuple[Literal, Theory]:
    world = task.meta.get("world", "open")
    literal = asked_literal(asked)
    clauses = _clauses(task, facts)
    # The plain style is in lower case, the records are not.
    names = {name.lower(): name for name in Theory(clauses).entities()}
    subject, target = names.get(literal.subject.lower()), names.get(literal.object.lower(), literal.object)
    if subject is None:
        raise UserError("about nobody")
    return literal._replace(subject=subject, object=target), Theory(clauses, "closed" if world == "closed" else "open")


def _clauses(task: FoldTask, facts: Sequence[_Fact]) -> tuple[Clause, ...]:
    if "logic" in task.meta:
        return tuple(clause_of(record) for _, record in facts)
    return parse_theory([sentence for sentence, _ in facts]).clauses


def _family_judge(asked: Question) -> _Fits:
    a, b = (name.lower() for name in whom(asked))

    def fits(kept: Sequence[_Fact]) -> bool:
        women: dict[str, bool] = {}
        for _, (_, _, target, woman) in kept:
            if women.setdefault(target, woman) != woman:
                return False
        known = closure((str(one).lower(), str(role), str(other).lower()) for _, (one, role, other, _) in kept)
        return len(known.get((a, b), ())) == 1 and all(len(roles) == 1 for roles in known.values())

    return fits


def _word_judge(asked: Question, own: frozenset[str]) -> _Fits:
    words = set(re.findall(r"\w{4,}", asked.text.lower()))

    def fits(kept: Sequence[_Fact]) -> bool:
        sentence = kept[-1][0]
        return sentence in own or not words & set(re.findall(r"\w{4,}", sentence.lower()))

    return fits
