"""Which slot of the engine computes a prompt, and how much of what it holds may be used: prefix reuse without history.

Measured on llama.cpp's CPU backend: a token computed alone in its pass gets other last bits than the same token
computed together with others (attention takes another matrix routine for one column than for two or more); from two
up all are bit-equal. So what a slot holds from single-token passes (generated text, further label tokens) must not be
reused for a prompt, and a prompt must never leave a pass of one token. Under these two rules a reply is the same
whatever ran before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_PASS = 512
"""Tokens of one pass (llama.cpp's n_ubatch)."""
_WORTH = 0.25
"""A slot is reused when it holds this part of the prompt; else the least recently used one is given up."""


@dataclass(slots=True)
class _Slot:
    held: tuple[int, ...] = ()
    """Tokens whose keys and values were computed in passes of two or more."""
    tail: bool = False
    """Something may follow `held` that was computed one token at a time."""
    used: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Where to compute a prompt; `first` is a throw-away prompt that cuts the slot back before, if that is needed."""

    slot: int
    first: tuple[int, ...] | None
    reused: int


class Slots:
    """A mirror of what the engine's slots hold. Used by the engine's thread only."""

    def __init__(self, count: int) -> None:
        self._slots = [_Slot() for _ in range(count)]
        self._clock = 0

    def plan(self, prompt: Sequence[int]) -> Plan:
        """Choose a slot for `prompt`, of at least two tokens, and note that it will hold it (with a tail)."""
        tokens = tuple(prompt)
        shared = [_common(slot.held, tokens) for slot in self._slots]
        place = max(range(len(shared)), key=lambda index: shared[index])
        if shared[place] < _WORTH * len(tokens):
            place = min(range(len(shared)), key=lambda index: self._slots[index].used)
        slot, common = self._slots[place], shared[place]
        keep = max(0, min(common, len(tokens) - 2))
        while keep and (len(tokens) - keep) % _PASS == 1:
            keep -= 1
        first: tuple[int, ...] | None = None
        if keep < common or (slot.tail and common == len(slot.held)):
            other = next(token for token in (1, 2, 3) if keep >= len(tokens) or token != tokens[keep])
            first = (*tokens[:keep], other)
        self._clock += 1
        slot.held, slot.tail, slot.used = tokens, True, self._clock
        return Plan(place, first, keep)


def _common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))
