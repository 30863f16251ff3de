"""What a model says of given tokens, and what it writes in their place: how two ways of serving are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Case:
    """An answer to a prompt, in tokens; `adapter` names what answers, None is the base."""

    adapter: str | None
    prompt: list[int]
    answer: list[int]
    own: bool = True
    """Whether it is the answer to this very question."""


@dataclass(frozen=True, slots=True)
class Said:
    """What one way of serving makes of a case."""

    logprobs: list[float]
    """Of the answer's tokens, each given those before it."""
    written: list[int]
    """As many tokens as the answer has, greedily."""
    margins: list[float]
    """By how much the written token is likelier than the second; empty when that is not known."""


def said(model: Any, case: Case) -> Said:
    """Run a model of transformers, as it is now."""
    import torch

    with torch.no_grad():
        ids = torch.tensor([case.prompt + case.answer])
        table = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        begin = len(case.prompt) - 1
        logprobs = [float(table[begin + place, token]) for place, token in enumerate(case.answer)]
        written: list[int] = []
        margins: list[float] = []
        for _ in case.answer:
            ids = torch.tensor([case.prompt + written])
            best = model(input_ids=ids, use_cache=False).logits[0, -1].float().log_softmax(-1).topk(2)
            written.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
    return Said(logprobs, written, margins)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two ways of serving are apart over all cases."""

    difference: float
    """Largest difference of a token's log-probability."""
    tokens: int
    """Written tokens that were compared: of each case all up to the first that differs."""
    flips: list[float]
    """The margin at each first token that differs."""


def compare(one: Sequence[Said], other: Sequence[Said]) -> Agreement:
    """`one` knows its margins."""
    difference = max(
        abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x.logprobs, y.logprobs, strict=True)
    )
    tokens = 0
    flips: list[float] = []
    for x, y in zip(one, other, strict=True):
        for mine, theirs, margin in zip(x.written, y.written, x.margins, strict=True):
            tokens += 1
            if mine != theirs:
                flips.append(margin)
                break
    return Agreement(difference, tokens, flips)
