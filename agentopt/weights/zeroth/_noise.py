"""The directions that weights are felt out along: signs, normals, low-rank factors, random masks.

Each number is a pure function of (seed, tensor, index of the weight in the whole tensor): Philox with the tensor's id
as second counter word and one stream per kind of number as third. One call of Philox gives the signs of 128 weights,
four normals, or four weights' places in a random mask.
"""

from __future__ import annotations

import hashlib
import math
import struct
from typing import Any

from agentopt.weights.load import need
from agentopt.weights.zeroth import _philox

SIGNS, NORMALS, ROUNDING, MASK, LEFT, RIGHT, EXAMPLES = range(7)
"""Streams (third counter word)."""

SIGNS_PER_BLOCK = 128
_FILL = 1 << 18
"""Weights filled at a time on a CPU, so that three sweeps over them stay in cache."""

_NORMAL_BLOCKS = 1 << 14
"""Blocks of four normals made at a time: their float64 steps stay in cache."""


def tensor_id(name: str) -> int:
    """What stands for a tensor in a counter: 32 bits of the hash of its name."""
    return int.from_bytes(hashlib.blake2s(name.encode()).digest()[:4], "little")


def sign_words(seed: int, tensor_id: int, start: int, stop: int, device: Any) -> Any:
    """Signs of the weights `start` to `stop`, packed: int32 words of 32 signs, lowest bit first (set means plus).

    Args:
        seed: the direction.
        tensor_id: the tensor.
        start: first weight; a multiple of 32 (of 128, nothing is drawn in vain).
        stop: one past the last weight; the last word may hold more signs than asked for.
        device: where the words are wanted.
    """
    if start % 32:
        raise ValueError(f"packed signs start at a multiple of 32, not at {start}")
    drawn = _blocks(seed, tensor_id, SIGNS, start, stop, SIGNS_PER_BLOCK, device)
    skip = start % SIGNS_PER_BLOCK // 32
    return drawn.view(-1)[skip : skip + -(-(stop - start) // 32)]


def fill_signs(words: Any, scale: float, out: Any) -> None:
    """Write `scale` or `-scale` over `out` (float32, one dimension, contiguous), as the packed signs say.

    A sign is moved to the sign bit of a float by one multiplication of its word, and the bits of the number are laid
    under it: no comparison, no selection.
    """
    torch = need("torch")
    powers = _powers(torch, out.device)
    # Where the sign bit arrives set, the weight gets +scale: flipping with the bits of -scale does just that.
    flip = struct.unpack("<i", struct.pack("<f", -scale))[0]
    whole = out.numel() // 32 * 32
    bits = out.view(torch.int32)
    tile = max(whole, 32) if out.is_cuda else _FILL
    for start in range(0, whole, tile):
        part = bits[start : min(start + tile, whole)]
        rows = words[start // 32 : (start + part.numel()) // 32]
        torch.mul(rows[:, None], powers, out=part.view(-1, 32))
        part.bitwise_and_(-(1 << 31)).bitwise_xor_(flip)
    if whole < out.numel():
        rest = (words[whole // 32] * powers)[: out.numel() - whole]
        bits[whole:] = rest.bitwise_and_(-(1 << 31)).bitwise_xor_(flip)


def fill_sign_range(seed: int, tensor_id: int, start: int, stop: int, scale: float, out: Any) -> None:
    """Draw and write the signs of `start` to `stop`; `start` may be any weight."""
    torch = need("torch")
    before = start % 32
    words = sign_words(seed, tensor_id, start - before, stop, out.device)
    if not before:
        fill_signs(words, scale, out)
        return
    longer = torch.empty(stop - start + before, dtype=torch.float32, device=out.device)
    fill_signs(words, scale, longer)
    out.copy_(longer[before:])


def fill_normals(seed: int, tensor_id: int, start: int, stop: int, scale: float, out: Any) -> None:
    """Write `scale` times standard normals over `out` (float32, one dimension).

    Box-Muller in float64, rounded once to float32: devices agree up to the last bit of their logarithm and cosine.
    """
    _fill_normals(seed, tensor_id, NORMALS, start, stop, out)
    if scale != 1.0:
        out.mul_(scale)


def random_mask(seed: int, tensor_id: int, start: int, stop: int, density: float, device: Any) -> Any:
    """Which of the weights `start` to `stop` a random mask keeps: bool tensor, true for a share of `density`."""
    torch = need("torch")
    drawn = _blocks(seed, tensor_id, MASK, start, stop, 4, device).view(-1)[start % 4 :][: stop - start]
    # Words are unsigned, torch compares them as signed: shift both sides by half the range.
    limit = mask_limit(density)
    if limit >= 1 << 32:
        return torch.ones(stop - start, dtype=torch.bool, device=device)
    return drawn.bitwise_xor(-(1 << 31)) < limit - (1 << 31)


def mask_limit(density: float) -> int:
    """A word below this keeps its weight in a random mask of that density."""
    return math.ceil(density * 2.0**32)


def factors(
    seed: int, right_seed: int, tensor_id: int, rows: int, columns: int, rank: int, device: Any
) -> tuple[Any, Any]:
    """The factors of a low-rank direction: U (rows, rank) from `seed` and V (columns, rank) from `right_seed`."""
    torch = need("torch")
    left = torch.empty((rows, rank), dtype=torch.float32, device=device)
    right = torch.empty((columns, rank), dtype=torch.float32, device=device)
    _fill_normals(seed, tensor_id, LEFT, 0, rows * rank, left.view(-1))
    _fill_normals(right_seed, tensor_id, RIGHT, 0, columns * rank, right.view(-1))
    return left, right


def example_signs(seed: int, tensor_id: int, axis: int, examples: int, size: int, device: Any) -> Any:
    """Signs that flip a shared direction per example (flipout): float32 (examples, size) of plus and minus one.

    Args:
        seed: the direction that is shared.
        tensor_id: the tensor.
        axis: 0 for the signs over the outputs of a layer, 1 for those over its inputs.
        examples: how many examples the whole batch has (every worker draws all, and takes its own).
        size: length of that axis.
        device: where they are wanted.
    """
    torch = need("torch")
    # Every row starts on a block of its own, so that a row does not depend on how many there are.
    stride = -(-size // SIGNS_PER_BLOCK) * SIGNS_PER_BLOCK
    rows = torch.empty(examples * stride, dtype=torch.float32, device=device)
    drawn = _blocks(seed, tensor_id, EXAMPLES, 0, rows.numel(), SIGNS_PER_BLOCK, device, c3=axis)
    fill_signs(drawn.view(-1), 1.0, rows)
    return rows.view(examples, stride)[:, :size].contiguous()


def _blocks(seed: int, tensor_id: int, stream: int, start: int, stop: int, each: int, device: Any, c3: int = 0) -> Any:
    """The words of every block that the weights `start` to `stop` touch: int32 (blocks, 4)."""
    torch = need("torch")
    counters = torch.arange(start // each, -(-stop // each), dtype=torch.int64, device=device)
    return _philox.philox(seed, counters, tensor_id, stream, c3)


def _powers(torch: Any, device: Any) -> Any:
    """2**31 down to 2**0: multiplied by them, a word has its bit j in the sign bit at place j."""
    return torch.bitwise_left_shift(
        torch.ones(32, dtype=torch.int32, device=device), torch.arange(31, -1, -1, dtype=torch.int32, device=device)
    )


def _fill_normals(seed: int, tensor_id: int, stream: int, start: int, stop: int, out: Any) -> None:
    torch = need("torch")
    span = 4 * _NORMAL_BLOCKS
    for low in range(start // 4 * 4, stop, span):
        high = min(low + span, stop)
        drawn = _box_muller(torch, _blocks(seed, tensor_id, stream, low, high, 4, out.device))
        first = max(low, start)
        out[first - start : high - start] = drawn[first - low : high - low]


def _box_muller(torch: Any, drawn: Any) -> Any:
    """Words (n, 4) to 4 n normals; words 0 and 1 make the first two, words 2 and 3 the others."""
    uniform = (drawn.to(torch.int64) & 0xFFFFFFFF).to(torch.float64).add_(0.5).mul_(2.0**-32).view(-1, 2)
    radius = uniform[:, 0].log().mul_(-2.0).sqrt_()
    angle = uniform[:, 1].mul(2.0 * math.pi)
    return torch.stack((angle.cos().mul_(radius), angle.sin().mul_(radius)), dim=1).view(-1).to(torch.float32)
