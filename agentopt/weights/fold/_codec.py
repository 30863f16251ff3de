"""Facts, questions and answers as token ids, and generated text back as recalled facts and an answer.

Training, folding and reading go through the same pieces, so that all of them see the same ids. Each piece (a line of
the context, the question, the recalled facts, the answer) is tokenized by itself: the ids of a line do not depend on
the order of the facts, and a cached context is continued by exactly what would have followed it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentopt.errors import UserError
from agentopt.weights.fold._types import FoldFormat, Question

_REMEMBERED = 65536
"""Tokenized texts that are kept: facts come again in every epoch."""
_ENDS = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True, slots=True)
class Response:
    """What should follow a question."""

    ids: tuple[int, ...]
    """Recalled facts, the answer, end of text."""
    recalled: int
    """So many of the ids are the recalled facts with what closes them."""


class Codec:
    """A tokenizer together with a format.

    Args:
        tokenizer: of transformers; it needs an end-of-text token.
        format: how facts, questions and answers are written.
        multi_task: the relevant facts stand before the answer.

    Raises:
        UserError: there is no end-of-text token, or nothing would mark where the recalled facts end.
    """

    def __init__(self, tokenizer: Any, format: FoldFormat, *, multi_task: bool = True) -> None:
        self.tokenizer, self.format, self.multi_task = tokenizer, format, multi_task
        if tokenizer.eos_token_id is None:
            raise UserError("fold: the tokenizer has no end-of-text token; set tokenizer.eos_token.")
        for name, field in (("fact", "fact"), ("question", "question"), ("answer", "answer"), ("recall", "facts")):
            if "{" + field + "}" not in getattr(format, name):
                found = getattr(format, name)
                raise UserError(f"format: {name} is {found!r}, expected a text with {{{field}}} in it.")
        self._marker_text = format.recall.rpartition("{facts}")[2]
        self.marker = " ".join(self._marker_text.split())
        if multi_task and not self.marker:
            raise UserError(
                f"format: recall is {format.recall!r}, expected a word after {{facts}}: there the answer begins."
            )
        self.eos = int(tokenizer.eos_token_id)
        self.pad = self.eos if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self._known: dict[str, list[int]] = {}
        self._closing: dict[int, bool] = {}
        self.lead = self._lead()

    def _lead(self) -> list[int]:
        plain, whole = self.ids("x"), list(self.tokenizer("x")["input_ids"])
        starts = [at for at in range(len(whole)) if plain and whole[at : at + len(plain)] == plain]
        return whole[: starts[0]] if starts else []

    # --- to ids ------------------------------------------------------------------------------------------------------

    def ids(self, text: str) -> list[int]:
        """Token ids without any special token."""
        found = self._known.get(text)
        if found is None:
            found = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[text] = found
        return list(found)

    def context(self, facts: Sequence[str]) -> list[int]:
        """The facts as a reader has them before the question: one a line, begin of text in front."""
        lines = [self.ids(self._line(fact)) for fact in facts]
        return [*self.lead, *(one for line in lines for one in line)]

    def question(self, text: str, before: Sequence[str] = ()) -> list[int]:
        """The question, without begin of text; lines before it are tokenized with it, as a server does.

        Raises:
            UserError: the tokenizer makes nothing of it.
        """
        lines = "".join(self._line(line) for line in before)
        found = self.ids(lines + _filled(self.format.question, question=text))
        if not found:
            raise UserError(f"question {text!r}: the tokenizer makes no token of it, expected a text.")
        return found

    def _line(self, text: str) -> str:
        return _filled(self.format.fact, fact=text) + "\n"

    def recall(self, facts: Sequence[str]) -> list[int]:
        """The recalled facts with the mark that closes them; nothing in the single-task form."""
        if not self.multi_task:
            return []
        front = _filled(self.format.recall.rpartition("{facts}")[0] + "{facts}", facts=self.format.joiner.join(facts))
        # The mark is tokenized by itself: it can then be put after any text that was generated.
        return [*self.ids(front), *self.ids(self._marker_text)]

    def mark(self) -> list[int]:
        """What closes the recalled facts."""
        return self.ids(self._marker_text)

    def answer(self, text: str) -> list[int]:
        """The answer, without end of text."""
        return self.ids(_filled(self.format.answer, answer=text))

    def response(self, question: Question, facts: Sequence[str]) -> Response:
        """What should follow the question; `facts` are those of the whole knowledge base."""
        recalled = self.recall([facts[number] for number in question.relevant])
        return Response((*recalled, *self.answer(question.answer), self.eos), len(recalled))

    # --- and back ----------------------------------------------------------------------------------------------------

    def text(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def normal(self, text: str) -> str:
        """A text as it would come back from the model, white space aside."""
        return " ".join(self.text(self.ids(text)).split())

    def marked(self, ids: Sequence[int]) -> bool:
        """Whether the recalled facts have just been closed by the last of these ids."""
        last = ids[-1]
        possible = self._closing.get(last)
        if possible is None:
            text = self.text([last])
            # A token that holds part of a letter decodes to a replacement mark: it may be anything.
            possible = self._closing[last] = self.marker[-1] in text or "�" in text
        return possible and self.marker in " ".join(self.text(ids).split())

    def parse(self, text: str) -> tuple[str | None, str]:
        """Recalled facts (None when the text has no mark) and answer of a generated text."""
        text = " ".join(text.split())
        if not self.multi_task:
            return None, self.plain(text)
        recalled, mark, rest = text.partition(self.marker)
        if not mark:
            return None, self.plain(text)
        front = " ".join(self.format.recall.rpartition("{facts}")[0].split())
        return recalled.strip().removeprefix(front).strip(), self.plain(rest)

    def plain(self, text: str) -> str:
        """The answer without what the format puts around it."""
        before, _, after = self.format.answer.partition("{answer}")
        return text.strip().removeprefix(before.strip()).removesuffix(after.strip()).strip()

    def sentences(self, recalled: str) -> tuple[str, ...]:
        """Recalled text cut into facts: at the joiner, or at sentence ends where the joiner is white space."""
        joiner = self.format.joiner.strip()
        parts = recalled.split(joiner) if joiner else _ENDS.split(recalled)
        return tuple(part for part in (" ".join(one.split()) for one in parts) if part)

    def expected(self, facts: Sequence[str]) -> tuple[str, ...]:
        """The sentences that recalling these facts word by word would give."""
        return self.sentences(self.normal(self.format.joiner.join(facts)))


def _filled(template: str, **fields: str) -> str:
    """The template with its one field filled; other braces stay as they are."""
    for name, value in fields.items():
        template = template.replace("{" + name + "}", value)
    return template
