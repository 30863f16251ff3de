"""The smallest world: chains of one fact and single-condition rules, for models of a few thousand parameters.

"ada is brave", "brave is calm", "calm is shy": what is ada in the end? Every question of a task has the same depth and
exactly the same number of other statements around its chain.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

from agentopt.errors import UserError
from agentopt.evaluation._draws import seeded
from agentopt.weights.fold._types import FoldTask, Question, options_from
from agentopt.weights.fold.worlds._logic import ANY, IS, Clause, Literal
from agentopt.weights.fold.worlds._options import ChainOptions, Words, both, checked_count
from agentopt.weights.fold.worlds._render import Writer


def chains(count: int, *, seed: int, options: ChainOptions | None = None, **fields: Any) -> list[FoldTask]:
    """Knowledge bases made of chains.

    Args:
        count: how many tasks.
        seed: task i of a seed is the same however many are asked for.
        options: see `ChainOptions`.
        fields: its fields by name: depth, distractors, questions, ask, names, ...

    Raises:
        UserError: an unknown option, a value out of range, or words too few for so many statements.
    """
    given = {} if options is None else options.model_dump()
    chosen = options_from(ChainOptions, {**given, **fields}, "worlds.chains")
    words = chosen.vocabulary()
    _check_room(chosen, words)
    return [_task(index, seed, chosen, words) for index in range(checked_count(count, "worlds.chains"))]


def _check_room(options: ChainOptions, words: Words) -> None:
    deepest, asked = both(options.depth)[1], options.questions
    least = both(options.distractors)[0]
    if least < (asked - 1) * (deepest + 1):
        raise UserError(
            f"worlds.chains: {asked} questions of depth {deepest} are {(asked - 1) * (deepest + 1)} distractors to each"
            f" other, distractors is {least}; ask fewer questions or allow more distractors."
        )
    # A link that leads elsewhere needs a word of its own.
    broken = asked if options.ask == "statement" else 0
    wanted, people = asked * (deepest + 1) + broken, asked + broken * (both(options.depth)[0] == 0)
    if len(words.attributes) < wanted or len(words.names) < people:
        raise UserError(
            f"worlds.chains: {asked} chains of depth {deepest} need {wanted} attributes and {people} names; found "
            f"{len(words.attributes)} and {len(words.names)}."
        )


class _Web:
    """The statements of one task while they are drawn; no attribute leads to two others."""

    def __init__(self, draw: random.Random, words: Words) -> None:
        self.draw, self.words = draw, words
        self.names = draw.sample(words.names, len(words.names))
        self.fresh = draw.sample(words.attributes, len(words.attributes))
        self.after: dict[str, str] = {}
        self.ends: set[str] = set()
        self.clauses: dict[Clause, None] = {}

    def fact(self, name: str, attribute: str) -> Clause:
        clause = Clause(Literal(name, IS, attribute))
        self.clauses[clause] = None
        return clause

    def link(self, before: str, after: str) -> Clause:
        clause = Clause(Literal(ANY, IS, after), (Literal(ANY, IS, before),))
        self.clauses[clause] = None
        self.after[before] = after
        return clause

    def chain(self, depth: int) -> tuple[str, list[Clause], str]:
        """A whole chain of new words: name, statements, end."""
        name, path = self.names.pop(), [self.fresh.pop() for _ in range(depth + 1)]
        statements = [self.fact(name, path[0])]
        statements += [self.link(before, after) for before, after in itertools.pairwise(path)]
        self.ends.add(path[-1])
        return name, statements, path[-1]

    def broken(self, depth: int) -> tuple[str, str]:
        """A chain with one link that starts elsewhere: its name and its end, which do not meet."""
        name, path = self.names.pop(), [self.fresh.pop() for _ in range(depth + 1)]
        if depth == 0:
            self.fact(self.names.pop(), path[0])
            return name, path[0]
        self.fact(name, path[0])
        gap = self.draw.randrange(depth)
        for step, (before, after) in enumerate(itertools.pairwise(path)):
            self.link(self.fresh.pop() if step == gap else before, after)
        self.ends |= {path[gap], path[-1]}
        return name, path[-1]

    def more(self, size: int, depth: int) -> None:
        """Other statements until there are `size`: chains of new words while they last, then whatever changes nothing.

        Raises:
            UserError: there are too few words for so many.
        """
        asked_names = set(self.words.names) - set(self.names)
        while len(self.clauses) < size:
            left = size - len(self.clauses)
            if self.names and len(self.fresh) > depth and left > depth:
                _, _, end = self.chain(depth)
                self.ends.discard(end)
            elif not self._one(asked_names):
                raise UserError(
                    f"worlds.chains: {size} statements are more than {len(self.words.names)} names and "
                    f"{len(self.words.attributes)} attributes allow; give more words."
                )

    def _one(self, asked: set[str]) -> bool:
        """One more link or fact that no asked chain runs through."""
        draw, attributes = self.draw, self.words.attributes
        open_ = [word for word in attributes if word not in self.after and word not in self.ends]
        draw.shuffle(open_)
        if draw.random() < 0.75 or not self.names:
            for before in open_:
                after = draw.choice(attributes)
                if not self._reaches(after, before):
                    self.link(before, after)
                    return True
        if self.names:
            self.fact(self.names.pop(), draw.choice(attributes))
            return True
        others = [
            (name, word)
            for name in self.words.names
            if name not in asked
            for word in attributes
            if Clause(Literal(name, IS, word)) not in self.clauses
        ]
        if others:
            self.fact(*draw.choice(others))
        return bool(others)

    def _reaches(self, start: str, goal: str) -> bool:
        word: str | None = start
        while word is not None:
            if word == goal:
                return True
            word = self.after.get(word)
        return False


def _task(index: int, seed: int, options: ChainOptions, words: Words) -> FoldTask:
    draw = seeded("worlds.chains", seed, index)
    depth = draw.randint(*both(options.depth))
    distractors = draw.randint(*both(options.distractors))
    web = _Web(draw, words)
    asked: list[tuple[str, str, list[Clause]]] = []
    for _ in range(options.questions):
        if options.ask == "end" or draw.random() < 0.5:
            name, statements, end = web.chain(depth)
            asked.append((name, end, statements))
        elif asked and asked[-1][2] and draw.random() < 0.5:
            asked.append(_crossed(asked, web, depth))
        else:
            asked.append((*web.broken(depth), []))
    web.more(depth + 1 + distractors, depth)
    return _written(index, seed, options, words, draw, (web, asked, depth))


def _crossed(asked: list[tuple[str, str, list[Clause]]], web: _Web, depth: int) -> tuple[str, str, list[Clause]]:
    """A whole chain of its own, asked for the end of another one."""
    name, _, _ = web.chain(depth)
    return name, asked[-1][1], []


def _written(
    index: int,
    seed: int,
    options: ChainOptions,
    words: Words,
    draw: random.Random,
    found: tuple[_Web, list[tuple[str, str, list[Clause]]], int],
) -> FoldTask:
    web, asked, depth = found
    order = list(web.clauses)
    if options.shuffle:
        draw.shuffle(order)
    where = {clause: place for place, clause in enumerate(order)}
    writer = Writer(options.style, options.templates, people=True)
    facts = tuple(writer.statement(clause, draw) for clause in order)
    questions: list[Question] = []
    for name, end, statements in asked:
        relevant = tuple(where[clause] for clause in statements)
        if options.proof == "goal-first":
            relevant = relevant[::-1]
        if options.ask == "end":
            text = f"{name.lower()} is" if options.style == "plain" else f"What is {name} in the end?"
            questions.append(Question(text, end, relevant, depth, words.attributes))
        else:
            text = writer.question(Literal(name, IS, end), draw)
            answer = options.words[0 if statements else 1]
            questions.append(Question(text, answer, relevant, depth if statements else None, options.words))
    meta = {
        "generator": "chains",
        "world": "closed",
        "depth": depth,
        "style": options.style,
        "words": list(options.words),
        "logic": [clause.record() for clause in order],
    }
    return FoldTask(f"chains-{seed}-{index}", facts, tuple(questions), meta)
