"""Weights on a GPU: one pass to move them, and linear layers at shifted weights that are nowhere stored whole.

Both need Triton and Rademacher noise, and give what the torch code in `_update` and `_probing` gives: the update bit
for bit, the layer up to the order of its additions. Importing this loads neither torch nor Triton.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentopt.weights.load import need
from agentopt.weights.zeroth._noise import mask_limit

_MASKS = {"none": 0, "small": 1, "large": 2, "random": 3}
_BLOCK = 128

FUSED_TOKENS = 256
"""Tokens per copy up to which the shift is added inside the multiplication (see `linear`)."""

SLICE_BYTES = 16 << 20
"""Size of one shifted slice of a weight: a pair of them fits a GPU's cache, and is enough work for all its units."""


@functools.cache
def _triton() -> bool:
    try:
        import triton  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        return False
    return True


def _compiled(module: str) -> Any:
    """A module of kernels; what Triton makes of a function has no useful type."""
    return importlib.import_module(f"agentopt.weights.zeroth.{module}")


def usable(tensor: Any) -> bool:
    """Whether the kernels can work on this tensor: on CUDA with Triton (or in its interpreter, for tests)."""
    torch = need("torch")
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not tensor.is_contiguous():
        return False
    return (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and _triton()


def update_(
    weight: Any,
    seeds: Sequence[int],
    steps: Sequence[float],
    decay: float,
    tensor_id: int,
    *,
    threshold: float = 0.0,
    mask: str = "none",
    mask_seed: int = 0,
    density: float = 1.0,
    clamp: bool = False,
    round_seed: int = 0,
) -> None:
    """Move a weight in place: w <- w * decay - sum over k of (plus or minus steps[k]), where the mask lets it.

    One reading and one writing, however many directions; bit for bit what the torch code does.

    Args:
        weight: float32, bfloat16 or float16, contiguous.
        seeds: one per direction.
        steps: learning rate times coefficient, one per direction.
        decay: factor of the weights that move; 1 for none.
        tensor_id: the tensor.
        threshold: magnitude that "small" and "large" compare with.
        mask: "none", "small", "large" or "random".
        mask_seed: of a random mask.
        density: of a random mask.
        clamp: hold the weights that move on their side of the threshold.
        round_seed: of the stochastic rounding of 16-bit weights.
    """
    kernels = _compiled("_kernel_weights")
    torch = need("torch")
    numbers, sizes = _numbers((mask_seed, round_seed, *seeds), tuple(steps), str(weight.device))
    form = _format(torch, weight)
    bits = weight.view(torch.int16) if form else weight
    kernels.update_kernel[(-(-weight.numel() // (8 * kernels.ROWS)),)](
        bits,
        numbers,
        sizes,
        weight.numel(),
        _signed(tensor_id),
        threshold,
        mask_limit(density),
        decay,
        COUNT=len(seeds),
        MASK=_MASKS[mask],
        CLAMP=clamp,
        DECAY=decay != 1.0,
        FORMAT=form,
        ROWS=kernels.ROWS,
        enable_fp_fusion=False,
    )


@dataclass(frozen=True, slots=True)
class _Mask:
    """What a mask's kernel arguments are made of."""

    kind: int
    threshold: float
    seed: int
    limit: int


def linear(
    x: Any,
    weight: Any,
    bias: Any,
    seeds: Sequence[int],
    scales: Sequence[float],
    rows_per_copy: int,
    tensor_id: int,
    *,
    mask: str = "none",
    threshold: float = 0.0,
    mask_seed: int = 0,
    density: float = 1.0,
) -> Any:
    """A linear layer for several copies of a batch, each with a weight of its own: W + scale * mask * sign(seed).

    Neighbours with the same seed and opposite scales share one reading of the weight. Up to `FUSED_TOKENS` tokens per
    copy the shift is added inside the multiplication; above it, slices of the shifted weight of `SLICE_BYTES` are built
    in a scratch that stays in the cache, and cuBLAS multiplies: it is the better multiplier where reading the weight is
    not what takes the time. Which way is taken depends on shapes and types only.

    Args:
        x: (copies * rows_per_copy, ..., in).
        weight: (out, in), contiguous, of the type of `x`.
        bias: (out,) or None; the same for all copies.
        seeds: one per copy.
        scales: one per copy; 0 leaves the weight as it is.
        rows_per_copy: rows of `x` of one copy.
        tensor_id: the tensor.
        mask: "none", "small", "large" or "random".
        threshold: magnitude that "small" and "large" compare with.
        mask_seed: of a random mask.
        density: of a random mask.
    """
    torch = need("torch")
    copies = len(seeds)
    flat = x.contiguous().view(copies, -1, x.shape[-1])
    if x.shape[0] != copies * rows_per_copy:
        raise ValueError(f"{x.shape[0]} rows are not {copies} copies of {rows_per_copy}")
    out = torch.empty((copies, flat.shape[1], weight.shape[0]), dtype=x.dtype, device=x.device)
    rule = _Mask(_MASKS[mask], threshold, mask_seed, mask_limit(density))
    pairs, singles, plain = _groups(seeds, scales)
    for copy in plain:
        torch.mm(flat[copy], weight.t(), out=out[copy])
    run = _fused if _fuses(torch, flat, weight) else _sliced
    for group, pair in ((pairs, True), (singles, False)):
        if group:
            run(
                torch,
                flat,
                weight,
                out,
                [(first, seeds[first], scales[first]) for first in group],
                tensor_id,
                rule,
                pair,
            )
    out = out.view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out.add_(bias)


def _groups(seeds: Sequence[int], scales: Sequence[float]) -> tuple[list[int], list[int], list[int]]:
    """First copies of pairs of opposite shifts, copies with a shift of their own, and copies with none."""
    pairs: list[int] = []
    singles: list[int] = []
    plain: list[int] = []
    copy = 0
    while copy < len(seeds):
        following = copy + 1
        if not scales[copy]:
            plain.append(copy)
        elif following < len(seeds) and seeds[copy] == seeds[following] and scales[copy] == -scales[following]:
            pairs.append(copy)
            copy = following
        else:
            singles.append(copy)
        copy += 1
    return pairs, singles, plain


def _fuses(torch: Any, flat: Any, weight: Any) -> bool:
    """Whether the shift is added inside the multiplication."""
    narrow = weight.dtype != torch.float32 or not weight.is_cuda
    return narrow and weight.shape[1] % _BLOCK == 0 and flat.shape[1] <= FUSED_TOKENS


def _fused(
    torch: Any,
    flat: Any,
    weight: Any,
    out: Any,
    group: Sequence[tuple[int, int, float]],
    tensor_id: int,
    mask: _Mask,
    pair: bool,
) -> None:
    kernels = _compiled("_kernel_linear")
    tokens, height, width = flat.shape[1], weight.shape[0], weight.shape[1]
    numbers, sizes = _numbers(
        (mask.seed, *(seed for _, seed, _ in group)), tuple(scale for _, _, scale in group), str(flat.device)
    )
    first = torch.tensor([(copy, copy + pair) for copy, _, _ in group], dtype=torch.int32, device=flat.device)
    # Tall tiles for many tokens; narrow ones when few tokens would leave most of the GPU without a tile.
    tile, outs = (16 if tokens <= 16 else 32 if tokens <= 32 else 64), 64
    kernels.linear_kernel[(-(-height // outs), -(-tokens // tile), len(group))](
        flat,
        weight,
        out,
        numbers,
        first,
        sizes,
        tokens,
        height,
        width,
        _signed(tensor_id),
        mask.threshold,
        mask.limit,
        MASK=mask.kind,
        PAIR=pair,
        EXACT=weight.dtype == torch.float32 or not weight.is_cuda,
        OUT=outs,
        TOKENS=tile,
        HALF=kernels.HALF,
        num_warps=4,
        num_stages=2,
        enable_fp_fusion=False,
    )


def _sliced(
    torch: Any,
    flat: Any,
    weight: Any,
    out: Any,
    group: Sequence[tuple[int, int, float]],
    tensor_id: int,
    mask: _Mask,
    pair: bool,
) -> None:
    kernels = _compiled("_kernel_weights")
    height, width = weight.shape
    form = _format(torch, weight)
    bits = weight.view(torch.int16) if form else weight
    step = _slice_rows(height, width * weight.element_size())
    scratch = torch.empty((2 if pair else 1, step, width), dtype=weight.dtype, device=weight.device)
    written = scratch.view(torch.int16) if form else scratch
    for copy, seed, scale in group:
        numbers, _ = _numbers((mask.seed, seed), (), str(flat.device))
        for low in range(0, height, step):
            rows = min(step, height - low)
            start = low * width
            # A slice may begin within a row of 8 weights: one more row then.
            programs = -(-(start % 8 + rows * width) // (8 * kernels.ROWS))
            kernels.shift_kernel[(programs,)](
                bits,
                written[0],
                written[-1],
                numbers,
                scale,
                start,
                rows * width,
                _signed(tensor_id),
                mask.threshold,
                mask.limit,
                MASK=mask.kind,
                PAIR=pair,
                FORMAT=form,
                ROWS=kernels.ROWS,
                enable_fp_fusion=False,
            )
            shifted = scratch[:, :rows].transpose(1, 2)
            if rows == height:
                torch.bmm(flat[copy : copy + 1 + pair], shifted, out=out[copy : copy + 1 + pair])
            else:
                out[copy : copy + 1 + pair, :, low : low + rows] = torch.bmm(flat[copy : copy + 1 + pair], shifted)


def _slice_rows(height: int, row_bytes: int) -> int:
    """Rows of a slice; many of them are a multiple of the tiles that matrices are multiplied in."""
    rows = max(1, SLICE_BYTES // row_bytes)
    return min(height, rows // _BLOCK * _BLOCK or rows)


@functools.lru_cache(maxsize=64)
def _numbers(seeds: tuple[int, ...], sizes: tuple[float, ...], device: str) -> tuple[Any, Any]:
    """Seeds (int64, same bits) and sizes (float32) on the device; the same for every tensor of a step."""
    torch = need("torch")
    wrapped = [seed - (1 << 64) if seed >= 1 << 63 else seed for seed in seeds]
    return (
        torch.tensor(wrapped, dtype=torch.int64, device=device),
        torch.tensor(sizes, dtype=torch.float32, device=device),
    )


def _format(torch: Any, weight: Any) -> int:
    """How a kernel reads the weight: 0 float32, 1 bfloat16, 2 float16."""
    return {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[weight.dtype]


def _signed(word: int) -> int:
    """A 32-bit word as the signed number of the same bits: kernels then always take an int32."""
    return word - (1 << 32) if word >= 1 << 31 else word
