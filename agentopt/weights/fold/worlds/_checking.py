"""Re-solves tasks from their text alone: parsed again, by the second solver, with every proof checked step by step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from agentopt.errors import UserError
from agentopt.weights.fold._types import FoldTask, Question
from agentopt.weights.fold.worlds._logic import ANY, IS, Literal, Theory, clause_of
from agentopt.weights.fold.worlds._parsing import parse_statement, parse_theory
from agentopt.weights.fold.worlds._relations import NEUTRAL, WORDS, closure
from agentopt.weights.fold.worlds._second import BackwardChainer, is_proof

_ROLES = {kind: (role, place == 0) for role, pair in WORDS.items() for place, kind in enumerate(pair)}
_KIN = (
    re.compile(r"(?P<b>\w+) is (?:the )?(?P<kind>[a-z-]+) of (?P<a>\w+)\.?"),
    re.compile(r"(?P<a>\w+) has an? (?P<kind>[a-z-]+) called (?P<b>\w+)\."),
    re.compile(r"(?P<b>\w+) is (?P<a>\w+)'s (?P<kind>[a-z-]+)\."),
    re.compile(r"(?P<a>\w+) has (?P<kind>[a-z-]+) (?P<b>\w+)"),
)
END = re.compile(r"What is (\w+) in the end\?|(\w+) is")
"""The question for the end of a chain."""
_WHOM = (re.compile(r"How is (?P<b>\w+) related to (?P<a>\w+)\?"), re.compile(r"what is (?P<b>\w+) to (?P<a>\w+)"))


@dataclass(frozen=True, slots=True)
class Checked:
    """How many questions were solved again and where the two solutions differ."""

    tasks: int
    questions: int
    proofs: int
    disagreements: tuple[str, ...]
    """One sentence each: the task, the question, what was claimed and what was found."""


def check(tasks: Iterable[FoldTask]) -> Checked:
    """Solve generated tasks again from their sentences: answers, depths, proofs, and that no answer is ambiguous.

    Raises:
        UserError: a task that no generator of this room made.
    """
    count = questions = proofs = 0
    wrong: list[str] = []
    for task in tasks:
        count += 1
        kind = task.meta.get("generator")
        if kind not in ("rules", "chains", "kinship"):
            raise UserError(f"task {task.id}: it is not made by worlds.rules, worlds.chains or worlds.kinship.")
        found = _kinship(task) if kind == "kinship" else _theory(task)
        questions += len(task.questions)
        proofs += sum(bool(question.relevant) for question in task.questions)
        wrong += [f"{task.id}: {fault}" for fault in found]
    return Checked(count, questions, proofs, tuple(wrong))


def _theory(task: FoldTask) -> list[str]:
    clauses = [clause_of(record) for record in task.meta["logic"]]
    names = {literal.subject for clause in clauses for literal in (clause.head, *clause.body)} - {ANY}
    theory = parse_theory(task.facts, world=task.meta["world"], names=sorted(names))
    judge = BackwardChainer(theory)
    faults: list[str] = []
    for question in task.questions:
        literal = asked_literal(question)
        answer = question.answer
        truth = judge.truth(literal)
        claimed = True if END.fullmatch(question.text) else _claimed(question, task)
        if truth is not claimed:
            faults.append(f"{question.text!r} is answered {answer!r}, the second solver says {truth}")
        faults += _proof_faults(question, theory, judge, literal)
        if END.fullmatch(question.text) and not _is_end(question, theory, judge, literal):
            faults.append(f"{question.text!r}: {answer!r} is not the only end of a chain")
    return faults


def _is_end(question: Question, theory: Theory, judge: BackwardChainer, literal: Literal) -> bool:
    """Whether as many attributes are proved as the chain is long, and none deeper than the answer."""
    attributes = {clause.head.object for clause in theory.clauses}
    depths = [judge.depth(literal._replace(object=attribute)) for attribute in sorted(attributes)]
    proved = sorted(depth for depth in depths if depth is not None)
    return proved == list(range((question.depth or 0) + 1))


def _claimed(question: Question, task: FoldTask) -> bool | None:
    return (True, False, None)[list(task.meta["words"]).index(question.answer)]


def asked_literal(question: Question) -> Literal:
    """What a question is about: its statement, or "the end is the answer" when the end of a chain is asked.

    Raises:
        UserError: it holds no statement.
    """
    if found := END.fullmatch(question.text):
        return Literal(found[1] or found[2], IS, question.answer)
    return parse_statement(question.text)


def _proof_faults(question: Question, theory: Theory, judge: BackwardChainer, literal: Literal) -> list[str]:
    depths = [judge.depth(side) for side in (literal, literal.opposite())]
    depth = next((found for found in depths if found is not None), None)
    if theory.world == "closed":
        depth = judge.depth(literal._replace(positive=True))
    faults: list[str] = []
    if depth != question.depth:
        faults.append(f"{question.text!r} has depth {question.depth}, the second solver says {depth}")
    if not question.relevant:
        return faults if depth is None else [*faults, f"{question.text!r} has no proof"]
    order = question.relevant
    sides = (literal, literal.opposite())
    if not any(is_proof(theory, side, places) for side in sides for places in (order, order[::-1])):
        faults.append(f"{question.text!r}: statements {list(order)} are no proof")
    return faults


def _kinship(task: FoldTask) -> list[str]:
    edges = [_edge(fact) for fact in task.facts]
    women = {b: woman for _, (_, woman), b in edges}
    known = closure((a, role, b) for a, (role, _), b in edges)
    faults: list[str] = []
    for question in task.questions:
        a, b = whom(question)
        roles = known.get((a, b), set())
        words = {WORDS[role][not women[b]] for role in roles} | {NEUTRAL[role] for role in roles}
        if len(roles) != 1 or question.answer not in words:
            faults.append(f"{question.text!r} is answered {question.answer!r}, the story says {sorted(roles)}")
        if not _is_path([edges[place] for place in question.relevant], a, b) or question.depth != len(
            question.relevant
        ):
            faults.append(f"{question.text!r}: statements {list(question.relevant)} are no path")
    return faults


def _edge(fact: str) -> tuple[str, tuple[str, bool], str]:
    for form in _KIN:
        found = form.fullmatch(fact)
        if found and found["kind"] in _ROLES:
            return found["a"], _ROLES[found["kind"]], found["b"]
    raise UserError(f"{fact!r} is no statement about relatives.")


def whom(question: Question) -> tuple[str, str]:
    """The two people of a question, the one whose relative is asked for first."""
    for form in _WHOM:
        if found := form.fullmatch(question.text):
            return found["a"], found["b"]
    raise UserError(f"{question.text!r} is no question about relatives.")


def _is_path(edges: Sequence[tuple[str, tuple[str, bool], str]], a: str, b: str) -> bool:
    here = a
    for source, _, target in edges:
        if source != here:
            return False
        here = target
    return here == b
