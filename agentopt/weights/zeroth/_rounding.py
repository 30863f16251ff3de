"""Stochastic rounding: a float32 becomes one of its two 16-bit neighbours, the nearer one with the larger chance.

Rounding to nearest loses every update smaller than half a step of the format: at a step of 1e-5 hardly any bfloat16
weight of usual size moves. Rounded at random in proportion to what is cut off, the update survives on average. A value
that the format has is never changed, and the random bits are a pure function of (seed, tensor, index).
"""

from __future__ import annotations

from typing import Any

from agentopt.weights.load import need
from agentopt.weights.zeroth import _philox
from agentopt.weights.zeroth._noise import ROUNDING

_MAGNITUDE = 0x7FFFFFFF
_INFINITE = 0x7F800000
_LARGEST_BF16 = 0x7F7FFFFF
_QUIET = 0x00400000
_WORD = 0xFFFFFFFF
_TILE = 1 << 16


def round_(target: Any, value: Any, seed: int, tensor_id: int, start: int) -> None:
    """Write `value` (float32, one dimension) over `target` (bfloat16 or float16, same size), rounded at random.

    Args:
        target: tile of the weight, contiguous.
        value: what it should be.
        seed: source of the random bits; another one each step.
        tensor_id: the tensor.
        start: index of the tile's first weight in the whole tensor.
    """
    torch = need("torch")
    size = value.numel() if value.is_cuda else _TILE
    for low in range(0, value.numel(), max(size, 1)):
        part = value[low : low + size]
        first = start + low
        counters = torch.arange(first // 8, -(-(first + part.numel()) // 8), dtype=torch.int64, device=value.device)
        words = _philox.philox(seed, counters, tensor_id, ROUNDING).view(-1)
        rounded = _bfloat16 if target.dtype == torch.bfloat16 else _float16
        target[low : low + size] = rounded(torch, part, words, first % 8)


def _bfloat16(torch: Any, value: Any, words: Any, skip: int) -> Any:
    """The high half of the float's bits, after sixteen random bits were added to the low half.

    Of a random word the low half belongs to the first of two weights; `skip` weights come before the tile's first.
    """
    bits = value.view(torch.int32)
    magnitude = bits & _MAGNITUDE
    random = words.view(torch.int16)[skip : skip + value.numel()].to(torch.int32).bitwise_and_(0xFFFF)
    rounded = random.add_(magnitude).clamp_(max=_LARGEST_BF16)
    # Infinity stays; of a NaN at least the bit that makes it one.
    special = torch.where(magnitude > _INFINITE, magnitude | _QUIET, magnitude)
    rounded = torch.where(magnitude >= _INFINITE, special, rounded)
    return ((bits ^ magnitude | rounded) >> 16).to(torch.int16).view(torch.bfloat16)


def _float16(torch: Any, value: Any, words: Any, skip: int) -> Any:
    """Whole and broken steps of the format at this size; the broken part is the chance to go one step further.

    The weight's own sixteen bits decide for normal numbers. What is cut off from smaller ones can be finer than that:
    there the other half of the word, the neighbour's, makes the lower digits.
    """
    wide = words.to(torch.int64) & _WORD
    random = torch.stack(((wide << 16 | wide >> 16) & _WORD, wide), dim=1).view(-1)[skip : skip + value.numel()]
    bits = value.view(torch.int32)
    magnitude = (bits & _MAGNITUDE).view(torch.float32)
    # Exponent of the number, at least that of the smallest normal: below it the steps stop shrinking.
    exponent = ((bits & _MAGNITUDE) >> 23).clamp_(min=113)
    steps = magnitude * ((264 - exponent) << 23).view(torch.float32)
    whole = steps.floor()
    broken = ((steps - whole) * 2.0**32).to(torch.int64)
    whole += (broken + random) >> 32
    rounded = (whole * ((exponent - 10) << 23).view(torch.float32)).clamp_(max=65504.0)
    rounded = torch.where(magnitude.isfinite(), rounded, magnitude)
    return torch.copysign(rounded, value).to(torch.float16)
