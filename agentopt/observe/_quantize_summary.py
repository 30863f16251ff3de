"""What a quantization comes to, in a few figures and sentences: the same in the terminal and in the report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentopt.observe._layers import by_kind

if TYPE_CHECKING:
    from agentopt.weights.gg import Quality, QuantizeResult, TensorReport

FEW_TOKENS = 2000
"""Below this a perplexity is a rough figure, and that is said."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Least, median and greatest of some figures."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one figure."""
        return cls(min(values), statistics.median(values), max(values))


@dataclass(frozen=True, slots=True)
class KindSummary:
    """All weights of one kind of layer; the bits are means over weights, the time is a sum."""

    kind: str
    tensors: tuple[TensorReport, ...]
    nu: Spread
    sqnr: Spread
    entropy_bits: float
    stored_bits: float
    seconds: float


def kinds_of(tensors: Sequence[TensorReport]) -> list[KindSummary]:
    """A summary per kind of layer, in the order of the files."""
    return [
        KindSummary(
            kind,
            tuple(group),
            Spread.of([one.nu for one in group]),
            Spread.of([one.sqnr_db for one in group]),
            mean_bits(group, "entropy_bits"),
            mean_bits(group, "stored_bits"),
            sum(one.seconds for one in group),
        )
        for kind, group in by_kind(tensors).items()
    ]


def number_of(tensors: Sequence[TensorReport]) -> int:
    """Weights in these tensors."""
    return sum(math.prod(one.shape) for one in tensors)


def mean_bits(tensors: Sequence[TensorReport], name: str) -> float:
    """Mean over weights of `entropy_bits` or `stored_bits`."""
    weights = number_of(tensors)
    return sum(getattr(one, name) * math.prod(one.shape) for one in tensors) / weights if weights else 0.0


def worst(tensors: Sequence[TensorReport], number: int) -> list[TensorReport]:
    """Those with the lowest SQNR, the lowest first."""
    return sorted(tensors, key=lambda one: one.sqnr_db)[:number]


def gpu_bytes(result: QuantizeResult) -> tuple[int, int]:
    """An estimate of the GPU memory for weights: all at 16 bits, and quantized ones as stored beside others at 16 bits.

    Activations, the cache of keys and values and the server's own memory come on top, as before.
    """
    quantized = sum(one.stored_bits * math.prod(one.shape) for one in result.tensors) / 8
    return result.bytes_16, round(result.bytes_16 - 2 * number_of(result.tensors) + quantized)


def decibels(value: float, digits: int = 1) -> str:
    """An SQNR; nothing lost is called exact."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "exact"


def change(before: float, after: float) -> str:
    """By how much a figure grew."""
    share = round(after / before - 1, 4) if before else 0.0
    return f"{share + 0.0:+.2%}"  # no minus before a zero


def quality_sentences(quality: Quality) -> list[str]:
    """What the quantized model does differently, on the text it was measured with."""
    before, after = quality.perplexity_before, quality.perplexity_after
    found = [
        f"Perplexity {before:.3f} before, {after:.3f} after ({change(before, after)}); KL divergence from the original "
        f"{quality.kl:.2g} nats per token; the same most likely next token for {quality.same_top:.2%} of "
        f"{quality.tokens:,} tokens."
    ]
    if quality.tokens < FEW_TOKENS:
        found.append(f"{quality.tokens:,} tokens are few: take the perplexities as rough figures.")
    return found
