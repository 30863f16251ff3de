"""Frozen models that judge capsules in training: a causal model that answers questions, and a sentence encoder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from agentopt.capsules._types import Document
from agentopt.capsules.extraction._embedding import Encoder
from agentopt.capsules.extraction._terms import Floats
from agentopt.weights.load import need

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


class CausalReader:
    """Answers from a text with a causal model, greedily; also tells how likely given answers are to it."""

    def __init__(self, model: Any, tokenizer: Any, *, name: str = "causal", longest: int = 32, batch: int = 16) -> None:
        self.torch = need("torch")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.name, self.longest, self.batch = name, longest, batch
        self.device = next(model.parameters()).device

    def answers(self, text: str, questions: Sequence[str]) -> list[str]:
        """The first line of each reply."""
        result: list[str] = []
        for start in range(0, len(questions), self.batch):
            prompts = [self._prompt(text, question) for question in questions[start : start + self.batch]]
            ids, attention = self._pad(prompts)
            with self.torch.no_grad():
                out = self.model.generate(
                    input_ids=ids,
                    attention_mask=attention,
                    max_new_tokens=self.longest,
                    do_sample=False,
                    pad_token_id=self.tokenizer.pad_token_id,
                    eos_token_id=self.tokenizer.eos_token_id,
                )
            rows = out[:, ids.shape[1] :]
            result += [
                (self.tokenizer.decode(row, skip_special_tokens=True).strip() + "\n").split("\n")[0] for row in rows
            ]
        return result

    def likelihoods(self, text: str, questions: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Mean log-probability of the tokens of each answer after its question."""
        torch = self.torch
        result: list[float] = []
        for start in range(0, len(questions), self.batch):
            rows = range(start, min(start + self.batch, len(questions)))
            heads = [self._prompt(text, questions[row]) for row in rows]
            tails = [self._tokens(answers[row] or " ") for row in rows]
            ids, attention = self._pad([head + tail for head, tail in zip(heads, tails, strict=True)])
            positions = (attention.cumsum(1) - 1).clamp(min=0)
            with torch.no_grad():
                logits = self.model(input_ids=ids, attention_mask=attention, position_ids=positions).logits.float()
            chosen = torch.log_softmax(logits[:, :-1], 2).gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)
            result += [float(row[-len(tail) :].mean()) for row, tail in zip(chosen, tails, strict=True)]
        return result

    def _prompt(self, text: str, question: str) -> list[int]:
        asked = f"{text}\n\nQuestion: {question}\nAnswer in a few words."
        if not self.tokenizer.chat_template:
            return self._tokens(asked + "\n")
        turn = [{"role": "user", "content": asked}]
        return self._tokens(self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _pad(self, rows: Sequence[list[int]]) -> tuple[Any, Any]:
        width, pad = max(map(len, rows)), self.tokenizer.pad_token_id
        ids = [[pad] * (width - len(row)) + row for row in rows]
        seen = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return self.torch.tensor(ids, device=self.device), self.torch.tensor(seen, device=self.device)


class MiniLm:
    """Meaning kept, by the installed sentence encoder: the best cosine with what stayed, averaged over sentences."""

    def __init__(self) -> None:
        self._encoder = Encoder.load()
        self._known: dict[str, Floats] = {}

    def __call__(self, document: Document, text: str) -> float:
        """Between 0 and 1."""
        sentences = _sentences(text)
        if not sentences:
            return 0.0
        if document.text not in self._known:
            if len(self._known) > 1_000:
                self._known.clear()
            self._known[document.text] = self._encoder.encode(_sentences(document.text) or [document.text])
        similar = self._known[document.text] @ self._encoder.encode(sentences).T
        return float(min(1.0, np.clip(similar.max(axis=1), 0.0, None).mean()))


def _sentences(text: str) -> list[str]:
    return [one for one in _SENTENCE.split(text) if one.strip()]
