"""Philox4x32-10, the counter-based random number generator of everything that zeroth-order tuning draws.

Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a 64-bit key and a 128-bit counter into
four 32-bit words, with no state in between. Every number is thus a pure function of (seed, tensor, index): any device,
any order and any split of the work gives the same bits. Key and counter are laid out as Triton's `tl.philox` has them,
so a kernel draws the same words: key = (low, high) half of the seed, counter = (c0, c1, c2, c3).
"""

from __future__ import annotations

from typing import Any

from agentopt.weights.load import need

_A, _B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
_ROUNDS = 10
_TILE = 1 << 14
"""Counters worked on at a time on a CPU, so that the buffers stay in cache."""

_PROBES = 100
"""Stream (third counter word) of the seeds of directions; the streams of noise are below it."""


def words(key: int, c0: int, c1: int, c2: int, c3: int = 0) -> tuple[int, int, int, int]:
    """The four words of one counter, in plain Python."""
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    for _ in range(_ROUNDS):
        low, high = _A * c0, _B * c2
        c0, c1, c2, c3 = (high >> 32) ^ c1 ^ k0, high & _WORD, (low >> 32) ^ c3 ^ k1, low & _WORD
        k0, k1 = (k0 + _KEY_A) & _WORD, (k1 + _KEY_B) & _WORD
    return c0, c1, c2, c3


def probe_seed(run_seed: int, step: int, k: int = 0) -> int:
    """Seed (64 bits) of direction `k` of step `step`: a pure function of the run's seed."""
    low, high, _, _ = words(run_seed, step & _WORD, k & _WORD, _PROBES)
    return low | high << 32


def philox(key: int, c0: Any, c1: int, c2: int = 0, c3: int = 0) -> Any:
    """The words of many counters that differ in their first word: int32 tensor of shape (n, 4).

    Args:
        key: 64-bit seed.
        c0: int64 tensor of shape (n,), values from 0 to 2**32 - 1. On CPU and CUDA the result is the same.
        c1: second counter word.
        c2: third counter word.
        c3: fourth counter word.
    """
    torch = need("torch")
    out = torch.empty((c0.numel(), 4), dtype=torch.int32, device=c0.device)
    # Two words at a time: one int64 store, little end first, takes both.
    pairs = out.view(torch.int64)
    if c0.is_cuda:
        buffers = torch.empty((6, c0.numel()), dtype=torch.int64, device=c0.device)
        _rounds(torch, key, c0, (c1, c2, c3), buffers, pairs)
        return out
    # NumPy works on the same memory and starts an operation in a third of the time, which is most of it for one layer.
    numpy = need("numpy")
    counters, memory = c0.numpy(), pairs.numpy()
    buffers = numpy.empty((6, min(_TILE, len(counters))), dtype=numpy.int64)
    for start in range(0, len(counters), _TILE):
        part = counters[start : start + _TILE]
        _rounds(numpy, key, part, (c1, c2, c3), buffers[:, : len(part)], memory[start : start + _TILE])
    return out


def _rounds(xp: Any, key: int, c0: Any, rest: tuple[int, int, int], buffers: Any, out: Any) -> None:
    """Ten rounds over one tile, into `out` (n, 2) int64; `xp` is torch or NumPy, whose names are the same here.

    A product of two words fills 64 bits and may come out negative; its high half is then read by a shift that drags the
    sign along. Only what is multiplied next must be a clean word, so one mask per product is enough.
    """
    c1, c2, c3 = rest
    x0, x2, low, high, spare, more = buffers
    keys = [((key + i * _KEY_A) & _WORD, ((key >> 32) + i * _KEY_B) & _WORD) for i in range(_ROUNDS)]
    # Round 1: only the first word differs between counters, so the other product is one number.
    product = _B * c2
    first, second = (product >> 32) ^ c1 ^ keys[0][0], product & _WORD
    xp.multiply(c0, _A, out=low)
    _mix(xp, low, c3 ^ keys[0][1], None, x2)
    # Round 2: now it is the first word that is one number.
    product = _A * first
    xp.multiply(x2, _B, out=high)
    _mix(xp, high, second ^ keys[1][0], None, x0)
    xp.bitwise_xor(low, product >> 32 ^ keys[1][1], out=x2)
    xp.bitwise_and(x2, _WORD, out=x2)
    fourth = more
    fourth[:] = product & _WORD
    # From here on all four differ: x0 and x2 are clean, `high` and `fourth` have the second and the fourth word.
    for k0, k1 in keys[2:]:
        xp.multiply(x0, _A, out=low)
        xp.multiply(x2, _B, out=spare)
        _mix(xp, spare, k0, high, x0)
        _mix(xp, low, k1, fourth, x2)
        high, spare = spare, high
        low, fourth = fourth, low
    for clean, other, column in ((x0, high, 0), (x2, fourth, 1)):
        xp.bitwise_left_shift(other, 32, out=other)
        xp.bitwise_or(clean, other, out=out[:, column])


def _mix(xp: Any, product: Any, key: int, other: Any, out: Any) -> None:
    """Write over `out` the high half of `product` ^ other ^ key, as a clean word."""
    xp.bitwise_right_shift(product, 32, out=out)
    if other is not None:
        xp.bitwise_xor(out, other, out=out)
    xp.bitwise_xor(out, key, out=out)
    xp.bitwise_and(out, _WORD, out=out)
