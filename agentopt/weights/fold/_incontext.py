"""Answering with the facts in the prompt: what folding is measured against, and what a gate falls back to.

    reader = InContext(model, tokenizer)
    reader.ask(facts, "Is Anne kind?", ["yes", "no"])       # reads the facts again for every question
    known = reader.prefix(facts)                             # keys and values of the facts, once
    reader.ask_many(known, questions)                        # and every question continues from there

The same format, generation and metric as a folder's. A reader trained with `train_incontext` is fine-tuned in-context
reasoning (FT-ICR in RECKONING, arXiv 2305.06349).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentopt.errors import UserError
from agentopt.weights.fold._answers import Answer, Memory, Written, forward, may_batch, write_answers
from agentopt.weights.fold._codec import Codec
from agentopt.weights.fold._scores import FoldScores, Scored, judge
from agentopt.weights.fold._shape import window_of
from agentopt.weights.fold._types import FoldFormat, FoldTask, Question
from agentopt.weights.load import need
from agentopt.weights.tasks._predictions import measuring

_MOST_TOKENS = 16384
"""Context tokens that are read in one pass, so that a few long ones do not fill the memory."""
_MOST_CACHED = 65536
"""Context tokens whose keys and values a batch of questions holds."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """Facts that were read once."""

    facts: tuple[str, ...]
    tokens: int
    memory: Memory

    @property
    def bytes(self) -> int:
        """Keys and values of all layers."""
        layers: list[Any] = [layer for layer in self.memory.cache.layers if layer.is_initialized]
        return sum(part.numel() * part.element_size() for layer in layers for part in (layer.keys, layer.values))


class InContext:
    """Answers questions about facts that stand in the prompt.

    Args:
        model: a causal language model of transformers, with or without adapters.
        tokenizer: its tokenizer.
        format: how facts, questions and answers are written.
        multi_task: the model recalls the relevant facts before it answers. A model that was not trained to do that
            should answer at once: False.
        batch: most questions answered at once; fewer where the context is long.
        max_new: most tokens of the recalled facts, and of an answer without choices.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        format: FoldFormat | None = None,
        multi_task: bool = True,
        batch: int = 128,
        max_new: int = 96,
    ) -> None:
        need("torch")
        if batch < 1 or max_new < 1:
            raise UserError(f"in-context: found batch {batch} and max_new {max_new}, expected at least 1 each.")
        self.model, self.batch, self.max_new = model, batch, max_new
        self.codec = Codec(tokenizer, format or FoldFormat(), multi_task=multi_task)

    @property
    def window(self) -> int | None:
        """Most tokens that the model reads, as its configuration says."""
        return window_of(self.model.config)

    # --- asking ------------------------------------------------------------------------------------------------------

    def ask(self, facts: Sequence[str], question: str | Question, choices: Sequence[str] = ()) -> Answer:
        """Read facts and question, and answer.

        Raises:
            UserError: they are longer than the model's window.
        """
        return self.ask_many(facts, [question], choices)[0]

    def prefix(self, facts: Sequence[str]) -> Prefix:
        """Read the facts once; `ask_many` continues from there without changing it.

        Raises:
            UserError: they are longer than the model's window, or there are none.
        """
        ids = self._context(facts)
        self._fits(len(ids), 1)
        return Prefix(tuple(facts), len(ids), self._read([ids]))

    def ask_many(
        self,
        facts: Prefix | Sequence[str],
        questions: Sequence[str | Question],
        choices: Sequence[str] = (),
        *,
        context: Sequence[str] = (),
    ) -> list[Answer]:
        """Answer several questions about the same facts.

        Args:
            facts: what `prefix` returned, or facts, which are then read again for every question.
            questions: texts, or questions with choices of their own.
            choices: the answers there are, for questions that are texts.
            context: lines between the facts and each question.

        Raises:
            UserError: facts and question are longer than the model's window.
        """
        asked = [one if isinstance(one, Question) else Question(one, "", choices=tuple(choices)) for one in questions]
        prompts = [self.codec.question(one.text, context) for one in asked]
        longest = max(map(len, prompts), default=0)
        found: list[Written] = []
        if isinstance(facts, Prefix):
            room = self._fits(facts.tokens, longest)
            size = min(self.batch, max(1, _MOST_CACHED // facts.tokens))
            for at in range(0, len(asked), size):
                part = prompts[at : at + size]
                options = [one.choices for one in asked[at : at + size]]
                found += self._write(part, options, room, facts.memory, [0] * len(part))
        else:
            ids = self._context(facts)
            room = self._fits(len(ids), longest)
            size = min(self.batch, max(1, _MOST_TOKENS // len(ids)))
            for at in range(0, len(asked), size):
                options = [one.choices for one in asked[at : at + size]]
                found += self._write([ids + one for one in prompts[at : at + size]], options, room)
        return [
            Answer(one.text, "in-context", one.recalled, margin=one.margin, logprob=one.logprob, reason="facts read")
            for one in found
        ]

    # --- measuring ---------------------------------------------------------------------------------------------------

    def evaluate(self, tasks: Sequence[FoldTask], *, questions: int | None = None) -> FoldScores:
        """Answer the questions of every task; each task's facts are read once.

        Args:
            tasks: knowledge bases with questions.
            questions: at most so many of each, the first ones; None for all.

        Raises:
            UserError: a task is longer than the model's window.
        """
        contexts = [self._context(task.facts) for task in tasks]
        found: dict[tuple[int, int], Scored] = {}
        for group in self._groups(contexts, [len(task.questions[:questions]) for task in tasks]):
            memory = self._read([contexts[number] for number in group])
            pairs = [(number, place) for number in group for place in range(len(tasks[number].questions[:questions]))]
            size = min(self.batch, max(1, _MOST_CACHED // max(len(contexts[number]) for number in group)))
            for at in range(0, len(pairs), size):
                part = pairs[at : at + size]
                asked = [tasks[number].questions[place] for number, place in part]
                prompts = [self.codec.question(one.text) for one in asked]
                room = self._fits(max(len(contexts[number]) for number, _ in part), max(map(len, prompts)))
                index = [group.index(number) for number, _ in part]
                written = self._write(prompts, [one.choices for one in asked], room, memory, index)
                for (number, place), one in zip(part, written, strict=True):
                    found[number, place] = judge(tasks[number], place, one, codec=self.codec)
        return FoldScores(tuple(found[key] for key in sorted(found)))

    def _groups(self, contexts: Sequence[Sequence[int]], questions: Sequence[int]) -> list[list[int]]:
        """Tasks that are read together: of about the same length, no more than a batch of questions or of tokens."""
        groups: list[list[int]] = []
        asked = 0
        for number in sorted(range(len(contexts)), key=lambda one: (len(contexts[one]), one)):
            full = asked + questions[number] > self.batch
            if not groups or full or (len(groups[-1]) + 1) * len(contexts[number]) > _MOST_TOKENS:
                groups.append([])
                asked = 0
            groups[-1].append(number)
            asked += questions[number]
        return groups

    # --- the model ---------------------------------------------------------------------------------------------------

    def _write(
        self,
        prompts: Sequence[Sequence[int]],
        choices: Sequence[Sequence[str]],
        room: int,
        memory: Memory | None = None,
        index: Sequence[int] = (),
    ) -> list[Written]:
        most = min(self.max_new, room)
        before = len(memory.mask[0]) if memory is not None else 0
        together = may_batch(self.model, before + max(map(len, prompts), default=0), most)
        size = max(1, len(prompts)) if together else 1
        found: list[Written] = []
        for at in range(0, len(prompts), size):
            part = slice(at, at + size)
            found += write_answers(
                self.model, self.codec, prompts[part], choices[part], memory=memory, index=index[part], max_new=most
            )
        return found

    def _context(self, facts: Sequence[str]) -> list[int]:
        if isinstance(facts, str):
            raise UserError("in-context: found one text, expected a list of facts.")
        ids = self.codec.context(facts)
        if not facts or not ids:
            raise UserError("in-context: found no facts, expected at least one.")
        return ids

    def _fits(self, context: int, question: int) -> int:
        """Tokens that are left for what the model writes."""
        window = self.window
        if window is None:
            return self.max_new
        # The answer needs some room as well; a mark and an answer of a word take about this much.
        if context + question + 16 > window:
            raise UserError(
                f"in-context: facts and question have {context + question} tokens and the model's window has {window}; "
                "fold the facts instead, or give fewer of them."
            )
        return max(1, (window - context - question) // 2)

    def _read(self, contexts: Sequence[Sequence[int]]) -> Memory:
        """Keys and values of several contexts, shorter ones padded on the left."""
        torch = need("torch")
        width = max(map(len, contexts))
        device = next(iter(self.model.parameters())).device
        mask = tuple((0,) * (width - len(one)) + (1,) * len(one) for one in contexts)
        ids = torch.tensor([[self.codec.pad] * (width - len(one)) + list(one) for one in contexts], device=device)
        seen = torch.tensor(mask, device=device)
        with measuring(self.model):
            out = forward(self.model, ids, seen, None, keep=1)
        return Memory(out.past_key_values, mask)
