"""Knowledge bases as rows of the inner loop, and their questions as a batch of the outer loss.

A row is one fact. A text longer than a row is cut at sentence ends, a sentence longer than a row at token bounds; every
cut is told. Rows are padded on the right: causal attention never looks ahead, so they need no mask.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from agentopt.errors import UserError
from agentopt.weights.fold._codec import Codec
from agentopt.weights.fold._types import FoldTask
from agentopt.weights.load import need

if TYPE_CHECKING:
    from agentopt.weights.fold._rows import Rows

# After a full stop and a space, after the full stops of scripts without spaces, and at the end of a line.
_SENTENCE = re.compile(r"(?<=[.!?…])[\"')\]»”’]*\s+|(?<=[。！？])|\s*\n\s*")
_REMEMBERED = 65536
"""Texts whose rows are kept: facts come again in every epoch."""
_MOST_TOKENS = 16384
"""Of the rows, padding included, of knowledge bases that are folded at once without a graph."""


@dataclass(frozen=True, slots=True)
class FactRows:
    """The rows of one knowledge base."""

    ids: tuple[tuple[int, ...], ...]
    fact: tuple[int, ...]
    """The fact that each row belongs to."""
    cuts: tuple[str, ...]
    """What was cut, a sentence each."""


@dataclass(frozen=True)
class Asked:
    """Questions of several knowledge bases with what should follow them: (documents, questions, tokens)."""

    rows: Rows
    """The tokens that count in the outer loss have weight 1."""
    answer: Any
    """Which of them are the answer (with end of text)."""
    recall: Any
    """Which of them are the recalled facts."""


@dataclass(frozen=True, slots=True)
class Pick:
    """A knowledge base of an episode: its facts in the order drawn, and the questions that are asked."""

    task: FoldTask
    order: tuple[int, ...]
    questions: tuple[int, ...]

    @property
    def facts(self) -> list[str]:
        """In the order drawn."""
        return [self.task.facts[place] for place in self.order]


class Encoder:
    """Turns texts into the batches of inner and outer loop.

    Args:
        codec: tokenizer and format.
        row_tokens: longest row of the inner loop.
    """

    def __init__(self, codec: Codec, row_tokens: int) -> None:
        self.codec, self.row_tokens = codec, row_tokens
        self._known: dict[str, tuple[tuple[tuple[int, ...], ...], str]] = {}

    # --- the inner loop ----------------------------------------------------------------------------------------------

    def facts(self, facts: Sequence[str]) -> FactRows:
        """Rows of a knowledge base, in the order of its facts.

        Raises:
            UserError: a fact is empty, or has no token that could be predicted from one before it.
        """
        ids: list[tuple[int, ...]] = []
        owner: list[int] = []
        cuts: list[str] = []
        for place, fact in enumerate(facts):
            if not fact.strip():
                raise UserError(f"facts: number {place} is empty ({fact!r}), expected a sentence.")
            rows, cut = self._rows(fact)
            if max(map(len, rows), default=0) < 2:
                raise UserError(f"facts: number {place} is {fact!r}, one token to the tokenizer; expected a sentence.")
            ids += rows
            owner += [place] * len(rows)
            cuts += [f"fact {place} {cut}"] if cut else []
        return FactRows(tuple(ids), tuple(owner), tuple(cuts))

    def fold_rows(self, bases: Sequence[FactRows]) -> Rows:
        """Several knowledge bases side by side; a shorter one is filled with rows of no weight."""
        most = max(1, max(len(base.ids) for base in bases))
        longest = max((len(row) for base in bases for row in base.ids), default=2)
        ids = np.full((len(bases), most, longest), self.codec.pad, dtype=np.int64)
        weight = np.zeros(ids.shape, dtype=np.float32)
        for number, base in enumerate(bases):
            for place, row in enumerate(base.ids):
                ids[number, place, : len(row)] = row
                # The first token has nothing before it (but begin of text, which is never predicted).
                weight[number, place, max(1, len(self.codec.lead)) : len(row)] = 1.0
        return _rows(ids, weight)

    def _rows(self, fact: str) -> tuple[tuple[tuple[int, ...], ...], str]:
        found = self._known.get(fact)
        if found is None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            found = self._known[fact] = self._cut(fact)
        return found

    def _cut(self, fact: str) -> tuple[tuple[tuple[int, ...], ...], str]:
        room = self.row_tokens - len(self.codec.lead)
        whole = self._ids(fact)
        if len(whole) <= room:
            return (self._row(whole),), ""
        rows: list[list[int]] = []
        inside = 0
        current = ""
        for sentence in sentences(fact):
            longer = f"{current} {sentence}" if current else sentence
            if len(self._ids(longer)) <= room:
                current = longer
                continue
            rows += [self._ids(current)] if current else []
            current = sentence
            tokens = self._ids(sentence)
            if len(tokens) > room:
                pieces = np.array_split(np.arange(len(tokens)), -(-len(tokens) // room))
                rows += [[tokens[place] for place in piece] for piece in pieces]
                current, inside = "", inside + 1
        rows += [self._ids(current)] if current else []
        how = f"has {len(whole)} tokens, more than a row of {self.row_tokens}: it was cut into {len(rows)} rows"
        if inside:
            how += f", {inside} {'sentence' if inside == 1 else 'sentences'} of it inside"
        return tuple(self._row(row) for row in rows), how + "."

    def _ids(self, text: str) -> list[int]:
        return self.codec.ids(self.codec.format.fact.replace("{fact}", text))

    def _row(self, ids: Sequence[int]) -> tuple[int, ...]:
        return (*self.codec.lead, *ids)

    # --- the outer loss ----------------------------------------------------------------------------------------------

    def prompt(self, question: str, context: Sequence[str] = ()) -> list[int]:
        """What a folded model is asked: lines that are not folded, and the question."""
        return [*self.codec.lead, *self.codec.question(question, context)]

    def questions(self, picks: Sequence[Pick]) -> Asked:
        """The picked questions of several knowledge bases; one with fewer is filled with rows of no weight."""
        batch: list[list[tuple[list[int], int, int]]] = []
        for pick in picks:
            rows: list[tuple[list[int], int, int]] = []
            for number in pick.questions:
                question = pick.task.questions[number]
                prompt = self.prompt(question.text)
                response = self.codec.response(question, pick.task.facts)
                rows.append(([*prompt, *response.ids], len(prompt), len(prompt) + response.recalled))
            batch.append(rows)
        most = max(map(len, batch))
        longest = max(len(ids) for rows in batch for ids, _, _ in rows)
        ids = np.full((len(batch), most, longest), self.codec.pad, dtype=np.int64)
        answer, recall = np.zeros(ids.shape, dtype=np.float32), np.zeros(ids.shape, dtype=np.float32)
        for number, rows in enumerate(batch):
            for place, (row, begin, middle) in enumerate(rows):
                ids[number, place, : len(row)] = row
                recall[number, place, begin:middle] = 1.0
                answer[number, place, middle : len(row)] = 1.0
        torch = need("torch")
        return Asked(_rows(ids, answer + recall), torch.from_numpy(answer), torch.from_numpy(recall))

    def longest(self, tasks: Sequence[FoldTask]) -> tuple[int, int]:
        """Most tokens of a question with its response, and of a response alone."""
        whole = alone = 0
        for task in tasks:
            for question in task.questions:
                response = len(self.codec.response(question, task.facts).ids)
                whole = max(whole, response + len(self.prompt(question.text)))
                alone = max(alone, response)
        return whole, alone


def grouped(bases: Sequence[FactRows], documents: int) -> list[range]:
    """Knowledge bases that are folded at once, in order: at most `documents`, and no more rows than fit the memory."""
    groups: list[range] = []
    rows = longest = 0
    for place, base in enumerate(bases):
        rows, longest = max(rows, len(base.ids)), max(longest, *map(len, base.ids))
        before = groups[-1] if groups else range(0)
        if not groups or len(before) == documents or (len(before) + 1) * rows * longest > _MOST_TOKENS:
            groups.append(range(place, place + 1))
            rows, longest = len(base.ids), max(map(len, base.ids))
        else:
            groups[-1] = range(before.start, place + 1)
    return groups


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text, none of them empty."""
    return [part.strip() for part in _split(text) if part.strip()]


def _split(text: str) -> list[str]:
    """Cut after each end, closing quotes left with their sentence."""
    parts: list[str] = []
    begin = 0
    for match in _SENTENCE.finditer(text):
        parts.append(text[begin : match.end()])
        begin = match.end()
    return [*parts, text[begin:]]


def _rows(ids: Any, weight: Any) -> Rows:
    from agentopt.weights.fold._rows import Rows

    torch = need("torch")
    return Rows(torch.from_numpy(ids), torch.from_numpy(weight))


def check_tasks(tasks: Sequence[FoldTask], what: str) -> None:
    """Refuse tasks that cannot be folded or asked.

    Raises:
        UserError: no tasks, or one without facts or questions, or whose question points at no fact.
    """
    if not tasks:
        raise UserError(f"{what}: found no tasks, expected at least one knowledge base with questions.")
    for task in tasks:
        if not task.facts or not task.questions:
            missing = "facts" if not task.facts else "questions"
            raise UserError(f"{what}: task {task.id!r} has no {missing}, expected at least one.")
        for question in task.questions:
            wrong = [place for place in question.relevant if not 0 <= place < len(task.facts)]
            if wrong:
                raise UserError(
                    f"{what}: task {task.id!r}: relevant names fact {wrong[0]}, expected 0 to {len(task.facts) - 1}."
                )
            if not question.text.strip() or not question.answer.strip():
                raise UserError(f"{what}: task {task.id!r} has an empty question or answer, expected text.")
