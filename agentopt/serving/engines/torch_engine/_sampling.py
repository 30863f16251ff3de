"""From logits to a token: penalties, temperature, top-k, top-p, min-p, a seed; and log-probabilities.

Log-probabilities are the model's own (of the raw logits), as in OpenAI's API. A row's random numbers come from its own
generator, so a seed gives the same reply whatever else is in the batch (but for rounding).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of one reply are chosen."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0
    seed: int | None = None
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    bias: Mapping[int, float] = field(default_factory=dict[int, float])
    logprobs: int | None = None
    """How many of the likeliest tokens to report; None reports none."""


@dataclass(frozen=True, slots=True)
class Picked:
    """One token and, where asked for, how likely it was."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one reply.

    Args:
        sampling: how.
        prompt: its tokens; the repetition penalty counts them.
    """

    def __init__(self, sampling: Sampling, prompt: list[int]) -> None:
        self.sampling = sampling
        self._seen = Counter[int]()
        self._prompt = sorted(set(prompt)) if sampling.repetition != 1.0 else []
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % (1 << 63))

    def pick(self, logits: Tensor, allowed: Tensor | None = None) -> Picked:
        """The next token.

        Args:
            logits: (vocabulary,).
            allowed: which tokens may come; None for all.
        """
        raw = logits.float().cpu()
        scores = self._changed(raw)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        token = int(scores.argmax()) if self.sampling.temperature < 1e-5 else self._draw(scores)
        self._seen[token] += 1
        if self.sampling.logprobs is None:
            return Picked(token)
        likely = torch.log_softmax(raw, -1)
        best = likely.topk(min(self.sampling.logprobs, likely.shape[0]))
        pairs = zip(best.indices, best.values, strict=True)
        return Picked(token, float(likely[token]), tuple((int(one), float(value)) for one, value in pairs))

    def _changed(self, raw: Tensor) -> Tensor:
        """With biases and penalties."""
        how = self.sampling
        if not how.bias and not how.presence and not how.frequency and how.repetition == 1.0:
            return raw
        scores = raw.clone()
        for token, value in how.bias.items():
            if 0 <= token < scores.shape[0]:
                scores[token] += value
        if how.repetition != 1.0:
            seen = torch.tensor(sorted({*self._prompt, *self._seen}), dtype=torch.long)
            held = scores[seen]
            scores[seen] = torch.where(held > 0, held / how.repetition, held * how.repetition)
        if self._seen and (how.presence or how.frequency):
            seen = torch.tensor(list(self._seen), dtype=torch.long)
            counts = torch.tensor(list(self._seen.values()), dtype=scores.dtype)
            scores[seen] -= how.presence + how.frequency * counts
        return scores

    def _draw(self, scores: Tensor) -> int:
        how = self.sampling
        scores = scores / how.temperature
        if 0 < how.top_k < scores.shape[0]:
            scores = scores.masked_fill(scores < scores.topk(how.top_k).values[-1], -torch.inf)
        chances = torch.softmax(scores, -1)
        if how.min_p > 0:
            chances = chances.masked_fill(chances < how.min_p * chances.max(), 0)
        if how.top_p < 1:
            ordered, index = chances.sort(descending=True)
            # The likeliest token stays whatever top_p is: what stands before it sums to zero.
            cut = ordered.cumsum(-1) - ordered >= how.top_p
            chances[index[cut]] = 0
        return int(torch.multinomial(chances, 1, generator=self._generator))
